"""The knapsack of widths against trying every combination."""

import itertools
import random

import pytest
from tiny import tiny_config

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.compression.candidates import costs_of
from nemotron_h_hf.compression.mixed_widths import best_mixed
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.memory_model import Deployment, memory

pytest.importorskip("scipy")
WIDTHS = {"intermediate_size": (40, 80)}
DEPLOYMENT = Deployment("fp8", "fp16", "bf16", num_tokens=500)


def errors_of(config, scale: int) -> dict[int, dict[int, float]]:
    """Made up, the larger the narrower."""
    return {
        layer: {0: 1.0 + (layer * scale) % 5} | ({40: 0.1 + (layer * scale) % 3 / 2} if kind == "mlp" else {})
        for layer, kind in enumerate(config.layers_block_type)
    }


@pytest.mark.parametrize(("scale", "share"), [(1, 0.7), (2, 0.8), (3, 0.9)])
def test_it_is_the_best_of_all_combinations(scale, share):
    config = tiny_config("dense")
    errors, most = errors_of(config, scale), share * memory(config, DEPLOYMENT).total
    found = best_mixed(config, errors, WIDTHS, {}, costs_of(DEPLOYMENT), {"bytes": most})
    choices = [[0, 40, 80] if kind == "mlp" else [0, None] for kind in config.layers_block_type]
    best = float("inf")
    for combination in itertools.product(*choices):
        kinds = {config.layers_block_type[layer] for layer, size in enumerate(combination) if size != 0}
        if kinds != set(config.layers_block_type):
            continue
        layers = [layer for layer, size in enumerate(combination) if size != 0]
        widths = [size for size in combination if size]
        child = resolve(config, {"layers": layers, "intermediate_size": widths}).config
        if memory(child, DEPLOYMENT).total <= most:
            best = min(best, error_of(errors, dict(zip(range(7), combination))))
    layers = found.sizes["layers"]
    widths = found.sizes["intermediate_size"]
    mlps = [layer for layer in layers if config.layers_block_type[layer] == "mlp"]
    of_layer = dict(zip(mlps, widths if isinstance(widths, list) else [widths] * len(mlps)))
    taken = {layer: of_layer.get(layer) if layer in layers else 0 for layer in range(7)}
    assert error_of(errors, taken) == pytest.approx(best)
    child = resolve(config, found.sizes).config
    assert found.costs["parameters"] == num_parameters(child)
    assert (
        found.costs["bytes"] == pytest.approx(memory(child, DEPLOYMENT).total, abs=1) and found.costs["bytes"] <= most
    )


def error_of(errors, taken) -> float:
    return sum(errors[layer].get(size, 0.0) for layer, size in taken.items() if size is not None)


@pytest.mark.parametrize("less", [1, 100, 10_000])
def test_a_limit_of_gigabytes_holds_to_the_byte(less):
    """The solver adds up to a millionth: what is a little too large seems to fit."""
    config, deployment = NemotronHConfig.from_preset("nemotron-h-8b"), Deployment("bf16", "bf16", "bf16")
    widths = {"intermediate_size": (8192, 16384, config.intermediate_size)}
    draw = random.Random(0).random
    errors = {
        layer: {0: 1 + draw(), 8192: 0.5 + draw() / 2, 16384: draw() / 2} for layer in range(config.num_hidden_layers)
    }
    costs = costs_of(deployment)
    most = best_mixed(config, errors, widths, {}, costs, {"bytes": 0.7 * memory(config, deployment).total}).costs[
        "bytes"
    ]
    found = best_mixed(config, errors, widths, {}, costs, {"bytes": most - less})
    assert memory(resolve(config, found.sizes).config, deployment).total <= most - less


def test_counts_hold_and_nothing_that_fits_is_an_error():
    config = tiny_config("dense")
    costs, limits = costs_of(DEPLOYMENT), {"bytes": 0.9 * memory(config, DEPLOYMENT).total}
    found = best_mixed(config, errors_of(config, 1), WIDTHS, {"mlp": [1, 1], "attention": [0, 0]}, costs, limits)
    assert found.counts["mlp"] == 1 and found.counts["attention"] == 0
    with pytest.raises(ValueError, match="budget=.*: allowed is limits"):
        best_mixed(config, errors_of(config, 1), WIDTHS, {}, costs, {"bytes": 1000.0})
