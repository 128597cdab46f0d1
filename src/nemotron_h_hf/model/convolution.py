"""The convolution of a Mamba layer and its SiLU: from the weights of a plain nn.Conv1d, through the module of any other.

The module computes windows of its input; it knows no state and no documents. So it is given the inputs before the first one
too, and in packed rows each token's window by itself, with zeros for other documents.

    b batch, l length, d channels, k taps
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import causal_conv, conv_step
from .plain import is_plain


def convolve(conv: nn.Module, x: Tensor, state: Tensor | None, seq_idx: Tensor | None, implementation: str) -> Tensor:
    """Each channel's convolution over its own past, then SiLU. `conv` pads by k - 1 on both sides, as in transformers.

    x (b, l, d), state (b, d, k) of the inputs before it or None, `seq_idx` (b, l) documents or None -> (b, l, d).
    """
    if is_plain(conv, nn.Conv1d):
        return causal_conv(x, conv.weight.squeeze(1), conv.bias, state, seq_idx, implementation)
    taps = conv.weight.shape[-1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if state is None else state[..., 1:].mT.to(x.dtype)
    rows = torch.cat([before, x], dim=1)  # (b, k - 1 + l, d)
    if seq_idx is None:
        out = _call(conv, rows.mT)[..., taps - 1 : rows.shape[1]].mT
    else:
        documents = torch.cat([seq_idx[:, :1].expand(-1, taps - 1), seq_idx], dim=1).unfold(1, taps, 1)  # (b, l, k)
        windows = rows.unfold(1, taps, 1) * (documents == seq_idx[..., None])[:, :, None]  # (b, l, d, k)
        out = _call(conv, windows.flatten(0, 1))[..., taps - 1].view_as(x)
    return F.silu(out)


def convolve_step(conv: nn.Module, x: Tensor, state: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """`convolve` for one token per row: x (b, d), state (b, d, k) -> (b, d) and the next state."""
    if is_plain(conv, nn.Conv1d):
        return conv_step(x, state, conv.weight.squeeze(1), conv.bias, implementation)
    state = torch.cat([state[..., 1:], x.to(state.dtype)[..., None]], dim=-1)
    return F.silu(_call(conv, state.to(x.dtype))[..., state.shape[-1] - 1]), state


def _call(conv: nn.Module, x: Tensor) -> Tensor:
    """The module's output in x's dtype; its weight may be of another."""
    dtype = conv.weight.dtype if conv.weight.is_floating_point() else x.dtype
    return conv(x.to(dtype)).to(x.dtype)
