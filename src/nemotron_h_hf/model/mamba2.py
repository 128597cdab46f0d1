"""The Mamba-2 mixer: in_proj -> causal convolution -> state-space scan -> gated norm -> out_proj.

in_proj's rows are [gate | x | B | C | dt]; the convolution covers x, B and C. Both projections are always called as modules,
so a LoRA, quantised or FP8 layer in their place is really used. What is between them is recomputed in the backward pass,
and training keeps only in_proj's output and out_proj's input.

    b batch, l length, h heads, p head_dim, g groups, n state
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache

from .arguments import one_cache
from .cache import MambaCacheLayer, read_states
from .configuration_nemotron_h import NemotronHConfig
from .convolution import convolve, convolve_step
from .kernels import fuses_step, gated_norm, has_kernels_for, scan, scan_step, whole_step
from .linear import project
from .padding import Padding
from .plain import is_plain, remember_forward
from .ssd import conv_window, discretize, under_func, wide


@remember_forward
class NemotronHRMSNormGated(nn.Module):
    """RMSNorm over groups of channels of x * silu(gate), in fp32."""

    def __init__(self, size: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size, self.variance_epsilon = group_size, eps

    def forward(self, x: Tensor, gate: Tensor, implementation: str = "torch") -> Tensor:
        return gated_norm(x, gate, self.weight, self.group_size, self.variance_epsilon, implementation)


@remember_forward
class NemotronHMamba2Mixer(nn.Module):
    """One Mamba-2 layer (arXiv 2405.21060). A_log, D, dt_bias are stored in any dtype and computed in fp32."""

    def __init__(self, config: NemotronHConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = (config.size(name, layer_idx) for name in ("mamba_num_heads", "mamba_head_dim"))
        self.n_groups, self.ssm_state_size = config.n_groups, config.ssm_state_size
        self.chunk_size, self.time_step_limit = config.chunk_size, tuple(config.time_step_limit)
        self.intermediate_size, self.conv_dim = config.mamba_width(layer_idx), config.conv_width(layer_idx)
        groups_size = self.n_groups * self.ssm_state_size
        self.in_proj_sizes = [self.intermediate_size, self.conv_dim, self.num_heads]  # gate, (x, B, C), dt
        self.conv_sizes = [self.intermediate_size, groups_size, groups_size]  # x, B, C

        self.in_proj = nn.Linear(config.hidden_size, sum(self.in_proj_sizes), bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim, padding=config.conv_kernel - 1,
            bias=config.use_conv_bias,
        )  # fmt: skip
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        group_size = self.intermediate_size // self.n_groups
        self.norm = NemotronHRMSNormGated(self.intermediate_size, group_size, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        padding: Padding | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """hidden_states (b, l, hidden) -> (b, l, hidden); `seq_idx` (b, l) are document numbers of packed rows."""
        projected, cache = project(self.in_proj, hidden_states), one_cache(cache, past_key_values)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if padding is not None:
            projected = padding.compact(projected).masked_fill(~padding.real[..., None], 0)
            seq_idx = None if seq_idx is None else padding.compact(seq_idx)
        if projected.shape[1] == 1 and layer is not None and layer.has_previous_state[0] and padding is None:
            mixed = self._step(projected[:, 0], layer)[:, None]
        elif has_kernels_for(projected, self.config.mamba_implementation) and torch.compiler.is_compiling():
            mixed = self._untraced(projected, padding, seq_idx, layer)
        else:
            mixed = self._mix_recomputed(projected, padding, seq_idx, layer)
        output = project(self.out_proj, mixed)
        return output if padding is None else padding.restore(output)

    def _mix_recomputed(
        self, projected: Tensor, padding: Padding | None, seq_idx: Tensor | None, layer: MambaCacheLayer | None
    ) -> Tensor:
        """`_mix`, made again in the backward pass where there is one."""
        if layer is None and torch.is_grad_enabled() and projected.requires_grad and not under_func():
            return checkpoint(self._mix, projected, padding, seq_idx, use_reentrant=False, preserve_rng_state=False)
        return self._mix(projected, padding, seq_idx, layer)

    # torch.compile would trace the plain operations, which are slower than our kernels are untraced.
    _untraced = torch.compiler.disable(_mix_recomputed)

    def _mix(
        self, projected: Tensor, padding: Padding | None, seq_idx: Tensor | None, layer: MambaCacheLayer | None = None
    ) -> Tensor:
        """(b, l, gate + conv + dt) -> (b, l, intermediate); takes and leaves the states of a cache layer."""
        implementation = self.config.mamba_implementation
        gate, conv_in, dt = projected.split(self.in_proj_sizes, dim=-1)
        conv_state, ssm_state = (None, None) if layer is None else read_states(layer)
        if padding is not None and seq_idx is not None:  # the padding behind the real tokens is no new document
            seq_idx = seq_idx.where(padding.real, seq_idx.gather(1, (padding.lengths[:, None] - 1).clamp(min=0)))
        conv_out = convolve(self.conv1d, conv_in, conv_state, seq_idx, implementation)
        x, B, C = self._heads(conv_out)
        dt = discretize(dt, self.dt_bias, self.time_step_limit)
        if padding is not None:
            dt = dt * padding.real[..., None]
        A = self._decay()
        y, last = scan(x, dt, A, B, C, self.D, self.chunk_size, ssm_state, seq_idx, implementation)
        if layer is not None:
            taps, lengths = self.config.conv_kernel, None if padding is None else padding.lengths
            if layer.record_past:
                fed = {"conv": conv_in, "x": x, "dt": dt, "B": B}
                fed["real"] = torch.ones_like(dt[..., 0], dtype=torch.bool) if padding is None else padding.real
                fed = fed if padding is None else {name: padding.restore(t) for name, t in fed.items()}
                layer.record((conv_state, ssm_state), A, fed)
            layer.store(conv_window(conv_in, taps, conv_state, lengths), last, dt.shape[1])
        return self.norm(y.flatten(-2), gate, implementation)

    def _step(self, projected: Tensor, layer: MambaCacheLayer) -> Tensor:
        """`_mix` for one token per row: (b, gate + conv + dt) -> (b, intermediate)."""
        implementation = self.config.mamba_implementation
        conv_state, ssm_state = states = read_states(layer)
        if not layer.record_past and self._step_is_fused(projected, states):
            conv, heads = (self.conv1d.weight.squeeze(1), self.conv1d.bias), (self.A_log, self.D, self.dt_bias)
            norm, limit = (self.norm.weight, self.norm.variance_epsilon), self.time_step_limit
            mixed = whole_step(projected, states, conv, heads, norm, self.n_groups, limit, implementation)
            layer.store(conv_state, ssm_state, 1)  # updated where they are
            return mixed
        gate, conv_in, dt = projected.split(self.in_proj_sizes, dim=-1)
        conv_out, conv_next = convolve_step(self.conv1d, conv_in, conv_state, implementation)
        x, B, C = self._heads(conv_out)
        dt, A = discretize(dt, self.dt_bias, self.time_step_limit), self._decay()
        if layer.record_past:  # before the scan, which updates the state in place
            fed = {"conv": conv_in, "x": x, "dt": dt, "B": B, "real": torch.ones_like(dt[:, 0], dtype=torch.bool)}
            layer.record((conv_state, ssm_state), A, {name: t[:, None] for name, t in fed.items()})
        y, ssm_next = scan_step(x, dt, A, B, C, self.D, ssm_state, implementation)
        layer.store(conv_next, ssm_next, 1)
        return self.norm(y.flatten(-2), gate, implementation)

    def _step_is_fused(self, projected: Tensor, states: tuple[Tensor, Tensor]) -> bool:
        """Whether one kernel may read the weights of `conv1d` and `norm` itself: no adapter or hook has to see their calls."""
        conv, norm, implementation = self.conv1d, self.norm, self.config.mamba_implementation
        if implementation not in ("auto", "triton"):
            return False
        if not is_plain(conv, nn.Conv1d) or not is_plain(norm, NemotronHRMSNormGated):
            return False
        weights = (conv.weight, conv.bias, norm.weight, self.A_log, self.D, self.dt_bias)
        return fuses_step(projected, states, weights, implementation)

    def _heads(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., x + B + C) -> x (..., h, p), B and C (..., g, n)."""
        x, B, C = conv_out.split(self.conv_sizes, dim=-1)
        rows, groups = conv_out.shape[:-1], (self.n_groups, self.ssm_state_size)
        return x.view(*rows, self.num_heads, self.head_dim), B.view(*rows, *groups), C.view(*rows, *groups)

    def _decay(self) -> Tensor:
        """A (h), negative, fp32."""
        return -torch.exp(wide(self.A_log))

    @torch.no_grad()
    def init_state_parameters(self) -> None:
        """A_log = log(1..h), D = 1, dt_bias chosen for step sizes log-uniform in [time_step_min, time_step_max]."""
        config = self.config
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        steps = torch.exp(torch.rand(self.num_heads) * (high - low) + low).clamp(min=config.time_step_floor)
        init.copy_(self.A_log, torch.log(torch.arange(1, self.num_heads + 1, dtype=torch.float32)))
        init.ones_(self.D)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))  # softplus(dt_bias) = steps
