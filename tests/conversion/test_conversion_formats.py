"""Other containers, releases and spellings; and every contradiction between arguments, names, shapes and --config."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import Options, convert, formats, read_megatron, torch_dist
from nemotron_h_hf.conversion import config as configs
from nemotron_h_hf.conversion.plan import plan_to_hf
from safetensors.torch import save_file

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.scripts import convert as command

DENSE = FIXTURES["dense_nemo2"]
SUPER = FIXTURES["super19_t1p1_torch_dist"]


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def dist(tmp_path) -> Path:
    """A copy of a NeMo 2 folder."""
    return Path(shutil.copytree(DENSE.path, tmp_path / "dist"))


def arguments(path: Path) -> argparse.Namespace:
    """A checkpoint's arguments, those that any program can read."""
    plain = (bool, int, float, str, type(None))
    return argparse.Namespace(**{k: v for k, v in read_megatron(path).args.items() if isinstance(v, plain)})


def test_torch_dcp_written_by_torch(tmp_path):
    """Plain torch.distributed.checkpoint: a `model.` prefix, whole Mamba tensors, the arguments as an object."""
    source = read_megatron(FIXTURES["dense_t2p1_torch"].path)
    model = {name: source[name] for name in source}
    state = {"model": model, "args": arguments(source.path), "rng_state": [1], "iteration": 3}
    optimizer = {f"exp_avg.{name}": torch.zeros(2) for name in model}
    dcp.save({**state, "optimizer": optimizer}, checkpoint_id=tmp_path / "iter_0000003", no_dist=True)
    report = convert(tmp_path / "iter_0000003", tmp_path / "hf")
    assert report.source_format == "torch_dcp"
    assert_same(tmp_path / "hf", DENSE.expected())
    assert sum(reason == "optimizer state" for reason in report.ignored.values()) == len(model)
    assert report.bytes_read == sum(tensor.nbytes for tensor in model.values())


def test_bridge_layout(tmp_path):
    """Weights without arguments, with a run_config.yaml of provider fields."""
    source = shutil.copytree(DENSE.path / "weights", tmp_path / "run" / "iter_0000000")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("0\n")
    sidecar = (DENSE.path / "context" / "model.yaml").read_text()
    (source / "run_config.yaml").write_text(sidecar.replace("config:", "model:"))
    report = convert(tmp_path / "run", tmp_path / "hf")
    assert report.source_format == "bridge"
    assert_same(tmp_path / "hf", DENSE.expected())


def test_classes_of_older_releases(dist, tmp_path):
    """megatron-core up to 0.15 puts its own classes into `.metadata`, which need not be installed."""
    path = dist / "weights" / ".metadata"
    data = path.read_bytes()
    data = pickle.dumps(pickle.loads(data), protocol=2)  # protocol 2 spells classes as text
    old, new = b"ctorch.distributed.checkpoint.metadata\nMetadata\n", (
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n"
    )  # fmt: skip
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    convert(dist, tmp_path / "hf")
    assert_same(tmp_path / "hf", DENSE.expected())


@pytest.mark.parametrize("folder", ["experts.experts", "experts"])
def test_singleton_experts(tmp_path, folder):
    """Experts under their own keys, as with singleton_local_shards (the former is what 0.16.1 writes)."""
    moe = FIXTURES["moe_t1p1e2_torch"]
    source = read_megatron(moe.path)
    state = {_singleton(name, folder): source[name] for name in source}
    dcp.save({**state, "args": arguments(moe.path)}, checkpoint_id=tmp_path / "run", no_dist=True)
    convert(tmp_path / "run", tmp_path / "hf")
    assert_same(tmp_path / "hf", moe.expected())


def _singleton(name: str, folder: str) -> str:
    head, found, tail = name.partition(".mlp.experts.")
    if not found:
        return name
    matrix, _, expert = tail.rpartition(".weight")
    return f"{head}.mlp.{folder}.{expert}.{matrix}.weight"


