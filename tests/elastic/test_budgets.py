"""Budgets in the configuration, and finding one: names, fractions and needs against counting by hand, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as NativeConfig
from transformers.utils import logging

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.cost import cache_bytes, num_parameters, weight_bytes
from nemotron_h_hf.elastic.budgets import Budget, read_elastic
from nemotron_h_hf.elastic.cut.other_readers import nearest_expressible
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.elastic.search import Limit, _Combinations, _combinations, predict_loss, rank_budgets
from nemotron_h_hf.scripts import info

ELASTIC = {
    "version": 1,
    "budgets": {
        "full": {"trained": True, "loss": 1.5},
        "half": {"hidden_size": 32, "mamba_num_heads": 4, "trained": True, "loss": 1.95},
        "mixed": {"intermediate_size": [80, 24, 8], "layers": [0, 1, 2, 3, 4, 5, 6]},
    },
    "choices": {"hidden_size": [48, 40, 32], "mamba_num_heads": [8, 4], "intermediate_size": [64, 40]},
    "layer_order": [6, 3, 1, 0, 2, 4, 5],
    "calibration": {
        "loss": 1.5,
        "hidden_size": {"40": 1.6, "32": 1.9},
        "mamba_num_heads": {"4": 1.7},
        "intermediate_size": {"64": 1.51, "40": 1.57},
        "layers": {"6": 1.6, "5": 2.0},
    },
}


def parent(shape: str = "dense", **changes) -> NemotronHConfig:
    return tiny_config(shape, elastic={**ELASTIC, **changes})


def without(*names: str) -> dict:
    return {key: value for key, value in ELASTIC.items() if key not in names}


# In the configuration.


def test_survives_saving_and_stock_readers_ignore_it(tmp_path):
    config = parent()
    config.save_pretrained(tmp_path)
    again = NemotronHConfig.from_pretrained(tmp_path)
    assert again.elastic == ELASTIC and read_elastic(again).budgets["half"].hidden_size == 32
    stock = NativeConfig.from_pretrained(tmp_path)
    assert (stock.hidden_size, stock.mamba_num_heads, stock.num_hidden_layers) == (48, 8, 7)


def test_budgets_are_taken_away_and_replaced_like_any_field(tmp_path):
    parent().save_pretrained(tmp_path)
    for none in (tiny_config("dense", elastic=None), NemotronHConfig.from_pretrained(tmp_path, elastic=None)):
        assert none.elastic is None and "elastic" not in none.to_dict()
    wide = {"version": 1, "budgets": {"x": {"hidden_size": 3200}}}
    with pytest.raises(ValueError, match="at most the parent's 48"):
        NemotronHConfig.from_pretrained(tmp_path, elastic=wide)
    config = parent()
    config.elastic = wide
    with pytest.raises(ValueError, match="at most the parent's 48"):
        config.save_pretrained(tmp_path / "again")


def test_resolves_to_a_plain_configuration():
    child = resolve(parent(), resolve(parent(), "half").budget).config
    assert child.elastic is None and "elastic" not in child.to_dict()
    assert (child.hidden_size, child.mamba_num_heads, child.intermediate_size) == (32, 4, 80)
    mixed = resolve(parent(), Budget(name="x", layers=(0, 1, 3, 4), intermediate_size=(24, 8))).config
    assert (mixed.hybrid_override_pattern, mixed.intermediate_size) == ("M-*-", [24, 8])
    same = resolve(parent(), Budget(name="x", intermediate_size=(8, 8, 8))).config
    assert same.intermediate_size == 8  # what stock readers take


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"hidden_size": 64}, "hidden_size=64 of budget 'x': allowed is at most the parent's 48"),
        ({"mamba_num_heads": 3}, "mamba_num_heads=3 of budget 'x': allowed is a multiple of 2"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 of budget 'x': allowed is a multiple of 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 of budget 'x': allowed is at most the parent's 2"),
        ({"num_key_value_heads": [1]}, "num_key_value_heads"),
        (
            {"num_key_value_heads": 1, "num_attention_heads": 3},
            "num_attention_heads=3 of .*: allowed is at most the parent's 2",
        ),
        ({"num_experts_per_tok": 1}, "the parent has no experts"),
        ({"intermediate_size": [8, 8]}, "allowed is one size, or one for each of 3 layers"),
        ({"intermediate_size": [8, 8, 81]}, "allowed is at most the parent's 80"),
        ({"hidden_size": 0}, "hidden_size=0 of budget 'x': allowed is a positive integer"),
        ({"hidden_size": [32]}, "hidden_size"),
        ({"layers": [0, 7]}, "some of the layers 0 to 6"),
        ({"layers": [1, 0]}, "ascending"),
        ({"layers": []}, "layers"),
        ({"layers": 3}, "layers=3 of budget 'x': allowed is a list"),
        ({"layers": "ab"}, "layers='ab' of budget 'x': allowed is a list"),
        ({"loss": "low"}, "loss='low' of budget 'x': allowed is a number"),
        ({"trained": "no"}, "trained='no' of budget 'x': allowed is true or false"),
        ({"n_routed_experts": 4}, "the parent has no experts"),
        ({"width": 4}, "budget 'x' has 'width': allowed are"),
        (7, "budget 'x' is 7: allowed is an object"),
    ],
)
def test_a_budget_outside_of_its_parent_is_refused(entry, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parent(budgets={"x": entry})
    if isinstance(entry, dict):
        with pytest.raises(ValueError, match=message.replace("'x'", "'custom'")):
            resolve(parent(), entry)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "elastic.version=2: allowed is 1"),
        ({"speed": 3}, "elastic.speed"),
        ({"layer_order": [0, 1]}, "elastic.layer_order"),
        ({"choices": {"hidden_size": [32, 48]}}, "largest first"),
        ({"choices": {"mamba_num_heads": [8, 3]}}, "a multiple of 2"),
        ({"choices": {"vocab_size": [8]}}, "elastic.choices.vocab_size"),
        ({"choices": {"num_experts_per_tok": [1]}}, "elastic.choices.num_experts_per_tok"),
        ({"budgets": [1]}, "elastic.budgets"),
        ({"choices": {"hidden_size": 32}}, "elastic.choices.hidden_size=32: allowed are positive integers"),
        ({"layer_order": 5}, "elastic.layer_order=5: allowed is a list"),
        ({"layer_order": ["a", 1, 2, 3, 4, 5, 6]}, "elastic.layer_order"),
        ({"layer_order": "0123456"}, "elastic.layer_order='0123456'"),
        ({"calibration": 5}, "elastic.calibration=5: allowed is an object"),
        ({"calibration": {"loss": float("nan")}}, "elastic.calibration.loss=nan: allowed is a number"),
        ({"calibration": {"loss": "low"}}, "elastic.calibration.loss='low': allowed is a number"),
        ({"calibration": {"loss": 1.5, "hidden_size": [1, 2]}}, "elastic.calibration.hidden_size"),
        ({"calibration": {"loss": 1.5, "layers": {"6": "low"}}}, "elastic.calibration.layers"),
        ({"calibration": {"loss": 1.5, "speed": {}}}, "elastic.calibration.speed: allowed are loss, layers"),
    ],
)
def test_a_damaged_entry_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parent(**change)


# Names, fractions and needs.


def test_by_name_mapping_and_json():
    config = parent()
    assert resolve(config, "half").budget == read_elastic(config).budgets["half"]
    own = resolve(config, {"hidden_size": 16, "layers": [0, 1]}).budget
    assert own == Budget(name="custom", hidden_size=16, layers=(0, 1))
    assert resolve(config, '{"hidden_size": 16, "layers": [0, 1]}').budget == own
    assert resolve(config, own).budget is own
    assert resolve(tiny_config("dense"), {"hidden_size": 16}).budget.hidden_size == 16  # any model has prefixes


@pytest.mark.parametrize("request_", ["6b", "7 apples", "50%%", "7GiB@", "-1", 0, 1.5, "0%", True, "{}}", "7iB"])
def test_what_is_no_budget_is_refused(request_):
    with pytest.raises(ValueError, match="budget="):
        resolve(parent(), request_)
    with pytest.raises(ValueError, match="'full', 'half', 'mixed', a fraction such as"):
        resolve(parent(), "6b")


def test_without_budgets_in_the_configuration():
    with pytest.raises(ValueError, match="names no budgets"):
        resolve(tiny_config("dense"), "half")


def brute_force(config: NemotronHConfig) -> list[tuple[Budget, int, float | None]]:
    """(budget, parameters, loss) of every combination, each counted on its own configuration."""
    elastic = read_elastic(config)
    found = [(budget, budget.loss) for budget in elastic.budgets.values()]
    calibration = ELASTIC["calibration"]
    for d, h, f, count in itertools.product((48, 40, 32), (8, 4), (80, 64, 40), (7, 6, 5)):
        layers = tuple(sorted(ELASTIC["layer_order"][7 - count :]))
        sizes = {"hidden_size": d, "mamba_num_heads": h, "intermediate_size": f, "layers": count}
        known = {
            "hidden_size": {48: 1.5},
            "mamba_num_heads": {8: 1.5},
            "intermediate_size": {80: 1.5},
            "layers": {7: 1.5},
        }
        loss = 1.5
        for name, size in sizes.items():
            loss += {**known[name], **{int(k): v for k, v in calibration[name].items()}}[size] - 1.5
        found.append((Budget(name="b", **{**sizes, "layers": layers}), loss))
    return [(budget, num_parameters(resolve(config, budget).config), loss) for budget, loss in found]


@pytest.mark.parametrize("request_, fraction", [(0.9, 0.9), ("60%", 0.6), ("0.5", 0.5), (1, 1.0), ("100%", 1.0)])
def test_a_fraction_gives_the_lowest_loss_that_fits(request_, fraction):
    config = parent()
    limit = fraction * num_parameters(config)
    fitting = [loss for _, count, loss in brute_force(config) if count <= limit and loss is not None]
    best = rank_budgets(config, request_, "float32", limit=1000)
    assert best[0].loss == pytest.approx(min(fitting))
    assert all(candidate.child.num_parameters <= limit for candidate in best)
    losses = [candidate.loss for candidate in best if candidate.loss is not None]
    assert losses == sorted(losses)


@pytest.mark.parametrize("text, most, num_tokens", [("200KiB@1Ki", 200 * 1024, 1024), ("0.6MB@1000", 600_000, 1000),
                                                    ("300kb", 300_000, 0), ("200KiB@1k", 200 * 1024, 1000),
                                                    ("1.5GiB@1Mi", 1.5 * 2**30, 2**20)])  # fmt: skip
def test_a_need_counts_weights_and_one_cache(text, most, num_tokens):
    config = parent()
    every = brute_force(config)
    children = [(resolve(config, budget).config, loss) for budget, _, loss in every]
    needs = [
        (weight_bytes(child, "float32") + cache_bytes(child, num_tokens, "float32"), loss) for child, loss in children
    ]
    best = rank_budgets(config, text, "float32", limit=1000)
    assert best[0].loss == pytest.approx(min(loss for need, loss in needs if need <= most and loss is not None))
    fitting = {need for need, _ in needs if need <= most}
    assert {candidate.num_bytes for candidate in best} == fitting


@pytest.mark.parametrize("shape", ["moe", "latent"])
def test_sums_over_layers_are_the_exact_counts(shape):
    """With experts and multi-token prediction, every combination's count is that of its configuration."""
    choices = {"hidden_size": [40], "n_routed_experts": [4], "moe_intermediate_size": [16], "mamba_head_dim": [4],
               "num_attention_heads": [2], "num_key_value_heads": [1], "moe_shared_expert_intermediate_size": [24]}  # fmt: skip
    elastic = {"version": 1, "budgets": {}, "choices": choices, "layer_order": [5, 4, 3, 2, 1, 0]}
    mtp = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}
    config = tiny_config(
        shape, elastic=elastic, **({**mtp, "n_group": 1, "topk_group": 1} if shape == "latent" else mtp)
    )
    for in_bytes in (False, True):
        wanted = Limit(0, in_bytes, 100)
        found = list(_combinations(config, read_elastic(config), wanted, "float32", "x"))
        assert sum(combinations.amounts.numel() for combinations in found) == 2**7 * 6
        for combinations in found:
            amounts = combinations.amounts.flatten().tolist()
            for number in range(0, len(amounts), 7):
                child = resolve(config, combinations.budget(number)).config
                exact = weight_bytes(child, "float32") + cache_bytes(child, 100, "float32")
                assert amounts[number] == (exact if in_bytes else num_parameters(child)), combinations.budget(number)


