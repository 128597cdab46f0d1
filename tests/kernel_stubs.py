"""Lets the kernel packages run on CPU tensors, to test the kernel path without a GPU.

mamba_ssm's kernels are written in Triton, whose interpreter (TRITON_INTERPRET=1, set before anything imports triton)
runs them on CPU tensors unchanged. causal_conv1d's are compiled CUDA: here its binary module alone is replaced, by the
arithmetic below, which refuses what the binary refuses; the package's own Python (signatures, layouts, autograd) runs.

    b batch, d channels, l length, k taps
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("triton", "einops", "mamba_ssm", "causal_conv1d")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def why_not() -> str | None:
    """Why the kernels cannot be run here, or None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: `make test-kernels`"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "needs TRITON_INTERPRET=1: `make test-kernels`"


def load() -> dict[str, object]:
    """Import the packages on a machine without CUDA: the five functions that `kernels.py` takes from them."""
    conv = types.ModuleType("causal_conv1d_cuda")
    conv.causal_conv1d_fwd, conv.causal_conv1d_bwd, conv.causal_conv1d_update = conv_forward, conv_backward, conv_update
    binaries = {"causal_conv1d_cuda": conv, "selective_scan_cuda": types.ModuleType("selective_scan_cuda")}
    for name, module in binaries.items():
        sys.modules.setdefault(name, module)
    functions = {
        "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
        "mamba_ssm.ops.triton.layernorm_gated": ("rmsnorm_fn",),
        "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
        "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined",),
    }
    loaded = {
        name: vars(importlib.import_module(module))[name] for module, names in functions.items() for name in names
    }
    _keep_first_configurations()
    return loaded


@contextlib.contextmanager
def pretend_device():
    """The two calls to the CUDA runtime that the Triton launchers make, without a CUDA runtime."""
    device, properties = torch.cuda.device, torch.cuda.get_device_properties
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(multi_processor_count=4)
    try:
        yield
    finally:
        torch.cuda.device, torch.cuda.get_device_properties = device, properties


def _keep_first_configurations() -> None:
    """Choosing among block sizes needs a GPU's clock."""
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("mamba_ssm.ops.triton"):
            for kernel in vars(module).values():
                if isinstance(kernel, Autotuner):
                    del kernel.configs[1:]


# The binary module of causal_conv1d


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states_out: Tensor | None,
    silu: bool,
) -> None:
    """Writes `out` (b, d, l)."""
    _check_inputs(x, weight, bias, seq_idx, initial_states)
    total = _weighted(_windows(x, weight.shape[1], seq_idx, initial_states), weight, bias)
    out.copy_(F.silu(total) if silu else total)


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
    silu: bool,
) -> None:
    """Writes `dx` and adds to `dweight`, `dbias`."""
    _check_inputs(x, weight, bias, seq_idx, initial_states)
    _check(dout.stride(1) != 1 or (dout.stride(2) % 8 == 0 and dout.stride(0) % 8 == 0), "dout strides of 8")
    _check(dx.stride(1) == 1 and dweight.dtype == torch.float32, "dx channels last, dweight fp32")
    _check(dfinal_states is None and dinitial_states is None, "the tests need no gradients of states")
    length, taps = x.shape[2], weight.shape[1]
    windows = _windows(x, taps, seq_idx, initial_states)
    grad = dout.double()
    if silu:
        total = _weighted(windows, weight, bias)
        gate = torch.sigmoid(total)
        grad = grad * gate * (1 + total * (1 - gate))
    dweight += torch.einsum("bdlk,bdl->dk", windows, grad)
    if dbias is not None:
        dbias += grad.sum((0, 2))
    into_windows = grad[..., None] * weight.double()[:, None] * _same_document(seq_idx, taps, x)
    padded = grad.new_zeros(*x.shape[:2], length + taps - 1)
    for tap in range(taps):
        padded[..., tap : tap + length] += into_windows[..., tap]
    dx.copy_(padded[..., taps - 1 :])


def conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    """One token, x (b, d, 1): writes `out` (b, d, 1) and shifts `conv_state` (b, d, k or more) in place."""
    _check(x.dtype in FLOATS and weight.dtype in FLOATS, "dtypes")
    _check(conv_state.dtype == x.dtype, "the state in x's dtype")
    _check(2 <= weight.shape[1] <= 4, "2 to 4 taps")
    _check(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "bias in the weight's dtype")
    _check(conv_state.shape[:2] == x.shape[:2] and conv_state.shape[2] >= weight.shape[1] - 1, "shape of the state")
    _check(x.shape[2] == 1 and cache_seqlens is None and conv_state_indices is None, "the tests go token by token")
    window = torch.cat([conv_state, x], dim=-1)
    total = _weighted(window[..., None, -weight.shape[1] :].double(), weight, bias)
    out.copy_(F.silu(total) if silu else total)
    conv_state.copy_(window[..., 1:])


def _check(fits: bool, demand: str) -> None:
    if not fits:
        raise RuntimeError(f"causal_conv1d demands: {demand}")


def _check_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None
) -> None:
    """The checks of the binary module in versions 1.5 to 1.7, and the alignment that its 16-byte loads need."""
    (b, d, l), taps = x.shape, weight.shape[1]
    _check(x.dtype in FLOATS and weight.dtype in FLOATS, "dtypes")
    _check(weight.shape[0] == d and 2 <= taps <= 4, "2 to 4 taps")
    _check(x.stride(1) == 1 and x.stride(2) > 1, "channels last, for documents and states")
    _check(d % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "channels and strides in multiples of 8")
    _check(x.storage_offset() % 8 == 0, "an aligned start")
    _check(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "bias in the weight's dtype")
    if seq_idx is not None:
        _check(
            seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (b, l), "seq_idx int32 (b, l)"
        )
        _check(initial_states is None, "documents or a state, not both (1.5)")
    if initial_states is not None:
        _check(initial_states.dtype == x.dtype and initial_states.shape == (b, d, taps - 1), "a state in x's dtype")
        _check(
            initial_states.stride(1) == 1 and initial_states.storage_offset() % 8 == 0, "an aligned channels-last state"
        )
        _check(
            initial_states.stride(0) % 8 == 0 and initial_states.stride(2) % 8 == 0, "an aligned channels-last state"
        )


def _windows(x: Tensor, taps: int, seq_idx: Tensor | None, initial_states: Tensor | None) -> Tensor:
    """(b, d, l, k) in float64: what each tap of each position sees."""
    before = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states
    windows = torch.cat([before, x], dim=-1).double().unfold(-1, taps, 1)
    return windows * _same_document(seq_idx, taps, x)


def _same_document(seq_idx: Tensor | None, taps: int, x: Tensor) -> Tensor:
    """(b, 1, l, k) whether a tap stays in its position's document."""
    if seq_idx is None:
        return torch.ones(1, 1, 1, taps, dtype=torch.bool)
    documents = F.pad(seq_idx, (taps - 1, 0), value=-1).unfold(-1, taps, 1)
    return (documents == seq_idx[..., None])[:, None]


def _weighted(windows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    total = (windows * weight.double()[:, None]).sum(-1)
    return total if bias is None else total + bias.double()[:, None]