def test_repeated_depth_of_multi_token_prediction_counts_what_is_stored(tmp_path):
    """`mtp_num_layers` says 2, one depth is stored and used twice: the configuration gets 1."""
    source = read_megatron(SUPER.path)
    state = {name: source[name] for name in source if not name.startswith("mtp.layers.1.")}
    assert read_megatron(SUPER.path).args["mtp_num_layers"] == 2
    dcp.save({**state, "args": arguments(SUPER.path)}, checkpoint_id=tmp_path / "run", no_dist=True)
    convert(tmp_path / "run", tmp_path / "hf")
    config = NemotronHConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_nextn_predict_layers, config.mtp_hybrid_override_pattern) == (1, "*E")
    assert_same(
        tmp_path / "hf",
        {k: v for k, v in SUPER.expected().items() if not k.startswith(("mtp.layers.2.", "mtp.layers.3."))},
    )


@pytest.mark.parametrize("key, skipped", [
    ("optimizer.state.exp_avg.decoder.layers.0.mixer.D", True),
    ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param", True),
    ("chained_0.optimizer.state.fp32_param.embedding.word_embeddings.weight", True),
    ("decoder.layers.0.mixer.in_proj._extra_state/shard_0_1", True), ("rng_state/shard_0.0_1.1", True),
    ("rerun_state_machine_state/shard_0.0_1.1", False), ("decoder.layers.0.mixer.D", False),
])  # fmt: skip
def test_what_is_not_a_weight(key, skipped):
    assert bool(torch_dist.skip_reason(key, "")) == skipped


def test_unknown_and_unsupported_folders(tmp_path, dist):
    with pytest.raises(ValueError, match="is not a folder"):
        formats.find(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint that is known"):
        formats.find(tmp_path / "empty")
    (dist / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="zarr.*0.15"):
        formats.find(dist / "weights")
    (dist / "weights" / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="metadata.json"):
        formats.find(dist / "weights")
    with pytest.raises(ValueError, match="Hugging Face checkpoint, not a Megatron one"):
        convert(DENSE.path, tmp_path / "hf") and read_megatron(tmp_path / "hf")


def change_sidecar(dist: Path, **fields) -> None:
    lines = (dist / "context" / "model.yaml").read_text().splitlines()
    kept = [line for line in lines if line.strip().partition(":")[0] not in fields]
    added = [f"  {name}: {value}" for name, value in fields.items() if value is not None]
    (dist / "context" / "model.yaml").write_text("\n".join([*kept, *added]) + "\n")


@pytest.mark.parametrize("fields, both", [
    ({"num_layers": 9}, ("num_layers is 9 by the arguments", "the tensors have 8 layers")),
    ({"hybrid_override_pattern": "M-M*-M-*"}, ("'M-M*-M*-' by the names", "by the argument hybrid_override")),
    ({"hidden_size": 65}, ("hidden_size is 64 by the shape of", "65 by the argument hidden_size")),
    ({"ffn_hidden_size": 96}, ("intermediate_size is 112 by the shapes of mlp", "96 by the argument ffn_hidden_size")),
    ({"mamba_num_heads": 12}, ("mamba_num_heads is 8 by the shape of", "12 by the argument")),
    ({"mamba_head_dim": 16}, ("mamba_head_dim is 12 by the shape of", "16 by the argument")),
    ({"mamba_num_groups": 4}, ("n_groups=4 times ssm_state_size=16 is not 32", "conv1d.weight gives")),
    ({"num_query_groups": 4}, ("num_key_value_heads=4 (the argument num_query_groups)", "linear_proj.weight")),
    ({"kv_channels": 16}, ("head_dim=16 is not 96", "linear_qkv.weight give")),
    ({"vocab_size": 500}, ("vocab_size is 500", "240 rows")),
    ({"untie_embeddings_and_output_weights": "false"}, ("tie_word_embeddings is False by", "True by the argument")),
    ({"swiglu": "true"}, ("the argument swiglu=True", "Nemotron-H has False")),
    ({"normalization": "LayerNorm"}, ("normalization='LayerNorm'", "'RMSNorm'")),
    ({"position_embedding_type": "rope"}, ("position_embedding_type='rope'", "'none'")),
    ({"layernorm_zero_centered_gamma": "true"}, ("layernorm_zero_centered_gamma=True", "False")),
    ({"mamba_num_groups": None}, ("n_groups is in neither the arguments", "give it by --config")),
])  # fmt: skip
def test_contradictions_name_both_sides(dist, fields, both):
    change_sidecar(dist, **fields)
    with pytest.raises(ValueError) as caught:
        configs.derive(read_megatron(dist))
    assert all(part in str(caught.value) for part in both), caught.value


def test_silent_arguments_are_completed(dist, tmp_path):
    """Sizes come from the shapes, the rest from --config; the checkpoint's own word stands against a contradiction."""
    change_sidecar(
        dist, mamba_num_heads=None, mamba_head_dim=None, hidden_size=None, ffn_hidden_size=None, kv_channels=None
    )
    config, _ = configs.derive(read_megatron(dist))
    assert (config.mamba_num_heads, config.mamba_head_dim, config.head_dim) == (8, 12, 24)
    change_sidecar(dist, mamba_num_groups=None, vocab_size=None, layernorm_epsilon=None)
    extra = {"n_groups": 2, "vocab_size": 229, "layer_norm_epsilon": 1e-6, "mamba_chunk_size": 64, "eos_token_id": 11}
    (tmp_path / "config.json").write_text(json.dumps(extra | {"hybrid_override_pattern": "M-M*-M*-"}))
    config, remarks = configs.derive(read_megatron(dist), tmp_path)
    assert (config.n_groups, config.vocab_size, config.chunk_size, config.eos_token_id) == (2, 229, 64, 11)
    assert config.layer_norm_epsilon == 1e-6 and remarks == [
        "not in the checkpoint, so the defaults of the family: max_position_embeddings",
        "Megatron's gated norms have an epsilon of 1e-05; in Hugging Face they share layer_norm_epsilon=1e-06",
    ]
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "hybrid_override_pattern": "M-M*-M*-"}))
    with pytest.raises(ValueError, match="hidden_size is 64 by the shape of .* but 32 by --config"):
        configs.derive(read_megatron(dist), tmp_path / "config.json")
    with pytest.raises(ValueError, match="hidden_size is 64 by .* but 4096 by --config nemotron-h-8b"):
        configs.derive(read_megatron(dist), "nemotron-h-8b")


