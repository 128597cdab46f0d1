"""Runs compiled operations one after the other, on one thread or on several (numba_compile.py). Needs Numba.

An operation is (which, bytes that it reads, integers, floats), as `product_of`, `step_of` and `attention_of` make them.
Tensors are addresses in it: they must live until it has run, and nothing of it is seen by autograd or a tracer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .numba_attention import ATTENTION, attention_part
from .numba_compile import Kernel, compiled, compiled_for_threads, prange
from .numba_decode import STEP, step_of, step_part
from .numba_product import PRODUCT, product_of, product_part

MOST_INTS, MOST_REALS = 21, 3


@compiled
def _part(which, ints, reals, part, parts):  # pragma: no cover, machine code
    if which == PRODUCT:
        product_part(ints, reals, part, parts)
    elif which == STEP:
        step_part(ints, reals, part, parts)
    elif which == ATTENTION:
        attention_part(ints, reals, part, parts)


@compiled
def _on_one_thread(which, ints, reals, part, parts):  # pragma: no cover, machine code
    for i in range(len(which)):
        _part(which[i], ints[i], reals[i], part, parts)


@compiled_for_threads
def _on_threads(which, ints, reals, parts):  # pragma: no cover, machine code
    for i in range(len(which)):
        for part in prange(parts):
            _part(which[i], ints[i], reals[i], part, parts)


_run = Kernel(_on_one_thread, _on_threads)


def run(operations: Sequence[tuple]) -> None:
    """Run them in this order."""
    which, sizes, ints, reals = zip(*operations)
    padded = [row + (0,) * (MOST_INTS - len(row)) for row in ints], [row + (0,) * (MOST_REALS - len(row)) for row in reals]
    _run(sum(sizes), np.array(which), np.array(padded[0], np.int64), np.array(padded[1], np.float64))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x (..., k) in any floating dtype and a weight as in `product_of` -> (..., n) in x's dtype; no gradients."""
    rows, held = x.detach().reshape(-1, x.shape[-1]).float().contiguous(), []
    values = weight.qdata if type(weight).__name__ == "Int8Tensor" else weight
    y = torch.empty(len(rows), values.shape[0])
    run([product_of(rows, weight, y, held)])
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def step(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv: tuple[Tensor, Tensor | None],
    heads: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor, float],
    groups: int,
    limit: tuple[float, float],
) -> Tensor:
    """`triton_decode.step` on a CPU; ssm_state has to be fp32 and contiguous."""
    rows = projected.detach().float().contiguous()
    weights = [None if weight is None else weight.contiguous() for weight in (*conv, *heads, norm[0])]
    out = torch.empty(len(rows), len(norm[0]))
    run([step_of(rows, conv_state, ssm_state, weights, groups, (norm[1], *limit), out)])
    return out.to(projected.dtype)
