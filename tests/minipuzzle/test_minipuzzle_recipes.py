"""The recipes of minipuzzle: the paper's numbers, its candidates, and options that `distill` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.compression.candidates import costs_of, find_candidates
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.minipuzzle import distilling
from nemotron_h_hf.minipuzzle.arguments import OF_DISTILL, MiniPuzzleArguments
from nemotron_h_hf.minipuzzle.run import Run
from nemotron_h_hf.minipuzzle.text import Files
from nemotron_h_hf.training.arguments import parse

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def read(recipe: str, *words: str) -> MiniPuzzleArguments:
    (arguments,) = parse((MiniPuzzleArguments,), ["--config", str(RECIPES / f"{recipe}.yaml"), *words], "", "")
    return arguments


def test_the_papers_recipe():
    arguments = read("minipuzzle_56b_to_47b")
    assert (arguments.layer_samples, arguments.width_samples, arguments.top, arguments.finalists) == (128, 1024, 130, 3)
    assert (arguments.short_tokens, arguments.long_tokens) == (7 * 10**9, 63 * 10**9)
    assert arguments.deployment.num_tokens == 1_000_000 and arguments.limits() == {"bytes": 31.7 * 2**30}
    config = NemotronHConfig.from_preset("nemotron-h-56b")
    found, all_counts = (
        find_candidates(
            config, dict.fromkeys(range(config.num_hidden_layers), 0.0), arguments.sizes, counts,
            costs_of(arguments.deployment), arguments.limits(),
        )
        for counts in (arguments.counts, {})
    )  # fmt: skip
    assert "a5-m45-f48-w30720" in {one.name for one in found.candidates} and 130 < len(found.candidates) < 800
    told = (all_counts.num_models, all_counts.num_fitting, len(all_counts.candidates))
    assert told == (262_440, 222_048, 1_618) and "a5-m45-f48-w30720" in {one.name for one in all_counts.candidates}
    guide = (RECIPES.parents[1] / "docs" / "compress.md").read_text()
    assert all(f"{number:,}" in guide for number in told)


@pytest.mark.parametrize("recipe", ["minipuzzle_56b_to_47b", "minipuzzle_tiny"])
def test_options_of_distillation_are_accepted(recipe, tmp_path, monkeypatch):
    """As the stages give them; the launcher, where there is one, takes our words behind its own."""
    arguments = read(recipe, "--teacher", EMBEDDED_MODEL, "--work", str(tmp_path), "--device", "cpu", "--seed=3")
    seen = []
    monkeypatch.setattr(distilling, "command", lambda run, words: seen.extend(words))
    monkeypatch.setattr(distilling, "read_json", lambda path: {"before": 1.0, "after": 0.5})
    run = Run(arguments, tmp_path)
    run.text.files = lambda: Files(["train.jsonl"], ["held_out.jsonl"])
    distilling.distill(run, tmp_path / "start", tmp_path / "out", arguments.short_tokens, 3)
    words = [word for word in seen if not word.startswith(("--bf16", "--attention", "--fp8"))]
    *_, start, training = parse(OF_DISTILL, words, "", "nemotron-h distill")
    assert training.seed == 3 and training.sequence_length == arguments.sequence_length
    assert training.max_steps == arguments.short_tokens // training.tokens_per_step > 0
    assert start.tokenizer == str(run.teacher)


def test_the_tiny_recipe_leaves_room_for_every_rule():
    arguments, config = (
        read("minipuzzle_tiny", "--teacher", "x", "--work", "y"),
        NemotronHConfig.from_pretrained(EMBEDDED_MODEL),
    )
    found = find_candidates(
        config, dict.fromkeys(range(7), 0.0), arguments.sizes, {}, costs_of(arguments.deployment), arguments.limits()
    )
    layers = {len(one.sizes["layers"]) for one in found.candidates}
    assert max(layers) == 7 and min(layers) <= 5 and len(found.candidates) >= 5
    assert all(one.costs["parameters"] < 0.81 * num_parameters(config) for one in found.candidates)
