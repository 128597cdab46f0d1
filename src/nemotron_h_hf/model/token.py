"""One token per row through many blocks on a CPU, in one compiled call instead of hundreds of operations. Needs Numba.

Blocks whose parts are plain modules, with weights that numba_run.py reads, become rows of numbers; `finish` runs those
collected so far. What a block is as numbers is found once and kept (`Plan`) until anything of the block changes. Other blocks
(experts, adapters, hooks, offloaded or other quantised weights) run as modules between them. Between the parts of a block
values are fp32, also in a bf16 model.

    b batch, n outputs of a Linear
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import GrowingLayer, read_states
from .configuration_nemotron_h import NemotronHConfig
from .kernels import compiled_loops, fuses_step
from .linear import COMPILED_DTYPES, few_rows, most_bf16_rows, reads_int8
from .mamba2 import NemotronHMamba2Mixer, NemotronHRMSNormGated
from .moe import SquaredReLU
from .plain import PLAIN_TENSORS, REORDERED, Seen, classes_are_plain, is_plain
from .ssd import under_func


def can_take_token(config: NemotronHConfig, x: Tensor, training: bool) -> bool:
    """Whether a `TokenRun` may be made of x (b, 1, hidden), of real tokens."""
    if not few_rows(x) or x.shape[1] != 1 or training or type(x) is not Tensor or x.dtype not in COMPILED_DTYPES:
        return False
    if x.dtype == torch.bfloat16 and x.shape[0] > most_bf16_rows():
        return False
    if config.mamba_implementation != "auto" or config._attn_implementation != "sdpa" or config.residual_in_fp32:
        return False
    return not under_func() and not torch.jit.is_tracing() and compiled_loops() is not None


@dataclass(frozen=True)
class Plan:
    """A block as numbers: the same for every token while `seen` holds."""

    seen: Seen
    factors: Sequence[tuple]  # numba_run.Factor of its Linear layers, in the order in which they are computed
    recurrence: tuple | None = None  # numba_run.Recurrence


_plans: WeakKeyDictionary[nn.Module, Plan | None] = WeakKeyDictionary()


class TokenRun:
    """The blocks that x (b, 1, hidden) has to go through."""

    def __init__(self, x: Tensor, cache: Cache | None) -> None:
        self.loops, self.cache, self.trusts_plans = compiled_loops(), cache, classes_are_plain()
        self.start(x)

    def start(self, x: Tensor) -> None:
        """Go on from x, with no block yet."""
        self.x = x
        self.rows, self.num_rows = x[:, 0].float().contiguous(), x.shape[0]
        self.operations: list[tuple] = []
        self.held: list[object] = []  # what the operations read and write

    def finish(self, norm: nn.Module | None = None) -> Tensor:
        """Run the blocks: the last one's output (b, 1, hidden) in x's dtype, after `norm` if there is one."""
        if self.operations:
            if norm is not None and is_plain(norm, type(norm)) and _is_vector(norm.weight):
                y = self._new(self.rows.shape[1])
                self.operations.append(self.loops.norm_of(self.rows, norm.weight, norm.variance_epsilon, y))
                self.held.append(self.rows)
                self.rows, norm = y, None
            self.loops.run(self.operations)
            self.x = self.rows.to(self.x.dtype)[:, None]
            self.operations = []
        return self.x if norm is None else norm(self.x)

    def add(self, block: nn.Module, attention_mask: Tensor | None) -> bool:
        """Take this block too, if it can be."""
        kind = block.block_type
        if self.cache is None and kind != "mlp":
            return False
        plan = _plans.get(block)
        if plan is None or not self.trusts_plans or not plan.seen.holds():
            plan = _plans[block] = plan_of(block)
        if plan is None:
            return False
        self.held.append(plan)
        if kind == "linear_attention":
            return self._add_mamba(block.mixer, plan)
        if kind == "full_attention":
            return self._add_attention(block.mixer, plan, attention_mask)
        up, down = plan.factors
        self._add_last(down, self._multiplied(up))
        return True

    def _add_mamba(self, mixer: NemotronHMamba2Mixer, plan: Plan) -> bool:
        layer = self.cache.layers[mixer.layer_idx]
        if not layer.has_previous_state[0] or layer.record_past:
            return False
        states, (in_proj, out_proj) = read_states(layer), plan.factors
        if not fuses_step(self.x, states, (), "auto"):
            return False
        projected, mixed = self._multiplied(in_proj), self._new(out_proj.k)
        self.held += states
        self.operations.append(self.loops.step_of(projected, *states, plan.recurrence, mixed))
        self._add_last(out_proj, mixed)
        layer.tokens_seen += 1
        return True

    def _add_attention(self, mixer: nn.Module, plan: Plan, attention_mask: Tensor | None) -> bool:
        layer = self.cache.layers[mixer.layer_idx]
        if self.cache.offloading or attention_mask is not None or not isinstance(layer, GrowingLayer):
            return False
        if not layer.is_initialized or layer.keys.dtype not in COMPILED_DTYPES or layer.keys.shape[0] != self.num_rows:
            return False
        *first, o_proj = plan.factors
        query, key, value = (self._multiplied(factor) for factor in first)
        keys, values = layer.make_room()
        if mixer.sliding_window is not None:
            keys, values = keys[:, :, -mixer.sliding_window :], values[:, :, -mixer.sliding_window :]
        out = self._new(o_proj.k)
        self.held += [keys, values]
        self.operations.append(self.loops.attention_of(query, (key, value), keys, values, mixer.scaling, out))
        self._add_last(o_proj, out)
        return True

    def _multiplied(self, factor: tuple) -> Tensor:
        """What a block's first layer makes of the rows: (b, n)."""
        y = self._new(factor.n)
        self.operations.append(self.loops.product_of(self.rows, factor, y))
        return y

    def _add_last(self, factor: tuple, inputs: Tensor) -> None:
        """The rows plus what a block's last layer makes of its inputs."""
        y = self._new(factor.n)
        self.operations.append(self.loops.product_of(inputs, factor, y, residual=self.rows))
        self.held.append(self.rows)
        self.rows = y

    def _new(self, width: int) -> Tensor:
        new = self.rows.new_empty(self.num_rows, width)
        self.held.append(new)
        return new


