"""`ssd.scan` on a CPU by compiled loops (numba_scan_loops.py), without gradients. Needs Numba.

With gradients compiled loops took 0.51 of the time of PyTorch's operations, and a training step 0.97 (one thread, 189M widths,
2,048 tokens): that was not worth their length.

    b batch, l length, h heads, p head_dim, g groups, n state
"""

import numpy as np
import torch
from torch import Tensor

from .numba_compile import Kernel
from .numba_loops import on_one_thread, on_threads
from .numba_scan_loops import part_at

_run = Kernel(on_one_thread, on_threads)


@torch.no_grad()
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan` of fp32 or bf16 tensors, computed in fp32; no gradients."""
    x, B, C = map(_in_rows, (x, B, C))
    B, C = (B, C) if B.stride() == C.stride() else (B.contiguous(), C.contiguous())
    dt, A, D = (t.float().contiguous() for t in (dt, A, D))
    state = None if initial_state is None else initial_state.float().contiguous()
    documents = None if seq_idx is None else seq_idx.long().contiguous()
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    wanted = ((b, l, h), (h,), (h,), (b, l, g, n), (b, l, g, n), (b, h, p, n), (b, l))
    for tensor, shape in zip((dt, A, D, B, C, state, documents), wanted):
        if tensor is not None and tensor.shape != shape or h % g:
            raise ValueError(
                f"a scan of x {tuple(x.shape)} and B {tuple(B.shape)} reads {shape}, not {tuple(tensor.shape)}"
            )
    y, last = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n)
    numbers = (
        x.data_ptr(), x.stride(0), x.stride(1), dt.data_ptr(), A.data_ptr(), D.data_ptr(), B.data_ptr(), C.data_ptr(),
        B.stride(0), B.stride(1), *(0 if t is None else t.data_ptr() for t in (documents, state, y, last)),
        b, l, h, p, g, n,
    )  # fmt: skip
    ints = np.array(numbers, np.int64)
    _run(4 * x.numel(), part_at.address, np.array([0]), ints.ctypes.data, 0)
    return y, last


def _in_rows(t: Tensor) -> Tensor:
    """fp32, all values of a token next to each other."""
    t = t.float()
    return t if t.stride(3) == 1 and t.stride(2) == t.shape[3] else t.contiguous()
