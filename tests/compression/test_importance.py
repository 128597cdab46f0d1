"""Importance scores against naive float64 loops over stored activations; orders against plain sorting."""

import pytest
import torch
from tiny import prompt, tiny_config, tiny_model
from torch import Tensor, nn

from nemotron_h_hf.compression.depth import Removal, errors_without, layer_order, num_passes, remove_layers
from nemotron_h_hf.compression.importance import (
    Importance,
    WidthScores,
    accumulate,
    importance_of,
    importance_order,
)
from nemotron_h_hf.elastic.masks import attach_masks
from nemotron_h_hf.elastic.prepare.measuring import logits_without


def batches(*sizes: int, length: int = 13) -> list[dict[str, Tensor]]:
    return [{"input_ids": prompt(size, length, seed=seed)} for seed, size in enumerate(sizes)]


def scores_of(model: nn.Module, given: list[dict[str, Tensor]]) -> WidthScores:
    scores = WidthScores.empty()
    for _ in accumulate(model, given, scores):
        pass
    return scores


@torch.no_grad()
def stored_activations(model: nn.Module, modules: dict[str, nn.Module], given: list[dict]) -> dict[str, list[tuple]]:
    """(inputs, output) of each module for every row, one row at a time, in float64."""
    model.double().set_experts_implementation("eager")
    seen: dict[str, list[tuple]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen[name].append((args, output)))
    for batch in given:
        for row in batch["input_ids"]:
            model.model(row[None], use_cache=False)
    return seen


def naive(rows: list[Tensor]) -> Tensor:
    """sqrt(sum over rows (mean over tokens |a|)^2), channel by channel, from (tokens, channels) for each row."""
    result = torch.zeros(rows[0].shape[1], dtype=torch.float64)
    for channel in range(len(result)):
        total = 0.0
        for row in rows:
            mean = sum(abs(float(value)) for value in row[:, channel]) / len(row)
            total += mean**2
        result[channel] = total**0.5
    return result


def test_dense_scores_are_those_of_naive_loops():
    model, given = tiny_model("list"), batches(2, 1)
    found = importance_of(model.config, scores_of(model, given))
    twin = tiny_model("list")
    layers = twin.model.layers
    modules = {f"norm.{i}": block.norm for i, block in enumerate(layers)} | {"norm.f": twin.model.norm_f}
    modules |= {"in_proj": layers[2].mixer.in_proj, "o_proj": layers[3].mixer.o_proj, "down": layers[4].mixer.down_proj}
    seen = stored_activations(twin, modules, given)

    norms = sum(naive([output[0] for _, output in seen[name]]) for name in seen if name.startswith("norm"))
    torch.testing.assert_close(found.hidden, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.neurons[4], naive([args[0][0] for args, _ in seen["down"]]), rtol=1e-4, atol=1e-7)
    x_part = naive([output[0, :, 64:128] for _, output in seen["in_proj"]]).view(8, 8)
    torch.testing.assert_close(found.channels[2], x_part, rtol=1e-5, atol=1e-7)
    heads = torch.tensor([sum(float(value) ** 2 for value in head) ** 0.5 for head in x_part], dtype=torch.float64)
    torch.testing.assert_close(found.heads[2], heads, rtol=1e-5, atol=0)
    queries = naive([args[0][0] for args, _ in seen["o_proj"]]).view(4, 16).norm(dim=1)
    torch.testing.assert_close(found.query_heads[3], queries, rtol=1e-5, atol=0)
    assert sorted(found.neurons) == [1, 4, 6] and sorted(found.heads) == [0, 2, 5] and not found.experts


@pytest.mark.parametrize("shape", ["moe", "latent"])
def test_expert_scores_are_those_of_naive_loops(shape):
    model, given = tiny_model(shape), batches(2, 1)
    found = importance_of(model.config, scores_of(model, given))
    twin = tiny_model(shape)
    mixer = twin.model.layers[1].mixer
    modules = {"experts": mixer.experts, "shared": mixer.shared_experts.down_proj}
    seen = stored_activations(twin, modules, given)
    experts, neurons = [], []
    for (tokens, indices, weights), _ in seen["experts"]:
        outputs, hiddens = torch.zeros(13, 8).double(), torch.zeros(13, 8, 24).double()
        for token in range(13):
            for slot, expert in enumerate(indices[token].tolist()):
                hidden = torch.relu(mixer.experts.up_proj[expert] @ tokens[token]) ** 2
                hiddens[token, expert] = hidden
                outputs[token, expert] = weights[token, slot] * (mixer.experts.down_proj[expert] @ hidden).norm()
        experts.append(outputs)
        neurons.append(hiddens.flatten(1))
    torch.testing.assert_close(found.experts[1], naive(experts), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.expert_neurons[1].flatten(), naive(neurons), rtol=1e-4, atol=1e-7)
    shared = naive([args[0][0] for args, _ in seen["shared"]])
    torch.testing.assert_close(found.shared_neurons[1], shared, rtol=1e-4, atol=1e-7)


