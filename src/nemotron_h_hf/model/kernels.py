"""Chooses the implementation of each op of a Mamba layer, per call: our Triton kernels, mamba_ssm and causal_conv1d, or `ssd.py`.

"auto" takes the packages' kernels if the tensor is on a GPU, the package is installed and the kernel supports the call;
otherwise PyTorch computes it, with one warning that says why. "torch" takes no kernels. "kernels" requires the packages'
and "triton" ours (triton_*.py), which need nothing but PyTorch for CUDA; both raise if they cannot compute a call.
Ours were correct and fast on an H200 (docs/results/gpu). They were then rewritten to be faster and have since run only in
Triton's interpreter; until they have run on a GPU, "auto" does not take them (`AUTO_TAKES_OURS`). On a CPU with Numba,
"auto" computes a whole token in numba_run.py and the scan of a sequence in numba_scan.py. The other functions here have
the signature and the result of the functions of the same name in `ssd.py`.

Only ops are replaced, never a module: kernels that include `out_proj` are not used, because they would bypass LoRA,
quantised and FP8 layers.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .ssd import causal_conv as torch_causal_conv
from .ssd import conv_step as torch_conv_step
from .ssd import gated_norm as torch_gated_norm
from .ssd import scan as torch_scan
from .ssd import scan_step as torch_scan_step
from .ssd import under_func

try:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
except ImportError:
    causal_conv1d_fn = causal_conv1d_update = None
try:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    rmsnorm_fn = selective_state_update = mamba_chunk_scan_combined = None

logger = logging.get_logger(__name__)

INSTALL = "pip install --no-build-isolation mamba-ssm causal-conv1d"
AUTO_TAKES_OURS = False
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STEP_DTYPES = (torch.float32, torch.bfloat16)  # of what numba_run.py reads; it computes in fp32
COMPILING_SECONDS = 5  # reading compiled code takes less
CONV_TAPS = (2, 3, 4)  # widths of causal_conv1d's kernels and of ours
CONV_ALIGNMENT = 8  # channels; causal_conv1d loads this many at once, rows must start at multiples of it
MOST_HEAD_DIM = 256  # of an attention head, and of a Mamba head in our scan
NORM_GROUP_BYTES = 65536  # largest group that one program of rmsnorm_fn holds


def available() -> dict[str, bool]:
    """Which kernel packages can be imported."""
    return {"causal_conv1d": causal_conv1d_fn is not None, "mamba_ssm": mamba_chunk_scan_combined is not None}


def check_implementation(implementation: str) -> None:
    """Refuse "kernels" where they are not installed, and "triton" where Triton is not.

    Raises:
        ImportError: naming the missing packages and how to install them.
        ValueError: for an unknown implementation.
    """
    if implementation not in ("auto", "torch", "kernels", "triton"):
        raise ValueError(f"mamba_implementation={implementation!r}: allowed are auto, torch, kernels, triton")
    missing = [name for name, there in available().items() if not there]
    if implementation == "kernels" and missing:
        raise ImportError(f"mamba_implementation='kernels' needs {' and '.join(missing)}; {INSTALL}")
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError("mamba_implementation='triton' needs triton, which comes with PyTorch for CUDA")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    implementation: str,
) -> Tensor:
    """`ssd.causal_conv`."""
    taps = weight.shape[1]
    if _ours(
        x, implementation, None if taps in CONV_TAPS else f"our convolution takes 2 to 4 taps, conv_kernel={taps}"
    ):
        from .triton_conv import causal_conv as triton_causal_conv  # Triton is imported only when it is asked for

        return triton_causal_conv(x, weight, bias, initial_state, seq_idx)
    obstacle = _conv_obstacle(weight)
    if initial_state is not None and seq_idx is not None:
        obstacle = "causal_conv1d takes a state or documents, not both at once"
    if not _use("causal_conv1d", x, implementation, obstacle):
        return torch_causal_conv(x, weight, bias, initial_state, seq_idx)
    before = None
    if initial_state is not None:
        before = _rows(initial_state[..., 1:].transpose(1, 2).to(x.dtype)).transpose(1, 2)
    documents = None if seq_idx is None else seq_idx.int().contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    out = causal_conv1d_fn(_rows(x).transpose(1, 2), weight.to(x.dtype), bias, documents, before, activation="silu")
    return out.transpose(1, 2)


def conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """`ssd.conv_step`."""
    if _ours(x, implementation, _no_backward("the Triton kernel of a step", x, state, weight)):
        from .triton_conv import conv_step as triton_conv_step

        return triton_conv_step(x, state, weight, bias)
    obstacle = _conv_obstacle(weight) or _no_backward("causal_conv1d_update", x, state, weight)
    if not _use("causal_conv1d", x, implementation, obstacle):
        return torch_conv_step(x, state, weight, bias)
    after = state.to(x.dtype, copy=True)  # updated in place by the kernel, which wants it in x's dtype
    bias = None if bias is None else bias.to(x.dtype)
    out = causal_conv1d_update(x.contiguous(), after, weight.to(x.dtype), bias, activation="silu")
    return out, after.to(state.dtype)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan`; from the kernels y comes in x's dtype."""
    too_wide = f"head_dim is {x.shape[-1]}, the most is {MOST_HEAD_DIM}" if x.shape[-1] > MOST_HEAD_DIM else None
    if _ours(x, implementation, too_wide):
        from .triton_scan import scan as triton_scan

        return triton_scan(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)
    if implementation == "auto" and runs_compiled(x, dt, A, B, C, D, initial_state):
        return compiled_scan().scan(x, dt, A, B, C, D, initial_state, seq_idx)
    if not _use("mamba_ssm", x, implementation, None):
        return torch_scan(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)
    # The kernel takes the initial state for that of document 0.
    documents = None if seq_idx is None else (seq_idx - seq_idx[:, :1]).int().contiguous()
    return mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D.float(),
        initial_states=initial_state,
        seq_idx=documents,
        return_final_states=True,
    )


