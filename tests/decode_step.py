"""A Mamba layer's token, for the kernels that compute it in one call: what goes in, and op by op in float64 what comes out."""

import torch
from torch import Tensor

from nemotron_h_hf.model import ssd


def step_operands(b: int, h: int, p: int, g: int, n: int, k: int = 4, bias: bool = True) -> dict:
    """The arguments of `kernels.whole_step`; step sizes from 1e-5 to 30, softplus must be exact at both ends."""
    d = h * p + 2 * g * n
    dt_bias = torch.tensor([-11.0, -3.0, 2.0, 30.0]).repeat(h)[:h]
    return {
        "projected": torch.randn(b, h * p + d + h),
        "states": (torch.randn(b, d, k), torch.randn(b, h, p, n)),
        "conv": (torch.randn(d, k), torch.randn(d) if bias else None),
        "heads": (torch.rand(h), torch.randn(h), dt_bias),
        "norm": (torch.rand(h * p) + 0.5, 1e-5),
        "groups": g,
    }


def exact_step(
    projected: Tensor, states: tuple, conv: tuple, heads: tuple, norm: tuple, groups: int, limit: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """out_proj's input and both states after the token, in float64."""
    (b, h, p, n), d = states[1].shape, len(conv[0])
    gate, conv_in, raw = (t.double() for t in projected.split([h * p, d, h], dim=-1))
    weights = (None if t is None else t.double() for t in conv)
    conv_out, conv_next = ssd.conv_step(conv_in, states[0].double(), *weights)
    x, B, C = conv_out.split([h * p, groups * n, groups * n], dim=-1)
    A_log, D, dt_bias = (t.double() for t in heads)
    dt, B, C = ssd.discretize(raw, dt_bias, limit), B.view(b, groups, n), C.view(b, groups, n)
    y, ssm_next = ssd.scan_step(x.view(b, h, p), dt, -A_log.exp(), B, C, D, states[1].double())
    return ssd.gated_norm(y.flatten(1), gate, norm[0].double(), h // groups * p, norm[1]), conv_next, ssm_next