def test_unknown_vocabulary_keeps_the_padding_and_says_so(dist, tmp_path):
    change_sidecar(dist, vocab_size=None)
    report = convert(dist, tmp_path / "hf")
    assert any("all 240 rows are kept" in note for note in report.notes)
    assert report.tensors["lm_head.weight"]["shape"] == [240, 64]


def test_names_outside_of_the_table_are_refused(tmp_path):
    source = read_megatron(FIXTURES["dense_t2p1_torch"].path)
    config, _ = configs.derive(source)
    norm = source.entries["decoder.final_norm.weight"]
    source.entries["decoder.layers.0.mixer.in_proj.weight_quantizer._amax"] = norm
    with pytest.raises(ValueError, match="no place in the model: .*_amax; quantizer state of ModelOpt"):
        plan_to_hf(source, config)
    source.entries["decoder.layers.0.norm.weight"] = source.entries["decoder.layers.0.mixer.in_proj.layer_norm_weight"]
    with pytest.raises(ValueError, match="two spellings of one tensor"):
        plan_to_hf(source, config)
    del source.entries["decoder.layers.0.norm.weight"], source.entries["decoder.final_norm.weight"]
    with pytest.raises(ValueError, match="1 tensors of the model are missing: decoder.final_norm.weight"):
        plan_to_hf(source, config, allow_unused=["*_amax"])


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert command.main([str(SUPER.path), str(tmp_path / "hf"), "--dry-run", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for name in SUPER.expected():
        assert f" {name} " in out
    assert "z+x+B+C+dt, cast" in out and "qkv groups" in out and "would write 101 tensors" in out
    assert "extra state of Transformer Engine" in out and not (tmp_path / "hf").exists()


def test_command_converts_verifies_and_reports(tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "notes.txt").write_text("not a tokenizer file")
    assert command.main([str(SUPER.path), str(tmp_path / "hf"), "--verify", "--tokenizer", str(tokenizer)]) == 0
    done = capsys.readouterr()
    assert "is a torch_dist checkpoint" in done.err and "verified" in done.out
    report = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert report["num_tensors"] == len(report["tensors"]) == 101
    for name, tensor in SUPER.expected().items():
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert report["tensors"][name]["sha256"] == digest
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "config.json", "conversion_report.txt"} <= names
    assert "notes.txt" not in names and not any(name.endswith((".part", ".jsonl")) for name in names)
    assert (
        command.main([str(tmp_path / "hf"), str(tmp_path / "run"), "--format", "torch", "--pp", "2,4", "--ep", "2"])
        == 0
    )
    assert command.main([str(tmp_path / "run"), str(tmp_path / "back"), "--verify-logits", str(tmp_path / "hf")]) == 0
    assert "largest difference" in capsys.readouterr().out


def test_logits_that_differ_are_an_error(tmp_path):
    convert(DENSE.path, tmp_path / "hf")
    other = convert(FIXTURES["dense_t2p1_torch"].path, tmp_path / "other")
    assert other.logits is None
    tensors = DENSE.expected()
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"] * 2
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match="logits of .* differ"):
        convert(DENSE.path, tmp_path / "third", verify_logits=tmp_path / "other")
    assert not (tmp_path / "third" / "config.json").exists()


