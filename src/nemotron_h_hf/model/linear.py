"""A Linear that is not slow for few rows on a CPU.

PyTorch gives the product of one row and a matrix to one thread of MKL, and of a few rows to code that is slower still:
both read the weights at half the speed of the memory or less. As a batch of products, one for a part of the output each,
every thread reads its own part: 1.1 to 1.7 times as fast for 1 to 64 rows on two cores (docs/results/few_rows).

    m rows, k input channels, n output channels, t parts
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_ROWS = 64
FEWEST_WEIGHTS = 2**18  # below, the threads' meeting costs more than they save


class NemotronHLinear(nn.Linear):
    """torch's Linear; without gradients, in fp32 on a CPU, few rows are multiplied by all threads."""

    def forward(self, x: Tensor) -> Tensor:
        parts = num_parts(x, self.weight)
        return F.linear(x, self.weight, self.bias) if parts == 1 else product_in_parts(x, self.weight, self.bias, parts)


def num_parts(x: Tensor, weight: Tensor) -> int:
    """Into how many parts the product is divided: a divisor of n, 1 where torch's own is taken."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return 1
    plain = type(weight) in (nn.Parameter, Tensor) and x.dtype == weight.dtype == torch.float32
    if not plain or weight.numel() < FEWEST_WEIGHTS or not 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        return 1
    return 1 if torch.is_autocast_enabled("cpu") else math.gcd(weight.shape[0], torch.get_num_threads())


def product_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """x (..., k), weight (n, k) -> (..., n)."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.bmm(rows.expand(parts, -1, -1), weight.unflatten(0, (parts, -1)).transpose(1, 2))  # (t, m, n / t)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