@pytest.mark.parametrize("calibration", [ELASTIC["calibration"], {}])
def test_the_first_few_are_those_of_the_whole_list(calibration):
    config = parent(calibration=calibration)
    every = rank_budgets(config, 0.7, "float32", limit=1000)
    for limit in (1, 5):
        few = rank_budgets(config, 0.7, "float32", limit=limit)
        assert [(one.loss, one.child.num_parameters) for one in few] == [
            (one.loss, one.child.num_parameters) for one in every[:limit]
        ]


def test_a_limit_is_exact():
    amounts = torch.tensor([[2**33, 2**33 + 1]])  # alike in fp32
    found = _Combinations("x", None, [[{}]], [None, (0, 1)], amounts, torch.zeros(1, 2, dtype=torch.float64))
    assert [amount for _, amount, _ in found.best(float(2**33), 5)] == [2**33]


def test_a_named_budget_keeps_its_name_and_its_measured_loss():
    config = parent(budgets={"small": {"hidden_size": 32, "mamba_num_heads": 4, "trained": True, "loss": 1.55}})
    best = rank_budgets(config, 0.7, "float32")[0]
    assert (best.budget.name, best.loss, best.measured) == ("small", 1.55, True)
    assert sum(candidate.budget.hidden_size == 32 and candidate.budget.mamba_num_heads == 4
               and candidate.budget.intermediate_size is None and candidate.budget.layers is None
               for candidate in rank_budgets(config, 0.7, "float32", limit=100)) == 1  # fmt: skip


