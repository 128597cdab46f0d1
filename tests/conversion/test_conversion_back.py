"""Checkpoints of real megatron-core releases to Hugging Face and back: the same bits, the same configuration."""

from __future__ import annotations

import pytest
import torch
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import convert, read_megatron

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back_through_torch_dist(name, tmp_path):
    fixture = FIXTURES[name]
    convert(fixture.path, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", max_shard_size="100KB", vocab_divisible_by=16)
    first, second = read_megatron(fixture.path), read_megatron(tmp_path / "megatron")
    vocab = fixture.config["vocab_size"]
    assert len(first) == len(second)
    for key in second:
        original = first[key] if key in first else first[_other_spelling(key)]
        rows = vocab if key in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        assert torch.equal(original[:rows], second[key][:rows]), key
    convert(tmp_path / "megatron", tmp_path / "again")
    assert_same(tmp_path / "again", fixture.expected())
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def _other_spelling(key: str) -> str:
    """ModelOpt's layers keep their norms apart from the matrices."""
    for usual, other in (
        ("mixer.in_proj.layer_norm_weight", "norm.weight"),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        if key.endswith(usual):
            return key.removesuffix(usual) + other
    raise KeyError(key)


@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back_through_rank_files(name, tmp_path):
    """Tensor and pipeline parallel, and expert parallel where there are experts; an uneven pipeline."""
    fixture = FIXTURES[name]
    convert(fixture.path, tmp_path / "hf")
    layers, experts = fixture.config["num_hidden_layers"], "n_routed_experts" in fixture.config
    options = {"format": "torch", "tp": 2, "pp": [1, layers - 1], "ep": 2 if experts else 1, "vocab_divisible_by": 16}
    convert(tmp_path / "hf", tmp_path / "megatron", **options)
    convert(tmp_path / "megatron", tmp_path / "again")
    assert_same(tmp_path / "again", fixture.expected())
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
