"""Lets megatron-core's own hybrid model run on a CPU: stand-ins for the little of it that needs CUDA.

The model, its layers, its specification and its checkpointing are megatron-core's. Replaced are two functions of
mamba_ssm (written here as loops over the tokens), the norm of Transformer Engine (by megatron-core's own wrapper of
torch's), its linear layer around the experts of a latent MoE, and three in-place Triton kernels of dynamic inference,
which nothing here calls.

    b batch, l length, h heads, p head dimension, g groups, n state
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import socket
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRITON_KERNELS = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A gloo group of one process, with Megatron's groups on top."""
    from megatron.core import parallel_state

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(args: Namespace, rows: int, fused_norms: bool = True) -> nn.Module:
    """megatron-core's MambaModel in float32 with these training arguments and this many rows of vocabulary.

    `fused_norms` names the norms in a checkpoint as Transformer Engine does, as part of the layer that follows.
    """
    specs = _modules()
    from megatron.core.models.mamba import MambaModel
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    initialize_rng_tracker(inference_rng_tracker=True)  # Megatron's own, which leaves the generators alone
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    given |= {
        "num_moe_experts": vars(args).get("num_experts"),
        "activation_func": _squared_relu,
        "bf16": False,
        "fp16": False,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "use_mamba_mem_eff_path": False,
        "persist_layer_norm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
    }
    with on_cpu():
        model = MambaModel(
            config=TransformerConfig(**given),
            mamba_stack_spec=specs.get_mamba_stack_modelopt_spec(
                local_core_attention=True, remap_te_layernorm=fused_norms
            ),
            vocab_size=rows,
            max_sequence_length=args.max_position_embeddings,
            hybrid_override_pattern=args.hybrid_override_pattern or args.hybrid_layer_pattern.split("/")[0],
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
    return model.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(b, l, rows) of a model that `build` made; causal, with no padding."""
    b, l = ids.shape
    hidden = torch.ones(l, l, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad(), on_cpu():
        return model(ids, torch.arange(l).expand(b, l), hidden)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Where Megatron asks for the current device, it is told the CPU, which it need not wait for."""
    with mock.patch.multiple(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda: None):
        yield


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _modules() -> types.ModuleType:
    """The module of megatron-core that has the specification, with the stand-ins in place."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    parts = {name: types.ModuleType(name) for name in names}
    norm, scan = (types.ModuleType(f"{names[2]}.{name}") for name in ("layernorm_gated", "ssd_combined"))
    norm.RMSNorm = GatedRMSNorm
    scan.mamba_chunk_scan_combined, scan.mamba_split_conv1d_scan_combined = chunk_scan, None
    kernels = types.ModuleType(TRITON_KERNELS)
    kernels.tensor_get_slice_after = kernels.tensor_masked_update = kernels.tensor_merge = None
    parts |= {module.__name__: module for module in (norm, scan, kernels)}
    replaced = {name: sys.modules.get(name) for name in parts}
    sys.modules.update(parts)
    try:
        mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")
        specs = importlib.import_module("megatron.core.post_training.modelopt.mamba.model_specs")
    finally:  # others ask whether mamba_ssm is installed
        for name, module in replaced.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    from megatron.core.ssm import mamba_block
    from megatron.core.transformer.moe import moe_layer, moe_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    mixer.causal_conv1d_fn = mixer.causal_conv1d_update = None  # the mixer's own torch path, installed or not
    specs.Norm = mamba_block.TENorm = WrappedTorchNorm
    moe_layer.TELinear, moe_layer.HAVE_TE = Linear, True
    moe_utils.te_general_gemm = None  # torch.mm then; 0.16.1 asks for this name without having it
    return specs


class GatedRMSNorm(nn.Module):
    """In the place of mamba_ssm's: the gate first, then the norm over each group of channels."""

    def __init__(
        self, size: int, eps: float, group_size: int, norm_before_gate: bool, device: object, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and z (..., size)."""
        groups = (x * z * torch.sigmoid(z)).unflatten(-1, (-1, self.group_size))
        mean = groups.square().mean(-1, keepdim=True)
        return (groups / (mean + self.eps).sqrt()).flatten(-2) * self.weight


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor, dt_bias: Tensor, **others
) -> Tensor:
    """In the place of mamba_ssm's: the recurrence, token after token.

    x (b, l, h, p), dt (b, l, h), A, D and dt_bias (h,), B and C (b, l, g, n); returns (b, l, h, p)
    """
    assert others.pop("dt_softplus") and not any(value is not None and value is not False for value in others.values())
    heads = x.shape[2] // B.shape[2]
    dt = torch.log1p(torch.exp(dt + dt_bias))
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])  # (b, h, p, n)
    outputs = []
    for t in range(x.shape[1]):
        b, c = (part[:, t].repeat_interleave(heads, 1)[:, :, None] for part in (B, C))  # (b, h, 1, n)
        step = dt[:, t, :, None, None]
        state = state * torch.exp(step * A[:, None, None]) + step * b * x[:, t, :, :, None]
        outputs.append((state * c).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1)


class Linear(nn.Linear):
    """In the place of Transformer Engine's, around the experts of a latent MoE: a weight that all ranks have."""

    def __init__(self, input_size: int, output_size: int, **others: object) -> None:
        assert not others["bias"] and others["parallel_mode"] == "duplicated"
        super().__init__(input_size, output_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (..., input_size)."""
        return super().forward(x), None
