"""Layer scores against models that are built without the layer, run row by row in float64."""

import copy

import pytest
import torch
from tiny import prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHElasticForCausalLM
from nemotron_h_hf.compression.layer_scores import MEASURES, LayerScores, accumulate, errors_of

pytestmark = pytest.mark.usefixtures("no_grad")


def without(model: nn.Module, layer: int) -> nn.Module:
    twin = copy.deepcopy(model)
    del twin.model.layers[layer]
    return twin


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_errors_are_those_of_models_without_the_layer(shape):
    model, ids = tiny_model(shape).double(), prompt(2, 13)
    found = errors_of(model, {"input_ids": ids}, MEASURES, {})
    whole = model.model(ids).last_hidden_state
    for layer in range(len(model.model.layers)):
        other = without(model, layer).model(ids).last_hidden_state
        for row in range(2):
            expected = sum(float(d) ** 2 for d in (whole - other)[row].flatten()) / whole[row].numel()
            assert found["hidden"][str(layer)][row] == pytest.approx(expected, rel=1e-4)
            logits, changed = model.lm_head(whole[row]), model.lm_head(other[row])
            expected = float((logits - changed).square().sum() / logits.square().sum())
            assert found["logits"][str(layer)][row] == pytest.approx(expected, rel=1e-4)


def test_cosine_is_that_of_what_enters_and_leaves():
    model, ids = tiny_model("dense").double(), prompt(1, 11)
    states = model.model(ids, output_hidden_states=True).hidden_states  # the last one is behind the norm
    found = errors_of(model, {"input_ids": ids}, ["cosine"], {})["cosine"]
    for layer in range(len(states) - 2):
        pairs = zip(states[layer][0], states[layer + 1][0])
        each = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        assert found[str(layer)][0] == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_narrower_layers_are_those_of_a_submodel():
    model, ids = tiny_model("dense"), prompt(2, 9)
    whole = model.model(ids).last_hidden_state
    parent = NemotronHElasticForCausalLM.from_model(model)
    narrow = parent.submodel({"intermediate_size": 48})
    blocks = {layer: {48: narrow.model.layers[layer]} for layer in (1, 4, 6)}
    found = errors_of(parent, {"input_ids": ids}, ["hidden"], blocks)["hidden"]
    sizes = [80, 80, 80]
    for at, layer in enumerate((1, 4, 6)):
        one = parent.submodel({"intermediate_size": [*sizes[:at], 48, *sizes[at + 1 :]]})
        error = (whole - one.model(ids).last_hidden_state).square().flatten(1).mean(1)
        assert found[f"{layer}:48"] == pytest.approx(error.tolist(), rel=1e-4)


def test_documents_and_long_rows_are_seen_as_by_the_model():
    """Packed documents stay apart, and a row longer than a pass is not run in parts."""
    model, ids = tiny_model("dense"), prompt(1, 1500)
    places = torch.cat([torch.arange(700), torch.arange(800)])[None]
    for batch in ({"input_ids": ids}, {"input_ids": ids, "position_ids": places}):
        found = errors_of(model, batch, ["hidden"], {})["hidden"]
        other = without(model, 3).model(**batch, use_cache=False).last_hidden_state
        expected = (model.model(**batch, use_cache=False).last_hidden_state - other).square().mean()
        assert found["3"][0] == pytest.approx(float(expected), rel=1e-3)


def test_ranks_are_averaged_over_samples():
    """One sample with large errors decides over the mean and not over the ranks."""
    errors = {"0": [1.0, 1.0, 900.0], "1": [2.0, 2.0, 100.0], "2": [3.0, 3.0, 1.0]}
    scores = LayerScores({"hidden": errors})
    assert scores.importance(reduce="rank") == pytest.approx({0: 2 / 3, 1: 1.0, 2: 4 / 3})
    mean = scores.importance(reduce="mean")
    assert sorted(mean, key=mean.get) == [2, 1, 0] and mean[0] == pytest.approx(902 / 3)


def test_batches_add_up():
    model = tiny_model("dense")
    ids, apart, together = prompt(3, 8), LayerScores(), LayerScores()
    assert list(accumulate(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], apart, ["hidden"])) == [1, 3]
    list(accumulate(model, [{"input_ids": ids}], together, ["hidden"]))
    for branch, errors in together.errors["hidden"].items():
        assert apart.errors["hidden"][branch] == pytest.approx(errors, rel=1e-4)


def test_all_layers_cost_half_of_a_forward_each():
    model, runs = tiny_model("dense"), []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: runs.append(1))
    errors_of(model, {"input_ids": prompt(1, 5)}, ["hidden"], {})
    count = len(model.model.layers)
    assert len(runs) == count + count * (count - 1) // 2


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match="layer_scores='norm'"):
        next(accumulate(tiny_model("dense"), [{"input_ids": prompt(1, 5)}], LayerScores(), ["norm"]))
    with pytest.raises(ValueError, match="reduce"):
        LayerScores({"hidden": {"0": [1.0]}}).importance(reduce="median")
