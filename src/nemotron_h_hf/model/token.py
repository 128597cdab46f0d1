"""One token per row through many blocks on a CPU, in one compiled call instead of hundreds of operations. Needs Numba.

Blocks whose parts are plain modules, with weights that numba_run.py reads, become rows of numbers; `finish` runs those
collected so far. Other blocks (experts, adapters, hooks, offloaded or other quantised weights) run as modules between
them. Between the parts of a block values are fp32, also in a bf16 model.

    b batch, n outputs of a Linear
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import GrowingLayer, read_states
from .configuration_nemotron_h import NemotronHConfig
from .kernels import compiled_loops, fuses_step
from .linear import COMPILED_DTYPES, few_rows, multiplies_bf16, reads_int8
from .mamba2 import NemotronHMamba2Mixer, NemotronHRMSNormGated
from .moe import NemotronHMLP, SquaredReLU
from .plain import REORDERED, is_plain
from .ssd import under_func


def can_take_token(config: NemotronHConfig, x: Tensor, training: bool) -> bool:
    """Whether a `TokenRun` may be made of x (b, 1, hidden), of real tokens."""
    if not few_rows(x) or x.shape[1] != 1 or training or type(x) is not Tensor or x.dtype not in COMPILED_DTYPES:
        return False
    if x.dtype == torch.bfloat16 and len(x) > 1 and multiplies_bf16():
        return False  # the processor's own products are faster
    if config.mamba_implementation != "auto" or config._attn_implementation != "sdpa" or config.residual_in_fp32:
        return False
    return not under_func() and not torch.jit.is_tracing() and compiled_loops() is not None


class TokenRun:
    """The blocks that x (b, 1, hidden) has to go through."""

    def __init__(self, x: Tensor, cache: Cache | None) -> None:
        self.loops, self.cache = compiled_loops(), cache
        self.start(x)

    def start(self, x: Tensor) -> None:
        """Go on from x, with no block yet."""
        self.x = x
        self.rows = x[:, 0].float().contiguous()
        self.operations: list[tuple] = []
        self.held: list[Tensor] = []  # what the operations read and write

    def finish(self) -> Tensor:
        """Run the blocks: the last one's output (b, 1, hidden) in x's dtype."""
        if self.operations:
            self.loops.run(self.operations)
            self.x = self.rows.to(self.x.dtype)[:, None]
            self.operations = []
        return self.x

    def add(self, block: nn.Module, attention_mask: Tensor | None) -> bool:
        """Take this block too, if it can be."""
        if not is_plain(block, type(block)) or not is_plain(block.norm, type(block.norm)):
            return False
        mixer, kind = block.mixer, block.block_type
        if not is_plain(mixer, type(mixer)) or block.norm.weight.dtype not in COMPILED_DTYPES:
            return False
        self.norm = block.norm.weight, block.norm.variance_epsilon
        if kind == "mlp":
            return self._add_mlp(mixer)
        if self.cache is None or kind == "moe":
            return False
        return self._add_mamba(mixer) if kind == "linear_attention" else self._add_attention(mixer, attention_mask)

    def _add_mlp(self, mixer: NemotronHMLP) -> bool:
        if not is_plain(mixer.act_fn, SquaredReLU) or not _are_read(mixer.up_proj, mixer.down_proj):
            return False
        self._add_last(mixer.down_proj, self._add_first(mixer.up_proj, is_squared=True))
        return True

    def _add_mamba(self, mixer: NemotronHMamba2Mixer) -> bool:
        layer = self.cache.layers[mixer.layer_idx]
        conv, norm = mixer.conv1d, mixer.norm
        if not layer.has_previous_state[0] or layer.record_past or not _are_read(mixer.in_proj, mixer.out_proj):
            return False
        if not is_plain(conv, nn.Conv1d) or not is_plain(norm, NemotronHRMSNormGated):
            return False
        states, weights = read_states(layer), (conv.weight, conv.bias, mixer.A_log, mixer.D, mixer.dt_bias, norm.weight)
        if not fuses_step(self.x, states, weights, "auto") or not conv.weight.is_contiguous():
            return False
        projected, mixed = self._add_first(mixer.in_proj), self._new(mixer.intermediate_size)
        limits = norm.variance_epsilon, *mixer.time_step_limit
        self.held += states
        self.operations.append(self.loops.step_of(projected, *states, weights, mixer.n_groups, limits, mixed))
        self._add_last(mixer.out_proj, mixed)
        layer.tokens_seen += 1
        return True

    def _add_attention(self, mixer: nn.Module, attention_mask: Tensor | None) -> bool:
        layer, linears = self.cache.layers[mixer.layer_idx], (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        if self.cache.offloading or attention_mask is not None or not isinstance(layer, GrowingLayer):
            return False
        if not layer.is_initialized or layer.keys.dtype not in COMPILED_DTYPES or len(layer.keys) != len(self.rows):
            return False
        if not _are_read(*linears, mixer.o_proj):
            return False
        query, key, value = (self._add_first(linear) for linear in linears)
        keys, values = layer.make_room()
        if mixer.sliding_window is not None:
            keys, values = keys[:, :, -mixer.sliding_window :], values[:, :, -mixer.sliding_window :]
        out = self._new(query.size(1))
        self.held += [keys, values]
        self.operations.append(self.loops.attention_of(query, (key, value), keys, values, mixer.scaling, out))
        self._add_last(mixer.o_proj, out)
        return True

    def _add_first(self, linear: nn.Module, is_squared: bool = False) -> Tensor:
        """norm(x) times the weights of a block's first layer, squared as its activation does: (b, n)."""
        y = self._new(linear.out_features)
        self.operations.append(
            self.loops.product_of(self.rows, linear.weight, y, self.held, self.norm, is_squared, orders=_orders(linear))
        )
        return y

    def _add_last(self, linear: nn.Module, inputs: Tensor) -> None:
        """x plus the output of a block's last layer."""
        y = self._new(linear.out_features)
        self.operations.append(
            self.loops.product_of(inputs, linear.weight, y, self.held, residual=self.rows, orders=_orders(linear))
        )
        self.held.append(self.rows)
        self.rows = y

    def _new(self, width: int) -> Tensor:
        new = self.rows.new_empty(len(self.rows), width)
        self.held.append(new)
        return new


def _are_read(*linears: nn.Module) -> bool:
    return all(_is_read(linear) for linear in linears)


def _is_read(linear: nn.Module) -> bool:
    kind = type(linear) if type(linear) in REORDERED else nn.Linear
    if not is_plain(linear, kind) or linear.bias is not None:
        return False
    weight = linear.weight
    if type(weight) is nn.Parameter:
        return weight.dtype in COMPILED_DTYPES and weight.device.type == "cpu" and weight.stride(-1) == 1
    return reads_int8(weight)


def _orders(linear: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
    return (linear.row_order, linear.column_order) if type(linear) in REORDERED else (None, None)