def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """`ssd.scan_step`, which updates the state in place as well; from the kernel y comes in x's dtype."""
    if _ours(x, implementation, _no_backward("the Triton kernel of a step", x, dt, A, B, C, D, state)):
        from .triton_decode import scan_step as triton_scan_step

        return triton_scan_step(x, dt, A, B, C, D, state)
    if not _use("mamba_ssm", x, implementation, _no_backward("selective_state_update", x, dt, A, B, C, D, state)):
        return torch_scan_step(x, dt, A, B, C, D, state)
    p, n = state.shape[2:]
    # Zero strides over head_dim and state tell the kernel that a head has one step size, decay and bias. The bias is
    # zero, as dt has its own already; without one mamba_ssm 2.3 asks None for its stride.
    y = selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, p),
        A[:, None, None].expand(-1, p, n),
        B,
        C,
        D.float()[:, None].expand(-1, p),
        dt_bias=torch.zeros_like(A)[:, None].expand(-1, p),
    )
    return y, state


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float, implementation: str) -> Tensor:
    """`ssd.gated_norm`."""
    if _ours(x, implementation):
        from .triton_norm import gated_norm as triton_gated_norm

        return triton_gated_norm(x, gate, weight, group_size, eps)
    obstacle = None
    if group_size * x.element_size() > NORM_GROUP_BYTES:
        obstacle = (
            f"rmsnorm_fn takes groups up to {NORM_GROUP_BYTES} bytes, this one has {group_size} values of {x.dtype}"
        )
    if not _use("mamba_ssm", x, implementation, obstacle):
        return torch_gated_norm(x, gate, weight, group_size, eps)
    out = rmsnorm_fn(x, weight, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)
    return out.to(gate.dtype)


def fuses_step(
    x: Tensor, states: tuple[Tensor, Tensor], weights: tuple[Tensor | None, ...], implementation: str
) -> bool:
    """Whether `whole_step` can compute a whole layer's token: it reads the weights (some may be None) itself."""
    weights = [weight for weight in weights if weight is not None]
    if torch.is_grad_enabled() or any(weight.device != x.device for weight in weights):  # offloaded: modules bring them
        return False
    if implementation != "auto" or x.is_cuda:
        return _ours(x, implementation)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = all(t.dtype in STEP_DTYPES and type(t) in (Tensor, nn.Parameter) for t in (x, *states, *weights))
    held = states[1].dtype == torch.float32 and states[1].is_contiguous()
    return plain and held and not under_func() and compiled_loops() is not None


def whole_step(
    projected: Tensor,
    states: tuple[Tensor, Tensor],
    conv: tuple[Tensor, Tensor | None],
    heads: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor, float],
    groups: int,
    limit: tuple[float, float],
    implementation: str,
) -> Tensor:
    """in_proj's output -> out_proj's input, both states updated in place; ask `fuses_step` first. `step` of triton_decode.py
    or numba_run.py."""
    if implementation == "auto" and not projected.is_cuda:
        step = compiled_loops().step
    else:
        from .triton_decode import step
    return step(projected, *states, conv, heads, norm, groups, limit)


