"""Memory at inference against MiniPuzzle's budget (arXiv 2504.03624: 31.7 GiB for the 47B at 1M tokens) and plain sums."""

import json

import pytest
from tiny import tiny_config

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.memory_model import Deployment, memory, memory_by_layer
from nemotron_h_hf.scripts import info

PAPER = Deployment("fp4", "fp8", "bf16", num_tokens=1_000_000)


@pytest.mark.parametrize(("name", "gib"), [("nemotron-h-47b", 31.68), ("nemotron-h-56b", 45.73)])
def test_the_papers_setting(name, gib):
    assert round(memory(NemotronHConfig.from_preset(name), PAPER).total / 2**30, 2) == gib


def test_parts_of_the_47b():
    """By hand from the released configuration: 5 attention layers, 8 key/value heads of 128; 45 Mamba layers."""
    found = memory(NemotronHConfig.from_preset("nemotron-h-47b"), PAPER)
    assert found.kv == 2 * 5 * 8 * 128 * 1_000_000
    assert found.state == 2 * 45 * 256 * 64 * 256
    assert found.conv == 2 * 45 * 4 * (256 * 64 + 2 * 8 * 256)
    assert round(2 * found.weights / 1e9, 2) == 46.79


@pytest.mark.parametrize("shape", ["dense", "list", "moe", "latent"])
def test_layers_add_up(shape):
    config = tiny_config(shape)
    deployment = Deployment("nvfp4", "fp16", "fp32", "fp8", num_tokens=1000, sequences=3)
    assert sum(memory_by_layer(config, deployment).values()) == pytest.approx(memory(config, deployment).total, abs=1)


def test_caches_grow_with_sequences_and_weights_do_not():
    config = tiny_config("dense")
    one, three = (memory(config, Deployment(num_tokens=7, sequences=count)) for count in (1, 3))
    assert three.weights == one.weights
    assert (three.kv, three.state, three.conv) == (3 * one.kv, 3 * one.state, 3 * one.conv)


@pytest.mark.parametrize("wrong", [{"weights": "int3"}, {"kv": "fp7"}, {"sequences": 0}, {"num_tokens": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Deployment(**wrong)


def test_info_prints_it(capsys):
    flags = ["--context", "1M", "--weights", "fp4", "--kv", "fp8", "--state", "bf16"]
    assert info.main(["nemotron-h-47b", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["total", "31.68", "GiB"] in lines and ["KV", "cache", "9.54", "GiB"] in lines
    assert info.main(["nemotron-h-56b", *flags, "--json"]) == 0
    assert round(json.loads(capsys.readouterr().out)["deployment"]["total_bytes"] / 2**30, 1) == 45.7
