"""Candidates as blocks of one memory image, against models that are cut out and run alone."""

import json

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import AutoModelForCausalLM

from nemotron_h_hf import NemotronHElasticForCausalLM
from nemotron_h_hf.compression.candidates import Candidate
from nemotron_h_hf.compression.ranking import Progress, in_order, places, rank

SIZES = {
    "a": {"layers": [0, 1, 2, 3, 4], "intermediate_size": 48},
    "b": {"layers": [0, 1, 2, 3, 5], "intermediate_size": 48},
    "c": {"layers": [0, 2, 3, 4, 6], "intermediate_size": 80},
    "d": {"layers": [0, 1, 2, 3, 4, 6], "intermediate_size": [16, 80, 8]},
    "e": {"layers": [0, 1, 3, 5], "hidden_size": 32},
}
EXPERTS = {
    "a": {"layers": [0, 1, 2, 3, 4], "moe_intermediate_size": [16, 24]},
    "b": {"layers": [0, 1, 3, 4], "moe_intermediate_size": 16},
}


def candidates_of(sizes: dict) -> list[Candidate]:
    return [Candidate(name, one, {}, {}) for name, one in sizes.items()]


CANDIDATES = candidates_of(SIZES)


def text() -> list[dict]:
    places = torch.cat([torch.arange(9), torch.arange(6)]).expand(2, -1)
    return [{"input_ids": prompt(2, 15, seed=seed), "position_ids": places} for seed in range(3)]


def model_of(parent):
    kept = {}
    return lambda sizes: kept.setdefault(str(sizes), parent.submodel(sizes))


def run(parent, progress=None, stop=None, candidates=CANDIDATES):
    progress = progress or Progress()
    for number, _ in enumerate(rank(parent, model_of(parent), candidates, text(), progress)):
        if number == stop:
            break
    return progress


@pytest.mark.parametrize(("shape", "given"), [("dense", SIZES), ("moe", EXPERTS)])
def test_figures_are_those_of_models_cut_out(shape, given, tmp_path):
    model, whole = tiny_model(shape), tiny_model(shape)
    parent = NemotronHElasticForCausalLM.from_model(model)
    tallies = run(parent, candidates=candidates_of(given)).tallies
    for name, sizes in given.items():
        parent.submodel(sizes).save_pretrained(tmp_path / name)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        correct = agreeing = count = 0
        nats = 0.0
        with torch.no_grad():
            for batch in text():
                ids = batch["input_ids"]
                logits, known = (m(**batch, use_cache=False).logits[:, :-1] for m in (alone, whole))
                correct += int((logits.argmax(-1) == ids[:, 1:]).sum())
                agreeing += int((logits.argmax(-1) == known.argmax(-1)).sum())
                nats -= float(logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum())
                count += ids[:, 1:].numel()
        found = tallies[name]
        assert (found.correct, found.agreeing, found.num_tokens) == (correct, agreeing, count)
        assert found.nats == pytest.approx(nats, rel=1e-5)


def test_shared_beginnings_run_once_and_nothing_is_copied():
    parent = NemotronHElasticForCausalLM.from_model(tiny_model("dense"))
    run_layers = sum(tally.layers_run for tally in run(parent).tallies.values())
    alone = sum(len(sizes["layers"]) for sizes in SIZES.values())
    assert run_layers == 3 * (alone - 4)  # three batches; b has a's first four layers
    assert parent.submodel({"intermediate_size": 48}).shared_bytes()["copies"] < 0.05 * sum(
        weight.nbytes for weight in parent.parameters()
    )


def test_a_parent_agrees_with_itself():
    parent = NemotronHElasticForCausalLM.from_model(tiny_model("dense"))
    result = run(parent).parent.result()
    assert result["agreement"] == 1.0 and 0 <= result["accuracy"] < 1


@pytest.mark.parametrize("stop", [0, 2, 4, 7])
def test_an_interrupted_ranking_goes_on(stop):
    parent = NemotronHElasticForCausalLM.from_model(tiny_model("dense"))
    whole = run(parent)
    part = run(parent, stop=stop)
    again = run(parent, Progress.from_dict(json.loads(json.dumps(part.to_dict()))))
    for name, tally in whole.tallies.items():
        other = again.tallies[name]
        assert (tally.correct, tally.agreeing, tally.num_tokens) == (other.correct, other.agreeing, other.num_tokens)
    assert again.parent.num_tokens == whole.parent.num_tokens


def test_order_and_places():
    names = [one.name for one in in_order(CANDIDATES)]
    assert sorted(names) == sorted(SIZES) and names.index("b") == names.index("a") + 1
    results = {"x": {"accuracy": 0.5, "agreement": 0.9}, "y": {"accuracy": 0.6, "agreement": 0.8},
               "z": {"accuracy": 0.4, "agreement": 0.7}}  # fmt: skip
    assert places(results) == {"x": 0.5, "y": 0.5, "z": 2.0}
