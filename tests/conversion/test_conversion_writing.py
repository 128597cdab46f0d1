"""Megatron checkpoints that are written: read by torch's own loaders, cut as Megatron cuts them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import convert, names, read_megatron, torchzip, unpickle, write_megatron
from nemotron_h_hf.conversion.legacy import FILE_NAME
from nemotron_h_hf.conversion.write_megatron import Layout
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from tqdm import tqdm

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of the three families of tests/fixtures."""
    folder = tmp_path_factory.mktemp("hf")
    for family, name in (("dense", "dense_nemo2"), ("moe", "moe_t1p1e2_torch"), ("super", "super19_t1p1_torch_dist")):
        convert(FIXTURES[name].path, folder / family)
    return {path.name: path for path in folder.iterdir()}


def tied(tmp_path: Path) -> Path:
    """A small model with tied embeddings, biases and its own sizes."""
    config = NemotronHConfig(
        vocab_size=50, hidden_size=16, hybrid_override_pattern="M*-M", num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=24, mamba_num_heads=4, mamba_head_dim=6, n_groups=2, ssm_state_size=4,
        tie_word_embeddings=True, mlp_bias=True, attention_bias=True, chunk_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def real_load(path: Path) -> dict:
    """torch's own reader of the file, which allows nothing but tensors and a Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("family", ["dense", "moe", "super"])
def test_torch_reads_the_distributed_checkpoint(hf, tmp_path, family):
    """torch.distributed.checkpoint, without this package, gives the same tensors."""
    report = write_megatron(hf[family], tmp_path / "run", max_shard_size="100KB", vocab_divisible_by=16)
    folder = tmp_path / "run" / "release"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    ours = read_megatron(tmp_path / "run")
    assert len(report.files) > 2 and (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for name in ours:
        assert torch.equal(ours[name], whole(state, name)), name
    for key, entry in metadata.state_dict_metadata.items():  # no chunk of the experts is larger than one expert
        if ".experts.experts." in key and hasattr(entry, "chunks"):
            assert all(chunk.sizes[0] == 1 for chunk in entry.chunks)


def whole(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor by Megatron's keys, put together here."""
    if name in state:
        return state[name]
    stack, _, expert = name.rpartition(".weight")
    stacked = stack.replace(".mlp.experts.", ".mlp.experts.experts.") + ".weight"
    if stacked in state and expert:
        return state[stacked][int(expert)]
    parts = ("z", "x", "B", "C", "dt") if "in_proj" in name else ("x", "B", "C")
    return torch.cat([state[f"{name}.{part}"] for part in parts])


def test_every_extra_state_that_megatron_wrote_is_there(hf, tmp_path):
    """A real 0.19 checkpoint has these keys; Megatron refuses to load without them."""
    write_megatron(hf["super"], tmp_path / "run")
    real = read_megatron(FIXTURES["super19_t1p1_torch_dist"].path).ignored
    ours = set(read_megatron(tmp_path / "run").ignored)
    assert {key for key in real if "_extra_state" in key} <= ours


def test_common_pt_has_what_megatron_compares(hf, tmp_path):
    write_megatron(hf["moe"], tmp_path / "run", vocab_divisible_by=16)
    common = real_load(tmp_path / "run" / "release" / "common.pt")
    args = vars(common["args"])
    real = read_megatron(FIXTURES["moe_t1p1e2_torch"].path).args
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
                 "ffn_hidden_size", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim",
                 "num_experts",
                 "moe_router_topk", "moe_router_topk_scaling_factor", "padded_vocab_size", "hybrid_override_pattern",
                 "max_position_embeddings", "untie_embeddings_and_output_weights", "squared_relu"):  # fmt: skip
        assert args[name] == real[name], name


def test_rank_files_are_those_of_megatron(hf, tmp_path):
    """The same tensors under the same local names, rank by rank, as a real TP 2 run of the same weights wrote."""
    write_megatron(hf["dense"], tmp_path / "run", format="torch", tp=2, vocab_divisible_by=16)
    real = FIXTURES["dense_t2p1_torch"].path / "iter_0000100"
    for rank in ("mp_rank_00", "mp_rank_01"):
        ours = real_load(tmp_path / "run" / "release" / rank / FILE_NAME)
        theirs = torchzip.read(real / rank / FILE_NAME).value["model"]
        assert set(ours["model"]) == set(theirs)
        for name, extent in theirs.items():
            if isinstance(extent, unpickle.Extent) and not name.endswith("_extra_state"):
                data = bytearray((real / rank / FILE_NAME).read_bytes()[extent.offset :][: extent.num_bytes])
                padded = rank == "mp_rank_01" and name in ("embedding.word_embeddings.weight", "output_layer.weight")
                rows = 229 - 128 if padded else None
                theirs_tensor = torch.frombuffer(data, dtype=extent.dtype).reshape(extent.shape)
                assert torch.equal(ours["model"][name][:rows], theirs_tensor[:rows]), name


