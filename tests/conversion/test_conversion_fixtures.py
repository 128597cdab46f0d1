"""Checkpoints of real megatron-core releases: bit-equal tensors, the same configuration, the same logits."""

from __future__ import annotations

import pytest
import torch
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import convert, read_megatron

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.model.weights import Checkpoint

NOT_IN_OURS = {"torch_dtype", "mamba_proj_bias"}
# sidecars of these formats do not say it
SILENT = {"nemo2": {"max_position_embeddings"}, "bridge": {"max_position_embeddings"}}
FAMILIES = {fixture.row["family"]: fixture for fixture in FIXTURES.values()}


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


each = pytest.mark.parametrize("name", FIXTURES)


@each
def test_tensors_are_bit_equal_and_the_configuration_is_right(name, tmp_path):
    fixture = FIXTURES[name]
    report = convert(fixture.path, tmp_path / "hf", max_shard_size="100KB", verify_output=True)
    assert_same(tmp_path / "hf", fixture.expected())
    assert report.source_format == fixture.row["format"] and len(report.files) > 1
    assert (report.num_nan, report.num_inf) == (0, 0)
    assert report.num_elements == sum(tensor.numel() for tensor in fixture.expected().values())
    ours = NemotronHForCausalLM.config_class.from_pretrained(tmp_path / "hf").to_dict()
    ignored = NOT_IN_OURS | SILENT.get(fixture.row["format"], set())
    assert {k: ours.get(k) for k in fixture.config if k not in ignored} == {
        k: v for k, v in fixture.config.items() if k not in ignored
    }


@pytest.mark.parametrize("family", [f for f, fixture in FAMILIES.items() if fixture.row["logits"]])
def test_logits_are_those_that_megatron_recorded(family, tmp_path):
    fixture = FAMILIES[family]
    convert(fixture.path, tmp_path / "hf")
    recorded = torch.load(fixture.root / fixture.row["logits"], weights_only=True)
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(recorded["input_ids"], use_cache=False).logits
    assert (logits - recorded["logits_fp32"]).abs().max() < 5e-5


def test_each_byte_is_read_once(tmp_path):
    """Every weight once; what several ranks hold is read to be compared, and that once too."""
    for name, copies in (("dense_nemo2", 0), ("super19_t1p1_torch_dist", 0), ("moe_t1p1e2_torch", 1)):
        source = read_megatron(FIXTURES[name].path)
        stored = sum(source.spec(key).num_bytes for key in source)
        report = convert(FIXTURES[name].path, tmp_path / name)
        once = sum(1 for entry in source.entries.values() for _ in entry.copies)
        assert report.bytes_read == stored if not copies else stored < report.bytes_read < 2 * stored
        assert bool(once) == bool(copies)
    written = Checkpoint(tmp_path / "super19_t1p1_torch_dist")
    stored = sum(written.spec(key).num_bytes for key in written)
    assert convert(tmp_path / "super19_t1p1_torch_dist", tmp_path / "back").bytes_read == stored


def test_any_level_of_the_folder_will_do(tmp_path):
    run = FIXTURES["dense_t2p1_torch"].path
    weights = FIXTURES["dense_nemo2"].path / "weights"
    for number, path in enumerate((run, run / "iter_0000100", weights, weights.parent)):
        convert(path, tmp_path / str(number))
        assert_same(tmp_path / str(number), FIXTURES["dense_nemo2"].expected())


def test_read_megatron_is_lazy_and_whole():
    source = read_megatron(FIXTURES["dense_t2p1_torch"].path)
    assert source.bytes_read == 0
    norm = source["decoder.final_norm.weight"]
    assert torch.equal(norm, FIXTURES["dense_t2p1_torch"].expected()["backbone.norm_f.weight"])
    assert source.bytes_read == 2 * norm.nbytes  # both tensor ranks have it, and are compared
    assert source.spec("embedding.word_embeddings.weight").shape == (256, 64)