def test_nan_and_infinity_are_counted(tmp_path):
    source = read_megatron(FIXTURES["dense_t2p1_torch"].path)
    state = {name: source[name] for name in source}
    state["decoder.final_norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    dcp.save({**state, "args": arguments(source.path)}, checkpoint_id=tmp_path / "run", no_dist=True)
    report = convert(tmp_path / "run", tmp_path / "hf")
    line = report.tensors["backbone.norm_f.weight"]
    assert (report.num_nan, report.num_inf, line["num_nan"], line["num_inf"]) == (1, 2, 1, 2)
    assert "WARNING: not all numbers are finite: backbone.norm_f.weight" in "\n".join(report.summary())


def test_checksums_that_the_checkpoint_brings_are_checked(dist, tmp_path):
    """integrity.json of megatron-core 0.19, with --verify."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (dist / "weights").glob("*.distcp")}
    listed = dist / "weights" / "integrity.json"
    listed.write_text(json.dumps({"algorithm": "sha256", "files": files}))
    assert convert(dist, tmp_path / "hf", verify_output=True).verified
    listed.write_text(json.dumps({"algorithm": "sha256", "files": files | {"__0_1.distcp": "0" * 64}}))
    with pytest.raises(ValueError, match="__0_1.distcp does not have the checksum"):
        convert(dist, tmp_path / "other", verify_output=True)
    listed.write_text(json.dumps({"algorithm": "sha256", "files": {"../context/model.yaml": "0"}}))
    with pytest.raises(ValueError, match="outside of the folder"):
        convert(dist, tmp_path / "third", verify_output=True)


def test_a_tokenizer_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer=.*tokenizer.json"):
        convert(DENSE.path, tmp_path / "hf", tokenizer=tmp_path)
    assert not (tmp_path / "hf").exists()


def test_the_command_line_has_the_options_of_the_call(tmp_path):
    options = vars(command.parse(["run", "model"]))
    del options["source"], options["target"]
    assert options == {field.name: field.default for field in fields(Options)} | {
        "allow_unused": [],
        "allow_missing": [],
    }
    with pytest.raises(TypeError, match="tokeniser"):
        convert(DENSE.path, tmp_path / "hf", tokeniser=tmp_path)


@pytest.mark.parametrize(
    "option", [{"format": "torch"}, {"tp": 2}, {"pp": [2, 4]}, {"ep": 2}, {"core": "0.19"}, {"vocab_divisible_by": 64}]
)
def test_options_of_a_megatron_target_are_refused_for_another(option, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*allowed with a Megatron target, this one is hf"):
        convert(DENSE.path, tmp_path / "hf", **option)


def test_a_tokenizer_for_a_megatron_target_is_refused(tmp_path):
    convert(DENSE.path, tmp_path / "hf")
    with pytest.raises(ValueError, match="tokenizer=.*allowed with a Hugging Face target, this one is torch_dist"):
        convert(tmp_path / "hf", tmp_path / "run", tokenizer=tmp_path)