def runs_compiled(*tensors: Tensor | None) -> bool:
    """Whether compiled loops can read these: on a CPU with Numba, fp32 or bf16, no subclass, nothing traced, no gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or under_func():
        return False
    if torch._C._len_torch_dispatch_stack():  # a counter of operations, or whoever else wants to see them
        return False
    given = [t for t in tensors if t is not None]
    plain = all(t.device.type == "cpu" and t.dtype in STEP_DTYPES and type(t) in (Tensor, nn.Parameter) for t in given)
    return plain and given[0].numel() > 0 and compiled_scan() is not None


@cache
def compiled_loops() -> ModuleType | None:
    """numba_run.py; None without Numba. The first import on a machine compiles."""
    with _tells_of_compiling("single tokens"):
        try:
            from .numba_run import __name__ as name  # transformers' loader of remote code reads no `from . import`
        except ImportError:
            return None
    return sys.modules[name]


@cache
def compiled_scan() -> ModuleType | None:
    """numba_scan.py; None without Numba. The first import on a machine compiles."""
    with _tells_of_compiling("sequences"):
        try:
            from .numba_scan import __name__ as name
        except ImportError:
            return None
    return sys.modules[name]


@contextmanager
def _tells_of_compiling(what: str) -> Iterator[None]:
    start = time.thread_time()
    yield
    if (seconds := time.thread_time() - start) > COMPILING_SECONDS:
        logger.warning(f"Numba has compiled the loops for {what} in {seconds:.0f} s; they are kept on disk")


def attends_in_triton(x: Tensor, head_dim: int, implementation: str) -> bool:
    """Whether triton_attention.py takes the attention of one token per row: without gradients, on a GPU, unless told not to."""
    if not takes_ours(implementation) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    runs = x.is_cuda or (implementation == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    return runs and x.dtype in KERNEL_DTYPES and head_dim <= MOST_HEAD_DIM and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton, which comes with PyTorch for CUDA, is installed."""
    return importlib.util.find_spec("triton") is not None


def takes_ours(implementation: str) -> bool:
    """Whether our Triton kernels are asked for."""
    return implementation == "triton" or (implementation == "auto" and AUTO_TAKES_OURS)


def has_kernels_for(x: Tensor, implementation: str) -> bool:
    """Whether a stretch of tokens would run on our kernels outside torch.compile, which does not look into them."""
    return takes_ours(implementation) and x.is_cuda and x.dtype in KERNEL_DTYPES and has_triton()


def _ours(x: Tensor, implementation: str, obstacle: str | None = None) -> bool:
    """Whether this call runs on the Triton kernels of this folder."""
    if implementation == "auto":
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or under_func()
        fits = x.is_cuda and obstacle is None and x.dtype in KERNEL_DTYPES and not traced
        return AUTO_TAKES_OURS and fits and has_triton()
    if implementation != "triton":
        return False
    check_implementation(implementation)
    if x.dtype not in KERNEL_DTYPES:
        obstacle = f"there are no kernels for {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = f"the kernels run on CUDA tensors, this one is on {x.device}"
    if obstacle:
        raise RuntimeError(f"mamba_implementation='triton': {obstacle}; 'torch' runs such calls")
    return True


def _use(package: str, x: Tensor, implementation: str, obstacle: str | None) -> bool:
    """Whether this call runs on `package`'s kernels. `obstacle` says why they cannot do it, None that they can."""
    if implementation == "torch" or (implementation == "auto" and not x.is_cuda):
        return False
    if x.dtype not in KERNEL_DTYPES:
        obstacle = f"{package} has no kernels for {x.dtype}"
    if implementation == "kernels":
        check_implementation(implementation)
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            obstacle = f"the kernels run on CUDA tensors, this one is on {x.device}"
        if obstacle:
            raise RuntimeError(f"mamba_implementation='kernels': {obstacle}; 'auto' runs such calls in PyTorch")
        return True
    if not available()[package]:
        obstacle = f"{package} is not installed: {INSTALL}"
    if obstacle and not torch.compiler.is_compiling():
        logger.warning_once(f"A Mamba op runs on the slower PyTorch path: {obstacle}")
    return obstacle is None


def _conv_obstacle(weight: Tensor) -> str | None:
    """What causal_conv1d cannot do with these taps (d, k)."""
    channels, taps = weight.shape
    if taps not in CONV_TAPS:
        return f"causal_conv1d takes 2 to 4 taps, conv_kernel={taps}"
    if channels % CONV_ALIGNMENT:
        return f"causal_conv1d takes channels in multiples of {CONV_ALIGNMENT}, there are {channels}"
    return None


def _no_backward(kernel: str, *inputs: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return f"{kernel} has no backward pass; decode under torch.no_grad()"
    return None


def _rows(x: Tensor) -> Tensor:
    """(b, l, d) with every row of d channels contiguous and aligned, as causal_conv1d loads them."""
    aligned = all(start % CONV_ALIGNMENT == 0 for start in (x.stride(0), x.stride(1), x.storage_offset()))
    # `contiguous` would return a single unaligned row as it is
    return x if aligned and x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)
