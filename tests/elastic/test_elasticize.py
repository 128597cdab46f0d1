"""Parents: the permuted model is the same function, every budget is a prefix with the loss that was measured, and resuming."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from test_masks import cut_out, saved_tensors
from tiny import prompt, tiny_config, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHElasticForCausalLM, NemotronHModel
from nemotron_h_hf.compression.importance import Importance, WidthScores, importance_order
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.budgets import Budget, read_elastic
from nemotron_h_hf.elastic.prepare import measuring
from nemotron_h_hf.elastic.prepare.defaults import default_budgets, default_choices, default_depths, size_name
from nemotron_h_hf.elastic.prepare.elasticize import elasticize
from nemotron_h_hf.elastic.prepare.measuring import mean_loss
from nemotron_h_hf.elastic.prepare.permuting import permute_checkpoint, permute_model
from nemotron_h_hf.elastic.prepare.scores import write_scores
from nemotron_h_hf.elastic.prepare.scores_plot import draw_scores
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import Checkpoint
from nemotron_h_hf.slicing import Kept, everything

MTP = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
SIZES_BY_LAYER = {"mamba_num_heads": [4, 8, 2], "mamba_head_dim": [8, 3, 5], "intermediate_size": [24, 80, 8]}
CASES = {
    "dense": ("dense", BIASES),
    "tied": ("dense", {"tie_word_embeddings": True}),
    "list": ("list", SIZES_BY_LAYER),
    "moe": ("moe", {**BIASES, **MTP}),
    "latent": ("latent", {**BIASES, **MTP}),
}


def random_order(config: NemotronHConfig, seed: int = 0) -> Kept:
    """Everything in an order that means nothing, inside its groups."""
    generator = torch.Generator().manual_seed(seed)
    own = everything(config)
    values = {
        name: {
            index: torch.rand(indices.shape, generator=generator)
            for index, indices in getattr(own, name).items()
            if index < config.num_hidden_layers
        }
        for name in ("neurons", "heads", "channels", "query_heads", "experts", "expert_neurons", "shared_neurons")
    }
    return importance_order(config, Importance(torch.rand(config.hidden_size, generator=generator), **values))


def text(num_rows: int, seed: int = 0, length: int = 33) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row} for row in prompt(num_rows, length, seed=seed)]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_permuted_model_computes_the_same(case):
    shape, overrides = CASES[case]
    model = tiny_model(shape, **overrides)
    before, weights = model(prompt(2, 21)).logits, copy.deepcopy(model.state_dict())
    permute_model(model, random_order(model.config))
    near = 1e-5 * max(1.0, float(before.std()))  # tied logits are large
    torch.testing.assert_close(model(prompt(2, 21)).logits, before, rtol=0, atol=near)
    after = model.state_dict()
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, weights[name])]
    assert len(moved) > 0.8 * len(after)


@torch.no_grad()
def test_multi_token_prediction_reads_the_permuted_hidden_channels_and_is_left_alone_inside():
    model = tiny_model("latent", **MTP)
    order, before = random_order(model.config), copy.deepcopy(model.mtp)
    permute_model(model, order)
    hidden = order.hidden
    both = torch.cat([hidden, 48 + hidden])
    attention, moe = model.mtp.layers
    assert torch.equal(attention.eh_proj.weight, before.layers[0].eh_proj.weight[hidden][:, both])
    assert torch.equal(attention.mixer.q_proj.weight, before.layers[0].mixer.q_proj.weight[:, hidden])
    assert torch.equal(attention.mixer.o_proj.weight, before.layers[0].mixer.o_proj.weight[hidden])
    assert torch.equal(moe.mixer.experts.up_proj, before.layers[1].mixer.experts.up_proj)
    assert torch.equal(moe.mixer.gate.weight, before.layers[1].mixer.gate.weight[:, hidden])
    assert torch.equal(moe.final_layernorm.weight, before.layers[1].final_layernorm.weight[hidden])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_permuted_checkpoint_is_the_permuted_model(case, tmp_path):
    shape, overrides = CASES[case]
    model = tiny_model(shape, **overrides)
    model.model.layers[0].mixer.in_proj.bfloat16()
    order = random_order(model.config)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    stored = Checkpoint(tmp_path / "source")
    permute_checkpoint(tmp_path / "source", model.config, order, tmp_path / "parent")
    permute_model(model, order)
    expected, found = saved_tensors(model), Checkpoint(tmp_path / "parent")
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(found) == set(stored) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == stored[name].dtype and torch.equal(found[name], tensor)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    model = tiny_model("dense")
    model.save_pretrained(tmp_path / "source")
    config = tiny_config("dense", hidden_size=32)
    with pytest.raises(ValueError, match=r"backbone.embeddings.weight in shape \(97, 48\)"):
        permute_checkpoint(tmp_path / "source", config, everything(config), tmp_path / "parent")
    config = tiny_config("dense", hybrid_override_pattern="M-M*-M")
    with pytest.raises(ValueError, match="backbone.layers.6.*no place"):
        permute_checkpoint(tmp_path / "source", config, everything(config), tmp_path / "parent")
    assert not (tmp_path / "parent").exists()


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_budgets_have_the_losses_of_what_would_be_cut_out(shape):
    model = tiny_model(shape)
    before = model(prompt(2, 21)).logits
    budgets = {"half": {"hidden_size": 32, "mamba_num_heads": 4, "depth": 4}, "narrow": {"hidden_size": 40}}
    held_out = text(3, seed=9)
    parent = elasticize(
        model, text(6), held_out, budgets, {"hidden_size": [32, 40], "mamba_head_dim": [4]}, batch_size=4
    )
    torch.testing.assert_close(model(prompt(2, 21)).logits, before, rtol=0, atol=1e-5)
    elastic = read_elastic(model.config)
    assert elastic == parent.elastic and list(elastic.budgets) == ["half", "narrow"]
    assert elastic.choices == {"hidden_size": (48, 40, 32), "mamba_head_dim": (8, 4)}
    count = model.config.num_hidden_layers
    kept = elastic.budgets["half"].layers
    assert len(kept) == 4 and set(kept).isdisjoint(elastic.layer_order[: count - 4])
    assert sorted(elastic.layer_order) == list(range(count))
    known = elastic.calibration
    checks = [(budget, budget.loss) for budget in elastic.budgets.values()]
    checks += [(Budget(name="one", hidden_size=32), known["hidden_size"]["32"])]
    checks += [(Budget(name="one", mamba_head_dim=4), known["mamba_head_dim"]["4"])]
    checks += [(Budget(name="one", layers=tuple(sorted(elastic.layer_order[-int(depth) :]))), loss)
               for depth, loss in known["layers"].items()]  # fmt: skip
    checks += [(Budget(name="whole"), known["loss"])]
    for budget, loss in checks:
        small = cut_out(model, budget)
        logits = torch.cat([small(row["input_ids"][None]).logits[0, :-1] for row in held_out])
        labels = torch.cat([row["input_ids"][1:] for row in held_out])
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=2e-5)


def test_the_order_is_by_importance_and_better_first_halves_lose_less():
    """Neurons that do nothing, spread over a layer, are last in the parent and cost nothing to cut away."""
    model = tiny_model("dense")
    idle = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:40]
    with torch.no_grad():
        for index in (1, 4, 6):
            model.model.layers[index].mixer.up_proj.weight[idle] = 0
    held_out = text(2, seed=9)
    before = mean_loss(model, held_out, 2)
    parent = elasticize(model, text(4), held_out, {"half": {"intermediate_size": 40}}, {}, depth_rows=[])
    assert set(parent.order.neurons[4][40:].tolist()) == set(idle.tolist())
    assert parent.elastic.budgets["half"].loss == pytest.approx(before, abs=1e-5)
    assert parent.elastic.layer_order == () and "layers" not in parent.elastic.calibration


def test_default_budgets_are_three_quarters_and_a_half():
    for shape in ("dense", "list", "moe", "latent"):
        config = tiny_config(shape, hidden_size=256, mamba_num_heads=16)
        budgets = default_budgets(config)
        sizes = [num_parameters(resolve(config, budget).config) for budget in budgets]
        for size, share in zip(sizes, (0.75, 0.5), strict=True):
            assert 0.9 * share < size / num_parameters(config) <= share
        assert [budget.name for budget in budgets] == [size_name(size) for size in sizes]
        choices = default_choices(config)
        assert choices["hidden_size"] == [256, 224, 192, 160, 128]
        assert ("intermediate_size" in choices) == (shape == "dense")
    assert default_budgets(NemotronHConfig.from_preset("nano-9b-v2"))[0].hidden_size % 64 == 0
    assert size_name(8_888_227_840) == "8.89b"
    assert default_depths(NemotronHConfig.from_preset("nano-9b-v2"), 28) == [49, 42, 35, 28]
    assert default_depths(tiny_config("dense"), 4) == [6, 5, 4]


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    def run(model, **more):
        few = {"budgets": {"a": {"depth": 4}}, "choices": {"hidden_size": [32]}}
        return elasticize(model, text(6), text(2, seed=9), **few, batch_size=2, **more)

    expected = run(tiny_model("moe"))
    monkeypatch.setattr(measuring, "SAVE_EVERY_SECONDS", 0.0)
    calls = interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("moe"), work=tmp_path)  # after two batches of three
    assert WidthScores.load(tmp_path / "width.safetensors", mark_of(tmp_path)).num_rows == 4
    calls.append(30)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("moe"), work=tmp_path)  # in the middle of depth
    removed = len(json.loads((tmp_path / "depth.json").read_text())["removals"])
    assert 0 < removed < 3
    calls.append(10**9)
    found = run(tiny_model("moe"), work=tmp_path)
    assert found.elastic == expected.elastic and found.removals == expected.removals
    forwards = count_forwards(monkeypatch)
    run(tiny_model("moe"), work=tmp_path)
    assert not forwards
    with pytest.raises(ValueError, match="another model or other text"):
        run(tiny_model("moe", seed=1), work=tmp_path)


def mark_of(folder) -> str:
    with safe_open(folder / "width.safetensors", framework="pt") as file:
        return file.metadata()["fingerprint"]


def interrupt_after(monkeypatch, num_forwards: int) -> list[int]:
    """Ctrl-C in the forward with this number; append another to resume."""
    limits, done, forward = [num_forwards], [], NemotronHModel.forward

    def counted(self, *args, **kwargs):
        done.append(1)
        if len(done) > sum(limits):
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NemotronHModel, "forward", counted)
    return limits


def count_forwards(monkeypatch) -> list[int]:
    forwards, forward = [], NemotronHModel.forward

    def counted(self, *args, **kwargs):
        forwards.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NemotronHModel, "forward", counted)
    return forwards


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budgets": {"a": {"depth": 8}}}, "depth=8 of budget 'a': allowed is 1 to 7"),
        ({"budgets": {"a": {"depth": 5}}, "depth_rows": []}, "the layers are not scored"),
        ({"budgets": {"a": {"depth": 5, "layers": [0]}}}, "depth or layers, not both"),
        ({"budgets": {"a": {"mamba_num_heads": 5}}}, "mamba_num_heads=5 of budget 'a': allowed is a multiple of 2"),
        ({"budgets": {"a": {"hidden_size": 64}}}, "hidden_size=64 of budget 'a': allowed is at most the parent's 48"),
        ({"budgets": {"a": {"width": 3}}}, "budget 'a' has 'width'"),
        ({"choices": {"width": [3]}}, "choices='width'"),
        ({"choices": {"hidden_size": [64]}}, "at most the parent's 48"),
        ({"held_out": []}, "held_out=\\[]"),
        ({"num_removals": 7}, "num_removals=7"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    model = tiny_model("dense")
    with pytest.raises(ValueError, match=message):
        elasticize(model, **{"rows": text(2), "held_out": text(1, seed=9), **arguments})
    assert model.config.elastic is None


def test_a_parent_is_not_made_twice():
    model = tiny_model("dense")
    elasticize(model, text(2), text(1, seed=9), {"a": {"hidden_size": 32}}, {}, depth_rows=[])
    with pytest.raises(ValueError, match="this is a parent already"):
        elasticize(model, text(2), text(1, seed=9))


def test_a_live_parent_is_refused():
    live = NemotronHElasticForCausalLM.from_model(tiny_model("dense"))
    before = live(prompt()).logits
    with pytest.raises(ValueError, match="keeps its weights in the order of budgets: allowed is the ordinary model"):
        elasticize(live, text(2), text(1, seed=9))
    assert torch.equal(live(prompt()).logits, before)


def test_scores_of_experts_and_their_neurons_are_written_and_drawn(tmp_path):
    model = tiny_model("moe")
    parent = elasticize(model, text(4), text(1, seed=9), {"a": {"hidden_size": 32}}, {}, depth_rows=[])
    write_scores(tmp_path / "scores.json", parent.importance, parent.removals)
    written = json.loads((tmp_path / "scores_expert_neurons.json").read_text())
    assert written.keys() == {str(index) for index in parent.importance.expert_neurons}
    for index, scores in parent.importance.expert_neurons.items():
        torch.testing.assert_close(torch.tensor(written[str(index)]).double(), scores.double(), rtol=1e-4, atol=0)
    drawn = {path.name for path in draw_scores(tmp_path, parent)}
    assert {"scores_experts.png", "scores_expert_neurons.png"} <= drawn
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)
