"""Chooses, per call, who computes an op of a Mamba layer: the CUDA kernels of mamba_ssm and causal_conv1d, or `ssd.py`.

"auto" takes the kernels where the tensor is on an NVIDIA GPU and the packages are installed, op by op; "torch" never does;
"kernels" insists on them and raises where they cannot run. Every function here has the signature and the result of its
namesake in `ssd.py`. Only ops are replaced, never a module: the kernels that swallow `out_proj` are not used, because they
read its weight past LoRA, quantised and FP8 layers.
"""

import os

import torch
from torch import Tensor
from transformers.utils import logging

from .ssd import causal_conv as torch_causal_conv
from .ssd import conv_step as torch_conv_step
from .ssd import gated_norm as torch_gated_norm
from .ssd import scan as torch_scan
from .ssd import scan_step as torch_scan_step


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


def available() -> dict[str, bool]:
    """Which kernel packages can be imported."""
    return {"causal_conv1d": causal_conv1d_fn is not None, "mamba_ssm": mamba_chunk_scan_combined is not None}


def check_implementation(implementation: str) -> None:
    """Refuse "kernels" where they are not installed, or have no device to run on.

    Raises:
        ImportError: naming the missing packages and how to install them.
        ValueError: for an unknown implementation.
    """
    if implementation not in ("auto", "torch", "kernels"):
        raise ValueError(f"mamba_implementation={implementation!r}: allowed are auto, torch, kernels")
    missing = [name for name, there in available().items() if not there]
    if implementation == "kernels" and missing:
        raise ImportError(f"mamba_implementation='kernels' needs {' and '.join(missing)}; {INSTALL}")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    implementation: str,
) -> Tensor:
    """`ssd.causal_conv`; the kernel cannot take a state and documents at once, which then runs in PyTorch."""
    both = initial_state is not None and seq_idx is not None
    if both or not _use("causal_conv1d", x, implementation):
        return torch_causal_conv(x, weight, bias, initial_state, seq_idx)
    before = None if initial_state is None else _channels_last(initial_state[..., 1:].to(x.dtype))
    documents = None if seq_idx is None else seq_idx.int().contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    out = causal_conv1d_fn(
        _channels_last(x.transpose(1, 2)), weight.to(x.dtype), bias, documents, before, activation="silu"
    )
    return out.transpose(1, 2)


def conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """`ssd.conv_step`."""
    if not _use("causal_conv1d", x, implementation):
        return torch_conv_step(x, state, weight, bias)
    state = state.clone()
    bias = None if bias is None else bias.to(x.dtype)
    out = causal_conv1d_update(x.contiguous(), state, weight.to(x.dtype), bias, activation="silu")
    return out, state


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
    """`ssd.scan`; y comes in x's dtype."""
    if not _use("mamba_ssm", x, implementation):
        return torch_scan(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)
    # The kernel takes the initial state for that of document 0.
    documents = None if seq_idx is None else (seq_idx - seq_idx[:, :1]).int().contiguous()
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D.float(), initial_states=initial_state, seq_idx=documents, return_final_states=True
    )


def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """`ssd.scan_step`."""
    if not _use("mamba_ssm", x, implementation) or torch.is_grad_enabled():
        return torch_scan_step(x, dt, A, B, C, D, state)
    state = state.clone()
    p, n = state.shape[2:]
    # zero strides over head_dim and state tell the kernel that a head has one step size, decay and skip
    y = selective_state_update(
        state, x, dt[..., None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n), B, C, D.float()[:, None].expand(-1, p)
    )
    return y, state


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float, implementation: str) -> Tensor:
    """`ssd.gated_norm`."""
    if not _use("mamba_ssm", x, implementation):
        return torch_gated_norm(x, gate, weight, group_size, eps)
    out = rmsnorm_fn(x, weight, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)
    return out.to(gate.dtype)


def _use(package: str, x: Tensor, implementation: str) -> bool:
    """Whether this call runs on `package`'s kernels."""
    if implementation == "torch":
        return False
    there = available()[package]
    can_run = x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    if implementation == "kernels":
        check_implementation(implementation)
        if not can_run:
            raise RuntimeError(f"mamba_implementation='kernels' runs on CUDA tensors, this one is on {x.device}")
        return True
    if x.is_cuda and not there:
        logger.warning_once(f"{package} is not installed: Mamba layers run on the slower PyTorch path. {INSTALL}")
    return x.is_cuda and there


def _channels_last(x: Tensor) -> Tensor:
    """(b, d, l) with d contiguous, the layout that the convolution kernel needs for states and documents."""
    return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