def test_without_calibration_what_keeps_most_comes_first():
    config = parent(calibration={}, budgets={"tiny": {"hidden_size": 8, "trained": True}})
    best = rank_budgets(config, 0.6, "float32", limit=3)
    assert best[0].budget.name == "tiny" and best[0].budget.trained  # trained goes before untrained
    assert best[1].loss is None and best[1].child.num_parameters >= best[2].child.num_parameters


def test_losses_between_calibrated_sizes_are_interpolated_and_beyond_them_unknown():
    config = parent()
    elastic = read_elastic(config)
    assert predict_loss(config, elastic, Budget(name="x", hidden_size=36)) == pytest.approx(1.75)
    assert predict_loss(config, elastic, Budget(name="x", hidden_size=44, mamba_num_heads=4)) == pytest.approx(1.75)
    assert predict_loss(config, elastic, Budget(name="x", hidden_size=16)) is None
    assert predict_loss(config, elastic, Budget(name="x", num_attention_heads=2)) is None
    assert predict_loss(config, elastic, Budget(name="x", intermediate_size=(8, 8, 8))) is None


def test_nothing_is_small_enough():
    smallest = min(count for _, count, _ in brute_force(parent()))
    with pytest.raises(ValueError, match=f"{smallest:,} parameters or more"):
        resolve(parent(), 0.01)
    with pytest.raises(ValueError, match="iB or more"):
        resolve(parent(), "1KiB@1Ki")