def plan_of(block: nn.Module) -> Plan | None:
    """The plan of a block whose parts are plain and have weights that can be read; None for all others."""
    mixer, norm = block.mixer, block.norm
    if not all(is_plain(part, type(part)) for part in (block, norm, mixer)) or not _is_vector(norm.weight):
        return None
    recurrence, is_squared = None, False
    if block.block_type == "mlp":
        linears, is_squared = (mixer.up_proj, mixer.down_proj), True
        if not is_plain(mixer.act_fn, SquaredReLU):
            return None
    elif block.block_type == "linear_attention":
        linears, recurrence = (mixer.in_proj, mixer.out_proj), recurrence_of(mixer)
        if recurrence is None:
            return None
    elif block.block_type == "full_attention":
        linears = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj
    else:
        return None
    if not all(_is_read(linear) for linear in linears):
        return None
    factor_of, before = compiled_loops().factor_of, (norm.weight, norm.variance_epsilon)
    factors = [factor_of(linear.weight, before, is_squared, _orders(linear)) for linear in linears[:-1]]
    factors.append(factor_of(linears[-1].weight, None, False, _orders(linears[-1])))
    copied = [
        t for linear in linears if reads_int8(linear.weight) for t in (linear.weight.scale, linear.weight.zero_point)
    ]
    return Plan(Seen(block, [t for t in copied if t is not None]), factors, recurrence)


def recurrence_of(mixer: NemotronHMamba2Mixer) -> tuple | None:
    """What is between a Mamba layer's projections, or None if it cannot be read."""
    conv, norm = mixer.conv1d, mixer.norm
    if not is_plain(conv, nn.Conv1d) or not is_plain(norm, NemotronHRMSNormGated):
        return None
    weights = conv.weight, conv.bias, mixer.A_log, mixer.D, mixer.dt_bias, norm.weight
    if not all(weight is None or _is_vector(weight) for weight in weights):
        return None
    return compiled_loops().recurrence_of(weights, mixer.n_groups, (norm.variance_epsilon, *mixer.time_step_limit))


def _is_read(linear: nn.Module) -> bool:
    kind = type(linear) if type(linear) in REORDERED else nn.Linear
    if not is_plain(linear, kind) or linear.bias is not None:
        return False
    weight = linear.weight
    return _is_plain_weight(weight) and weight.stride(-1) == 1 if type(weight) in PLAIN_TENSORS else reads_int8(weight)


def _is_plain_weight(weight: Tensor) -> bool:
    return type(weight) in PLAIN_TENSORS and weight.dtype in COMPILED_DTYPES and weight.device.type == "cpu"


def _is_vector(weight: Tensor) -> bool:
    """Whether its numbers lie one behind the other, as all but the Linear layers' are read."""
    return _is_plain_weight(weight) and weight.is_contiguous()


def _orders(linear: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
    return (linear.row_order, linear.column_order) if type(linear) in REORDERED else (None, None)