@pytest.mark.parametrize("family, tp, pp, ep, files", [
    ("dense", 1, 1, 1, 1), ("dense", 2, 3, 1, 6), ("dense", 2, [5, 0, 3], 1, 6), ("moe", 4, 1, 1, 4),
    ("moe", 1, 2, 4, 8),
    ("moe", 2, [1, 1, 4], 2, 12), ("super", 1, 1, 2, 2), ("super", 2, [2, 4], 4, 16),
])  # fmt: skip
def test_any_ranks_there_and_back(hf, tmp_path, family, tp, pp, ep, files):
    options = {"format": "torch", "tp": tp, "pp": pp, "ep": ep, "verify_output": True}
    report = write_megatron(hf[family], tmp_path / "run", **options)
    assert len(report.files) == files and report.verified
    convert(tmp_path / "run", tmp_path / "back")
    assert_same(tmp_path / "back", load_file(hf[family] / "model.safetensors"))


@pytest.mark.parametrize("options", [{}, {"format": "torch", "tp": 2, "pp": 2}, {"format": "torch", "pp": [1, 3]}])
def test_tied_embeddings_and_biases(tmp_path, options):
    source = tied(tmp_path)
    convert(source, tmp_path / "run", verify_output=True, **options)
    convert(tmp_path / "run", tmp_path / "back", verify_logits=source)
    assert_same(tmp_path / "back", load_file(source / "model.safetensors"))
    stages = options.get("pp", 1)
    if not options:  # Megatron insists on it, though the layer has no weight
        metadata = dcp.FileSystemReader(tmp_path / "run" / "release").read_metadata()
        assert "output_layer._extra_state/shard_0_1" in metadata.state_dict_metadata
    if stages != 1:
        last = sorted((tmp_path / "run" / "release").glob("mp_rank_*"))[-1] / FILE_NAME
        assert "output_layer.weight" in torchzip.read(last).value["model"]


@pytest.mark.parametrize("options", [{}, {"format": "torch", "tp": 2, "pp": 3, "ep": 2}])
def test_progress_moves_within_a_tensor_and_ends_at_the_whole(hf, tmp_path, monkeypatch, options):
    steps = []
    monkeypatch.setattr("nemotron_h_hf.checkpoint.PIECE_BYTES", 1024)
    monkeypatch.setattr(tqdm, "update", lambda bar, count: steps.append(count))
    report = write_megatron(hf["super"], tmp_path / "run", **options)
    assert sum(steps) == report.num_bytes and max(steps) <= 1024
    if not options:
        return
    embedding = 2 * 229 * 64
    assert report.bytes_read == report.num_bytes - 2 * padding_of(report) + embedding  # the last stage has it as well


def padding_of(report) -> int:
    """Bytes of zeros under a vocabulary of 229."""
    rows, width = report.tensors["embedding.word_embeddings.weight"]["shape"]
    return 2 * (rows - 229) * width


def test_tied_embeddings_are_read_once_per_stage(tmp_path):
    """With multi-token prediction the last stage has them under two names."""
    config = tiny_config(
        "dense", tie_word_embeddings=True, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-"
    )
    tensors = {
        name: torch.randn(shape)
        for link in names.links(config)
        for name, shape in zip(link.hf, link.hf_shapes, strict=True)
    }
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(config.to_json_string(use_diff=False))
    report = write_megatron(tmp_path / "hf", tmp_path / "run", format="torch", pp=2)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert report.bytes_read == stored + tensors["backbone.embeddings.weight"].nbytes
    convert(tmp_path / "run", tmp_path / "back")
    assert_same(tmp_path / "back", tensors)


