"""megatron-core's own vision towers and projector, on a CPU: they load what is written, all layers as one stack, and see the same.

pip install --no-deps megatron-core psutil einops

The towers, their layers, the projector and the loading are megatron-core's. Layer scaling, which lies in Megatron-LM's examples
and not in the package, is added to its layer here; Transformer Engine's norm is replaced by megatron-core's own.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from megatron_stubs import on_cpu, process_group
from nemotron_h_hf.conversion import convert
from test_conversion_vision import SIDES, TOWERS
from torch import nn
from vl_tiny import tiles, vl_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def group():
    for name in ("megatron.core", "psutil", "einops"):  # without psutil its writer waits for ever
        pytest.importorskip(name)
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    with process_group():
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # leaves the generators alone
        yield


def settings(model, **fields):
    """megatron-core's configuration of the tower, in float32."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    tower = model.config.vision_config
    given = {
        "num_layers": tower.num_hidden_layers, "hidden_size": tower.hidden_size, "ffn_hidden_size": 64,
        "num_attention_heads": tower.num_attention_heads, "layernorm_epsilon": 1e-6, "normalization": "LayerNorm",
        "activation_func": nn.functional.gelu, "add_bias_linear": True, "add_qkv_bias": True, "gated_linear_unit": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": torch.float32, "use_cpu_initialization": True,
        "persist_layer_norm": False, "gradient_accumulation_fusion": False, "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**{**given, **fields})


def layers(scaled: bool):
    """The specification of a layer: local, its norms under Transformer Engine's names unless it is InternViT's."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    class Scaled(TransformerLayer):
        def __init__(self, *words, **named):
            super().__init__(*words, **named)
            for place, name in (("self_attn_bda", "ls1"), ("mlp_bda", "ls2")):
                setattr(self, name, nn.Parameter(torch.ones(self.config.hidden_size)))
                setattr(self, place, partial(scaled_add, self, name))

    def scaled_add(layer, name, training, fused):
        def add(x_with_bias, residual, probability):
            x, bias = x_with_bias
            return residual + (x if bias is None else x + bias) * getattr(layer, name)

        return add

    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return ModuleSpec(
        module=Scaled if scaled else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.no_mask}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=ModuleSpec(
                MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if scaled else fused,
        ),
    )


def load(module: nn.Module, prefix: str, folder) -> nn.Module:
    """Weights of a checkpoint; anything not loaded stays NaN."""
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(torch.nan)
    sharded = module.sharded_state_dict(prefix=prefix)
    state = dist_checkpointing.load(
        {name: it for name, it in sharded.items() if "_extra_state" not in name}, str(folder)
    )
    named = {name.removeprefix(prefix): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    missing, unexpected = module.load_state_dict(named, strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing)
    return module.eval()


@pytest.mark.parametrize("kind", ["internvit", "radio"])
def test_the_tower_sees_the_same(kind, tmp_path):
    """RADIO's tile is as large as its table of positions: 0.16 interpolates the table with aligned corners, later ones without."""
    side = SIDES[kind] if kind == "internvit" else TOWERS[kind]["max_img_size"]
    model = vl_model(vision_config=TOWERS[kind], image_size=side)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", vocab_divisible_by=8)
    tower, pixels = model.config.vision_config, tiles(2, side=side)
    same = mock.patch.object(torch.Tensor, "cuda", lambda tensor, *words, **named: tensor)
    with on_cpu(), same, torch.no_grad():
        if kind == "internvit":
            from megatron.core.models.vision.clip_vit_model import CLIPViTModel

            theirs = CLIPViTModel(
                settings(model), layers(scaled=True), patch_dim=7, img_h=28, img_w=28, model_subtype="internvit"
            )
        else:
            from megatron.core.activations import fast_gelu
            from megatron.core.models.vision.radio import RADIOViTModel

            config = settings(model, ffn_hidden_size=128, activation_func=fast_gelu)
            theirs = RADIOViTModel(
                config, layers(scaled=False), patch_dim=8, img_h=side, img_w=side, max_img_h=64, max_img_w=64,
                class_token_len=tower.num_cls_tokens + tower.num_registers,
            )  # fmt: skip
        load(theirs, "vision_model.", tmp_path / "run" / "release")
        found = theirs(pixels)
        expected = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_the_projector_projects_the_same(tmp_path):
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    model = vl_model(vision_config=TOWERS["internvit"])
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", vocab_divisible_by=8)
    config = settings(
        model, hidden_size=48, ffn_hidden_size=40, add_bias_linear=False, add_qkv_bias=False,
        activation_func=lambda x: nn.functional.relu(x).square(),
    )  # fmt: skip
    with on_cpu(), torch.no_grad():
        theirs = MultimodalProjector(
            config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), "mlp", 128
        )
        load(theirs, "vision_projection.", tmp_path / "run" / "release")
        patches, own = (
            torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(0)),
            model.model.multi_modal_projector,
        )
        torch.testing.assert_close(theirs(own.layer_norm(patches)), own(patches), atol=2e-5, rtol=1e-5)