def test_what_was_not_trained_is_said(caplog):
    logger = logging.get_logger(resolve.__module__)
    logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        resolve(parent(), 0.61)
    finally:
        logger.removeHandler(caplog.handler)
    assert "NOT trained" in caplog.text and "predicted" in caplog.text


# Where other readers need one size for all layers.


@pytest.mark.parametrize("sizes", [
    {"intermediate_size": (80, 24, 8)}, {"mamba_num_heads": (2, 8, 4)}, {"num_attention_heads": 2},
    {"intermediate_size": (8, 40, 32), "mamba_num_heads": (4, 8, 8), "mamba_head_dim": (8, 4, 2), "hidden_size": 32},
])  # fmt: skip
def test_the_nearest_budget_with_one_size(sizes):
    config = tiny_config("dense")
    budget = Budget(name="x", **sizes)
    asked = resolve(config, budget)
    nearest = nearest_expressible(asked)
    child, wanted = nearest.config, asked.config
    assert not any(isinstance(getattr(child, field), list) for field in config.PER_LAYER_FIELDS)
    assert num_parameters(child) <= num_parameters(wanted)
    NativeConfig(**child.to_dict())
    lists = [field for field, size in sizes.items() if isinstance(size, tuple)]
    if not lists:
        assert nearest is asked
    elif len(lists) == 1:  # one step more would be larger than what was asked for
        step = {"mamba_num_heads": 2}.get(lists[0], 1)
        larger = Budget(name="x", **{**sizes, lists[0]: getattr(child, lists[0]) + step})
        assert num_parameters(resolve(config, larger).config) > num_parameters(wanted)


def test_info_shows_budgets_side_by_side(tmp_path, capsys):
    tiny_model("dense", elastic=ELASTIC).save_pretrained(tmp_path)
    assert info.main([str(tmp_path), "--context", "1000"]) == 0
    text = capsys.readouterr().out
    lines = {line.split("  ")[1]: line.split() for line in text[text.index("budgets (") :].splitlines()[1:]}
    config = parent()
    children = [resolve(config, resolve(config, name).budget).config for name in ("full", "half", "mixed")]
    assert lines["parameters"][1:] == [f"{num_parameters(child):,}" for child in (config, *children)]
    assert lines["MLP width"][2:] == ["80", "80", "80", "8..80"]
    assert lines["trained"][1:] == ["yes", "yes", "no"]
    assert info.main([str(tmp_path), "--json", "--context", "1000"]) == 0
    budgets = json.loads(capsys.readouterr().out)["budgets"]
    assert [budget["facts"]["target"] for budget in budgets] == ["(parent)", "full", "half", "mixed"]
    assert budgets[3]["sizes"]["intermediate_size"] == [80, 24, 8]
    assert budgets[2]["cache_bytes_at_context"] == cache_bytes(children[1], 1000, "float32")
