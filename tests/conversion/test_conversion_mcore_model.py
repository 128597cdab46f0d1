"""megatron-core's own model, on a CPU: it loads what is written and gives the same logits, and what it saves is read.

pip install --no-deps megatron-core psutil einops

Not run here: its Transformer Engine and Triton kernels (CUDA only), other parallel sizes than one, and multi-token
prediction, whose tensors 0.16 leaves in the file and this package's forward does not use either.
"""

from __future__ import annotations

import re
from argparse import Namespace

import pytest
import torch
from megatron_fixtures import FIXTURES
from megatron_stubs import build, logits, on_cpu, process_group
from nemotron_h_hf.conversion import convert, write_megatron
from tiny import prompt, tiny_model

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.checkpoint import save
from nemotron_h_hf.model.weights import Checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 5e-6  # of the largest logit; measured: up to 8e-7, with one tensor's rows moved 0.09 and more
# In groups of experts the choice is the same where Megatron, too, takes the best two of each: 4 experts of 2 groups.
GROUPS = {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
TINY = {
    "dense": {"mlp_bias": True, "attention_bias": True}, "square": {"tie_word_embeddings": True}, "moe": {}, "latent": GROUPS,
}  # fmt: skip
# What a training run of 0.16 notes of these models, in its own spelling
ARGS = {
    "num_layers": 7, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 2,
    "mamba_state_dim": 16, "hybrid_override_pattern": "M-M*-M-", "vocab_size": 97, "padded_vocab_size": 112,
    "max_position_embeddings": 4096, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "add_bias_linear": False,
    "squared_relu": True, "swiglu": False, "untie_embeddings_and_output_weights": True, "num_experts": None,
    "position_embedding_type": "none",
}  # fmt: skip
EXPERTS = {
    "num_layers": 6, "hybrid_override_pattern": "MEM*EM", "num_experts": 8, "moe_router_topk": 3,
    "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40, "moe_router_topk_scaling_factor": 2.5,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_pre_softmax": False,
}  # fmt: skip
TRAINED = {
    "dense": ARGS,
    "tied": ARGS | {"untie_embeddings_and_output_weights": False, "add_bias_linear": True},
    "moe": ARGS | EXPERTS,
    "latent": ARGS | EXPERTS | {
        "moe_latent_size": 32, "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group():
    for name in ("megatron.core", "psutil", "einops"):  # without psutil its writer waits for ever
        pytest.importorskip(name)
    with process_group():
        yield


def load(folder) -> torch.nn.Module:
    """The model of a checkpoint's own arguments with its weights; anything not loaded stays NaN."""
    from megatron.core import dist_checkpointing

    args = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    return fill(build(args, args.padded_vocab_size), folder)


def fill(model: torch.nn.Module, folder) -> torch.nn.Module:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(torch.nan)
    strict = StrictHandling.RETURN_ALL
    state, unused, absent = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict=strict)
    assert not absent
    assert all(key.startswith("mtp.") or key.endswith("_extra_state") for key in unused), unused
    for key in ("args", "checkpoint_version", "iteration"):
        del state[key]
    model.load_state_dict(state)
    return model


def ours(folder, ids: torch.Tensor) -> torch.Tensor:
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def difference(model: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest logit."""
    found = logits(model, ids)[..., : expected.shape[-1]]
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["dense_nemo2", "moe_t1p1e2_torch", "super19_t1p1_torch_dist"])
def test_logits_of_real_checkpoints(name, tmp_path):
    """To Hugging Face and back to Megatron: the logits that Megatron recorded of the original."""
    fixture = FIXTURES[name]
    convert(fixture.path, tmp_path / "hf")
    write_megatron(tmp_path / "hf", tmp_path / "run", max_shard_size="100KB")
    recorded = torch.load(fixture.root / fixture.row["logits"], weights_only=True)
    model = load(tmp_path / "run" / "release")
    assert difference(model, recorded["input_ids"], recorded["logits_fp32"]) < TOLERANCE
    assert difference(model, recorded["input_ids"], ours(tmp_path / "hf", recorded["input_ids"])) < TOLERANCE


@pytest.mark.parametrize("shape", TINY)
def test_logits_of_our_models(shape, tmp_path):
    """Weights that hide nothing, tied embeddings, groups of experts, a vocabulary that is padded."""
    tiny_model(shape, **TINY[shape]).save_pretrained(tmp_path / "hf")
    write_megatron(tmp_path / "hf", tmp_path / "run", vocab_divisible_by=16)
    ids = prompt(2, 24)
    assert difference(load(tmp_path / "run" / "release"), ids, ours(tmp_path / "hf", ids)) < TOLERANCE


def kind(name: str, pattern: str) -> str:
    """A tensor's name with the letter of its layer instead of the number, and of any expert."""
    name = re.sub(r"^backbone\.layers\.(\d+)", lambda layer: pattern[int(layer[1])], name)
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_rows_in_another_order_show(shape, tmp_path):
    """The comparison fails when the rows of any one tensor are moved by one: right names, shapes and values."""
    tiny_model(shape, **TINY[shape]).save_pretrained(tmp_path / "hf")
    source, ids = Checkpoint(tmp_path / "hf"), prompt(2, 24)
    expected = ours(tmp_path / "hf", ids)
    write_megatron(tmp_path / "hf", tmp_path / "run")
    model = load(tmp_path / "run" / "release")
    assert difference(model, ids, expected) < TOLERANCE
    kinds = {kind(name, TRAINED[shape]["hybrid_override_pattern"]): name for name in source}
    kinds.pop("*.mixer.k_proj.bias", None)  # adds the same to all of a query's scores, so the softmax is blind to it
    assert len(kinds) > 20
    specs = [source.spec(name) for name in source]
    for number, name in enumerate(kinds.values()):
        folder = tmp_path / str(number)
        save(folder, specs, ((key, source[key].roll(1, 0) if key == name else source[key]) for key in source))
        (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
        write_megatron(folder, folder / "run")
        assert difference(fill(model, folder / "run" / "release"), ids, expected) > 0.05, name


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough for every tensor to show in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            values = torch.randn(tensor.shape, generator=generator)
            scale = 0.7 / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else 0.3
            tensor.copy_(values * scale + (1.0 if name.endswith(("norm.weight", "A_log", ".D")) else 0.0))


@pytest.mark.parametrize(
    "family, fused_norms, single",
    [("dense", True, False), ("dense", False, False), ("tied", True, False), ("moe", True, False), ("moe", False, False),
     ("moe", True, True), ("latent", True, False)],
)  # fmt: skip
def test_what_it_saves_is_read(family, fused_norms, single, tmp_path):
    """`single` is its singleton_local_shards: experts under their own keys."""
    from megatron.core import dist_checkpointing

    args = Namespace(**TRAINED[family])
    model = build(args, args.padded_vocab_size, fused_norms)
    randomize(model)
    folder = tmp_path / "run" / "iter_0000100"
    folder.mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 100}
    state |= model.sharded_state_dict(metadata={"singleton_local_shards": single})
    with on_cpu():
        dist_checkpointing.save(state, str(folder))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("100")
    report = convert(tmp_path / "run", tmp_path / "hf", verify_output=True)
    assert not report.missing and all("_extra_state" in name for name in report.ignored)
    ids = prompt(2, 24)
    assert difference(model, ids, ours(tmp_path / "hf", ids)) < TOLERANCE
    with torch.no_grad():
        model.decoder.layers[0].mixer.in_proj.weight[3] += 0.1
    assert difference(model, ids, ours(tmp_path / "hf", ids)) > 0.05
