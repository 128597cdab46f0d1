"""The grid of candidates: against counting one configuration at a time, and the 47B among those of the 56B."""

import itertools

import pytest
from tiny import tiny_config

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.compression.candidates import KINDS, costs_of, find_candidates
from nemotron_h_hf.cost import num_active_parameters, num_parameters
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.memory_model import Deployment, memory

PAPER = Deployment("fp4", "fp8", "bf16", num_tokens=1_000_000)
WIDTHS = range(24576, 32769, 1024)
GIB = 2**30


def layers_kept(large: str, small: str) -> list[int]:
    """Where the layers of `small` are in `large`, each as early as possible."""
    kept: list[int] = []
    for letter in small:
        kept.append(large.index(letter, kept[-1] + 1 if kept else 0))
    return kept


@pytest.fixture(scope="module")
def papers():
    """The 56B, the released 47B, and the candidates where importance is what the released pattern kept."""
    large, small = (NemotronHConfig.from_preset(name) for name in ("nemotron-h-56b", "nemotron-h-47b"))
    kept = layers_kept(large.hybrid_override_pattern, small.hybrid_override_pattern)
    importance = {layer: float(layer in kept) for layer in range(large.num_hidden_layers)}
    found = find_candidates(
        large, importance, {"intermediate_size": WIDTHS}, {}, costs_of(PAPER), {"bytes": 31.7 * GIB}
    )
    return large, small, found


def test_the_47b_is_among_the_candidates_of_the_56b(papers):
    large, small, found = papers
    (one,) = [each for each in found.candidates if each.name == "a5-m45-f48-w30720"]
    config = resolve(large, one.sizes).config
    assert config.hybrid_override_pattern == small.hybrid_override_pattern
    assert config.intermediate_size == small.intermediate_size == 30720
    assert round(one.costs["bytes"] / GIB, 2) == 31.68 and one.costs["parameters"] == num_parameters(small)


def test_the_papers_grid_is_counted(papers):
    _, _, found = papers
    assert found.num_models == 10 * 54 * 54 * 9
    assert len(found.candidates) < found.num_fitting / 100
    assert all(one.costs["bytes"] <= 31.7 * GIB for one in found.candidates)


def test_nothing_can_be_added_to_a_candidate(papers):
    large, _, found = papers
    for one in found.candidates[::200]:
        config = resolve(large, one.sizes).config
        assert memory(config, PAPER).total == pytest.approx(one.costs["bytes"], abs=1)
        if one.sizes["intermediate_size"] < 32768:
            wider = resolve(large, {**one.sizes, "intermediate_size": one.sizes["intermediate_size"] + 1024}).config
            assert memory(wider, PAPER).total > 31.7 * GIB


@pytest.mark.parametrize("shape", ["dense", "moe", "attention_free", "list"])
def test_costs_are_those_of_each_configuration(shape):
    config = tiny_config(shape)
    deployment = Deployment("fp8", "fp16", "bf16", num_tokens=50, sequences=2)
    field = "moe_intermediate_size" if shape == "moe" else "intermediate_size"
    sizes = {} if shape == "list" else {field: (16, 24)}
    importance = {layer: (layer * 5) % 7 for layer in range(config.num_hidden_layers)}
    found = find_candidates(
        config, importance, sizes, {}, costs_of(deployment), {"parameters": 0.9 * num_parameters(config)}, "all"
    )
    for one in found.candidates:
        small = resolve(config, one.sizes).config
        assert one.costs["parameters"] == num_parameters(small)
        assert one.costs["active_parameters"] == pytest.approx(num_active_parameters(small))
        assert one.costs["bytes"] == pytest.approx(memory(small, deployment).total, abs=1)
    expected = 0
    there = {name: config.layers_block_type.count(kind) for name, kind in KINDS.items()}
    for *numbers, size in itertools.product(*(range(1, n + 1) for n in there.values() if n), sizes.get(field, [None])):
        kept = []
        for kind, number in zip((kind for name, kind in KINDS.items() if there[name]), numbers):
            own = [layer for layer, found in enumerate(config.layers_block_type) if found == kind]
            kept += sorted(own, key=lambda layer: -importance[layer])[:number]
        one = {"layers": sorted(kept)} | ({} if size is None else {field: size})
        expected += num_parameters(resolve(config, one).config) <= 0.9 * num_parameters(config)
    assert found.num_fitting == len(found.candidates) == expected


def test_several_limits_hold_together():
    config = tiny_config("dense")
    importance = dict.fromkeys(range(7), 0.0)
    limits = {"parameters": 0.8 * num_parameters(config), "kv_bytes_per_token": 128.0, "bytes": 10**9}
    found = find_candidates(config, importance, {}, {}, costs_of(Deployment()), limits, "all")
    assert found.candidates and all(
        one.costs[name] <= most for one in found.candidates for name, most in limits.items()
    )


def bad(**changes):
    config = tiny_config("dense")
    given = {"sizes": {}, "counts": {}, "limits": {"parameters": 30_000}, "keep": "all"} | changes
    return find_candidates(
        config, dict.fromkeys(range(7), 0.0), given["sizes"], given["counts"], costs_of(Deployment()), given["limits"],
        given["keep"],
    )  # fmt: skip


def test_limits_that_nothing_fits_name_the_smallest():
    with pytest.raises(ValueError, match=r"bytes='1 B': allowed is [\d.]+ KiB or more, the smallest"):
        bad(limits={"bytes": 1})
    least = bad(counts={"mamba": [1, 1], "mlp": [1, 1]}, limits={"parameters": 40_000}).candidates[0]
    assert least.counts == {"attention": 1, "mamba": 1, "mlp": 1}


def test_a_teacher_that_fits_is_refused():
    with pytest.raises(ValueError, match="the teacher itself fits"):
        bad(limits={"parameters": 10**9})


@pytest.mark.parametrize(
    ("counts", "message"),
    [({"moe": [1, 2]}, "counts='moe': allowed is attention, mamba, mlp"), ({"mlp": [2, 4]}, "counts.mlp=.2, 4."),
     ({"mlp": [3, 2]}, "counts.mlp"), ({"mlp": 3}, "counts.mlp")],
)  # fmt: skip
def test_wrong_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        bad(counts=counts)