def test_dtype_is_cast_and_the_router_bias_is_not(hf, tmp_path):
    convert(hf["moe"], tmp_path / "run", dtype="float32")
    convert(tmp_path / "run", tmp_path / "back", dtype="bfloat16")
    original, back = load_file(hf["moe"] / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(original[name], back[name]) for name in original)
    middle = read_megatron(tmp_path / "run")
    assert middle.spec("output_layer.weight").dtype == torch.float32
    assert back["backbone.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32


def test_vocabulary_is_padded_as_asked(hf, tmp_path):
    for number, (options, rows) in enumerate((
        ({}, 256), ({"vocab_divisible_by": 1}, 229), ({"vocab_divisible_by": 16, "format": "torch", "tp": 2}, 256),
        ({"vocab_divisible_by": 16}, 240),
    )):  # fmt: skip
        write_megatron(hf["dense"], tmp_path / str(number), **options)
        written = read_megatron(tmp_path / str(number))
        assert written.spec("output_layer.weight").shape[0] == rows
        assert not written["embedding.word_embeddings.weight"][229:].any()


@pytest.mark.parametrize("family, options, message", [
    ("dense", {"format": "zarr"}, "format='zarr': allowed are torch_dist, torch"),
    ("dense", {"format": "torch", "tp": 4}, "tp=4: allowed are divisors of n_groups=2"),
    ("dense", {"format": "torch", "tp": 0}, "tp=0"),
    ("dense", {"format": "torch", "ep": 2}, "ep=2"),
    ("moe", {"format": "torch", "ep": 3}, "ep=3: allowed are divisors"),
    ("dense", {"format": "torch", "pp": [4, 5]}, "add up to 8"),
    ("dense", {"format": "torch", "pp": 9}, "pp=9"),
    ("dense", {"tp": 2}, "torch_dist is loaded under any parallelism"),
    ("dense", {"to": "hf"}, "to='hf'"),
    ("dense", {"dtype": "int8"}, "dtype='int8'"),
    ("dense", {"max_shard_size": "much"}, "max_shard_size='much'"),
    ("dense", {"core": "1"}, "core='1'"),
])  # fmt: skip
def test_bad_options_are_named_and_nothing_is_written(hf, tmp_path, family, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        convert(hf[family], tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape, fields, message", [
    ("dense", {"use_bias": True}, "use_bias=True: Megatron's M layers always have False"),
    ("dense", {"conv_kernel": 3}, "conv_kernel=3"),
    ("dense", {"time_step_limit": (0.0, 0.1)}, "time_step_limit=(0.0, 0.1)"),
    ("dense", {"attention_bias": True}, "attention_bias=True and mlp_bias=False: Megatron has one switch"),
    ("dense", {"intermediate_size": [24, 80, 8]}, "intermediate_size is a list"),
    ("moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("moe", {"mlp_bias": True}, "mlp_bias=True: Megatron's E layers"),
    ("moe", {"n_group": 4, "topk_group": 2}, "num_experts_per_tok=3 with topk_group=2 of 4 groups"),
])  # fmt: skip
def test_what_megatron_cannot_be_told_is_refused(shape, fields, message):
    """It would ignore the tensor or the field and compute something else."""
    layout = Layout("torch_dist", 1, 1, 1, 128, "auto")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        layout.check(tiny_config(shape, **fields))
    layout.check(tiny_config(shape))
    layout.check(tiny_config("dense", mlp_bias=True, attention_bias=True))
    layout.check(tiny_config("moe", num_experts_per_tok=4, n_group=4, topk_group=2))


def test_left_over_and_missing_tensors(hf, tmp_path):
    tensors = load_file(hf["dense"] / "model.safetensors")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text((hf["dense"] / "config.json").read_text())
    tensors["backbone.layers.0.mixer.extra"] = torch.zeros(1)
    del tensors["backbone.layers.0.mixer.D"]
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors have no place in the model: backbone.layers.0.mixer.extra"):
        convert(tmp_path / "odd", tmp_path / "run")
    with pytest.raises(ValueError, match="1 tensors of the model are missing: backbone.layers.0.mixer.D"):
        convert(tmp_path / "odd", tmp_path / "run", allow_unused=["*.extra"])
    report = convert(tmp_path / "odd", tmp_path / "run", allow_unused=["*.extra"], allow_missing=["*.D"])
    assert report.missing == ["backbone.layers.0.mixer.D"]
    assert report.ignored["backbone.layers.0.mixer.extra"] == "allowed by --allow-unused"


def test_our_zip_is_a_torch_file(tmp_path):
    """torch reads what the writer wrote, records are aligned to 64 bytes, and a zip may be inside of a file."""
    tensors = [torch.randn(3, 5), torch.arange(7), torch.tensor(2.5), torch.empty(0, 4), torch.ones(2).bool()]
    value = OrderedDict((str(i), torchzip.Later(t.dtype, tuple(t.shape))) for i, t in enumerate(tensors))
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"x" * 77)
        writer = torchzip.Writer(file, {"model": value})
        for tensor in tensors:
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            writer.write([data], tensor.dtype, tuple(tensor.shape))
        length = writer.close()
    (tmp_path / "alone.pt").write_bytes((tmp_path / "file").read_bytes()[77 : 77 + length])
    loaded = real_load(tmp_path / "alone.pt")["model"]
    assert all(torch.equal(loaded[str(i)], tensor) for i, tensor in enumerate(tensors))
    extents = torchzip.read(tmp_path / "file", 77, length).value["model"].values()
    assert all((extent.offset - 77) % 64 == 0 for extent in extents)
    assert torchzip.is_whole(tmp_path / "file", 77, length)


def test_broken_promises_are_refused(tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        writer = torchzip.Writer(file, torchzip.Later(torch.float32, (2,)))
        with pytest.raises(ValueError, match="was promised as"):
            writer.write([b"1234"], torch.float32, (1,))
        with pytest.raises(ValueError, match="0 of 1 promised"):
            writer.close()
