"""The product of a few rows and torchao's int8 weights on a CPU, at the speed of its memory. Needs Numba.

torchao multiplies by int8 weights on a CPU by making them fp32 first, every time: slower than fp32 weights, for a single
token several times. Here each weight is read once, as the byte it is, and becomes fp32 in a register; sums are fp32
(docs/results/int8). `linear.py` imports this file when it meets the first such weight; importing it compiles
(numba_compile.py).

    m rows, k input channels, n output channels
"""

import numpy as np
import torch
from torch import Tensor

from .numba_compile import compiled, prange


@compiled("void(float32[:,::1], int8[:,::1], float32[::1], float32[:,::1], int64)")
def _multiply(x, values, scale, y, parts):  # pragma: no cover, machine code
    """y (m, n) = x (m, k) times values (n, k) transposed, times scale (n); `parts` of n side by side."""
    n = values.shape[0]
    for part in prange(parts):
        for row in range(n * part // parts, n * (part + 1) // parts):
            for i in range(x.shape[0]):
                total = np.float32(0)
                for k in range(values.shape[1]):
                    total += x[i, k] * np.float32(values[row, k])
                y[i, row] = total * scale[row]


def can_read(weight: Tensor) -> bool:
    """Whether an Int8Tensor is of the kind that `Int8WeightOnlyConfig()` makes: one scale for a row, no zero points, no
    scale or quantisation of the inputs."""
    values = weight.qdata  # asking `weight` itself for its shape takes microseconds
    return (
        list(weight.block_size) == [1, values.shape[-1]]
        and values.is_contiguous()
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not weight.zero_point.numpy().any())
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., k) in any floating dtype, weight an Int8Tensor (n, k) that `can_read` -> (..., n) in x's dtype; no gradients."""
    values, scale = weight.qdata.numpy(), weight.scale.detach().float().numpy().ravel()
    rows = np.ascontiguousarray(x.detach().float().numpy().reshape(-1, x.shape[-1]))
    y = torch.empty(*x.shape[:-1], len(values))
    _multiply(rows, values, scale, y.numpy().reshape(len(rows), -1), torch.get_num_threads())
    y = y if x.dtype == torch.float32 else y.to(x.dtype)
    return y if bias is None else y + bias