def test_scores_do_not_depend_on_batches_parts_or_interruption(tmp_path):
    model = tiny_model("dense")
    given = batches(4, length=300)
    ids = given[0]["input_ids"]
    whole = scores_of(model, given)
    path = tmp_path / "width.safetensors"
    first = scores_of(model, [{"input_ids": ids[:3]}])
    first.save(path, "this")
    again = WidthScores.load(path, "this")
    model.model.tokens_per_pass = {"cpu": 100}  # 256 tokens at a time, the least
    for _ in accumulate(model, [{"input_ids": ids[3:]}], again):
        pass
    assert again.num_rows == whole.num_rows == 4 and set(again.sums) == set(whole.sums)
    for place, expected in whole.sums.items():
        torch.testing.assert_close(again.sums[place], expected, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="another model or other text"):
        WidthScores.load(path, "that")
    assert WidthScores.load(tmp_path / "none", "this").num_rows == 0


def test_hooks_are_gone_afterwards():
    model = tiny_model("moe")
    scores_of(model, batches(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_orders_stay_inside_their_groups():
    config = tiny_config("latent", n_routed_experts=8, n_group=4, num_nextn_predict_layers=1)
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    found = Importance(
        some(48), heads={i: some(8) for i in (0, 2, 5)}, channels={i: some(8, 8) for i in (0, 2, 5)},
        query_heads={3: some(4)}, experts={i: some(8) for i in (1, 4)},
        expert_neurons={i: some(8, 24) for i in (1, 4)}, shared_neurons={i: some(40) for i in (1, 4)},
    )  # fmt: skip
    order = importance_order(config, found)
    assert order.hidden.tolist() == sorted(range(48), key=lambda i: -found.hidden[i])
    for values, indices, groups in (
        (found.heads[2], order.heads[2], 2),
        (found.experts[4], order.experts[4], 4),
    ):
        size = len(values) // groups
        expected = [sorted(range(g * size, (g + 1) * size), key=lambda i: -values[i]) for g in range(groups)]
        assert indices.view(groups, size).tolist() == expected
    totals = found.query_heads[3].view(2, 2).square().sum(1)
    groups = sorted((0, 1), key=lambda g: -totals[g])
    assert order.key_value_heads[3].tolist() == groups
    expected = [h for g in groups for h in sorted((2 * g, 2 * g + 1), key=lambda h: -found.query_heads[3][h])]
    assert order.query_heads[3].tolist() == expected
    for row, head in enumerate(order.heads[2].tolist()):
        assert order.channels[2][row].tolist() == sorted(range(8), key=lambda c: -found.channels[2][head, c])
    for row, expert in enumerate(order.experts[4].tolist()):
        expected = sorted(range(24), key=lambda w: -found.expert_neurons[4][expert, w])
        assert order.expert_neurons[4][row].tolist() == expected
    assert order.experts[7].tolist() == list(range(8))  # multi-token prediction: nothing ran, nothing moves
    assert order.query_heads[6].tolist() == list(range(4))


@torch.no_grad()
def test_depth_scores_are_normalised_errors_of_logits_without_a_layer():
    model, given = tiny_model("dense"), batches(2, 1)
    masked = attach_masks(model)
    found = errors_without(logits_without(model, masked), given, frozenset({1}), [0, 3, 6])
    masked.remove()
    whole = [model(**batch).logits.double() for batch in given]
    for layer, score in found.items():
        twin = tiny_model("dense")
        for index in (1, layer):  # a layer that adds nothing
            mixer = twin.model.layers[index].mixer
            for name in ("out_proj", "o_proj", "down_proj"):
                if name in dict(mixer.named_children()):
                    mixer.get_submodule(name).weight.zero_()
        errors = [(full - twin(**batch).logits.double()).square().sum() for full, batch in zip(whole, given)]
        expected = float(sum(errors) / sum(full.square().sum() for full in whole))
        assert score == pytest.approx(expected, rel=1e-4)


def test_layers_go_one_after_another_and_an_interruption_changes_nothing():
    """Logits are a sum of one number per layer, but layers 1 and 2 can replace each other."""
    weight = {0: 4.0, 1: 0.1, 2: 0.1, 3: 1.0, 4: 2.0}
    passes = []

    def logits(batch: dict, gone: frozenset) -> Tensor:
        total = sum(value for layer, value in weight.items() if layer not in gone)
        return torch.tensor([[[total - (6.0 if {1, 2} <= gone else 0.0)]]])

    removals = list(remove_layers(logits, [{}], 5, 3, passed=lambda: passes.append(1)))
    assert [removal.layer for removal in removals] == [1, 3, 4]
    assert len(passes) == num_passes(5, 3) == 6 + 5 + 4
    assert removals[0].scores[3] == pytest.approx(1.0**2 / 7.2**2)
    assert list(remove_layers(logits, [{}], 5, 3, removals[:2])) == removals[2:]
    assert layer_order(removals) == [1, 3, 4, 0, 2]
    assert layer_order([Removal(1, {0: 0.5, 1: 0.1, 2: 0.2})]) == [1, 2, 0]
    with pytest.raises(ValueError, match="num_removals=5"):
        list(remove_layers(logits, [{}], 5, 5))


def test_neurons_may_be_scored_before_the_activation():
    model, given = tiny_model("list"), batches(2, 1)
    scores = WidthScores.empty()
    for _ in accumulate(model, given, scores, before_activation=True):
        pass
    twin = tiny_model("list")
    seen = stored_activations(twin, {"up": twin.model.layers[1].mixer.up_proj}, given)["up"]
    expected = naive([result[0] for _, result in seen])
    assert scores.statistic("neurons.1").tolist() == pytest.approx(expected.tolist(), rel=1e-4)
