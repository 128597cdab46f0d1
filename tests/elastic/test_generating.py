"""Budgets per call and per row, schedules of two budgets, states taken over, and a nested model that drafts for its parent."""

import copy

import pytest
import torch
from reference import reference_mtp
from tiny import prompt, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from nemotron_h_hf import BudgetSchedule, HybridCache, NemotronHElasticForCausalLM
from nemotron_h_hf.elastic.live.cache_carry import Carried, carry_cache
from nemotron_h_hf.model.padding import read_rows

BUDGETS = {
    "large": {},
    "small": {"hidden_size": 32, "mamba_num_heads": 4, "num_attention_heads": 2, "intermediate_size": 40},
    "short": {"mamba_num_heads": 6, "mamba_head_dim": 4, "layers": [0, 1, 3, 4, 5]},
    "no_attention": {"layers": [0, 1, 2, 4]},
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def parent():
    ordinary = tiny_model("dense", elastic={"version": 1, "budgets": BUDGETS})
    return NemotronHElasticForCausalLM.from_model(ordinary)


def words():
    """A tokenizer in which token i is the word "<i>"."""
    vocabulary = {**{f"<{i}>": i for i in range(97)}, "abcdef": 97}  # transformers asks for the last one
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<0>")))


def greedy(model, ids, count, **kwargs):
    return model.generate(ids, max_new_tokens=count, **GREEDY, **kwargs)


# One budget, and one for each row


def test_a_budget_for_a_call(parent):
    ids = prompt(2, 9)
    assert torch.equal(greedy(parent, ids, 6, budget="small"), greedy(parent.submodel("small"), ids, 6))
    assert torch.equal(greedy(parent, ids, 6, budget="large"), greedy(parent, ids, 6))
    assert not torch.equal(greedy(parent, ids, 6, budget="small"), greedy(parent, ids, 6))


def test_a_budget_for_each_row(parent):
    ids, mask = prompt(5, 9), torch.ones(5, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    names = ["small", "large", "small", None, "short"]
    rows = greedy(parent, ids, 6, budget=names, attention_mask=mask)
    assert rows.shape == (5, 15)
    for row, name in enumerate(names):
        alone = greedy(parent, ids[row : row + 1], 6, budget=name, attention_mask=mask[row : row + 1])
        assert torch.equal(rows[row : row + 1], alone), row


def test_a_budget_drafts_with_its_part_of_the_head():
    """The head is as narrow as the budget, computes what the reference computes of its weights, and changes no text."""
    mtp = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-", "vocab_size": 6, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
    parent = NemotronHElasticForCausalLM.from_model(
        tiny_model("dense", elastic={"version": 1, "budgets": BUDGETS}, **mtp)
    )
    ids, kept = prompt(2, 9) % 6, []
    for name in BUDGETS:
        small = parent.submodel(name)
        embeds = small.model.embeddings(ids[:1, 1:])
        hidden = small.model(ids[:1]).last_hidden_state[:, :-1]
        logits = small.lm_head(small.mtp(hidden, embeds, read_rows(None, embeds)))[0].double()
        torch.testing.assert_close(
            logits, reference_mtp(small.state_dict(), small.config, ids[0], 1)[0], rtol=0, atol=1e-4
        )
        drafted = greedy(parent, ids, 20, budget=name, num_mtp_tokens=2, return_dict_in_generate=True)
        assert torch.equal(drafted.sequences, greedy(parent, ids, 20, budget=name))
        kept.append(drafted.acceptance_rate)
    assert max(kept) > 0
    names = ["small", "large"]
    assert torch.equal(greedy(parent, ids, 9, budget=names, num_mtp_tokens=2), greedy(parent, ids, 9, budget=names))
    with pytest.raises(ValueError, match="num_mtp_tokens=2 with a BudgetSchedule"):
        greedy(parent, ids, 9, budget=BudgetSchedule("small", "large", after=2), num_mtp_tokens=2)


def test_rows_that_end_early_are_padded_on_the_right(parent):
    ids = prompt(3, 9)
    written = greedy(parent, ids, 8, budget=["small", "large", "small"])
    eos = int(written[1, 11])
    first = (written[:, 9:] == eos).int().argmax(1)
    rows = parent.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0,
                           budget=["small", "large", "small"])  # fmt: skip
    for row in range(3):
        ends = bool((written[row, 9:] == eos).any())
        end = 9 + int(first[row]) + 1 if ends else written.shape[1]
        assert torch.equal(rows[row, :end], written[row, :end]) and not rows[row, end:].any()
    assert int(first[1]) <= 2


def test_several_sequences_for_each_row(parent):
    torch.manual_seed(0)
    rows = parent.generate(prompt(3, 9), max_new_tokens=4, do_sample=True, num_return_sequences=2, pad_token_id=0,
                           budget=["small", "large", "small"])  # fmt: skip
    assert rows.shape[0] == 6 and torch.equal(rows[:, :9], prompt(3, 9).repeat_interleave(2, dim=0))


def test_the_parents_generation_config_holds_for_every_budget(parent, monkeypatch):
    ids, small = prompt(3, 9), parent.submodel("small")
    names = ["small", "large", "small"]
    two = GenerationConfig(num_return_sequences=2, do_sample=True, max_new_tokens=4, pad_token_id=0)
    rows = parent.generate(ids, two, budget=names)
    assert torch.equal(rows[:, :9], ids.repeat_interleave(2, dim=0))
    own = small.generation_config
    monkeypatch.setattr(
        parent, "generation_config", GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    )
    for budget in ("small", names, BudgetSchedule("small", "large", after=2)):
        assert parent.generate(ids, budget=budget).shape == (3, 12)
    assert small.generation_config is own


@pytest.mark.parametrize(("budget", "settings"), [
    (BudgetSchedule("small", "large", after=2), {"num_return_sequences": 2}),
    (BudgetSchedule("small", "large", after=2), {"return_dict_in_generate": True}),
    (BudgetSchedule("small", "large", after=2), {"min_new_tokens": 3}),
    (["small", "large"], {"return_dict_in_generate": True}),
])  # fmt: skip
def test_a_generation_config_is_no_way_around_a_refusal(parent, budget, settings):
    config = GenerationConfig(max_new_tokens=4, do_sample=True, pad_token_id=0, **settings)
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* of generation_config with"):
        parent.generate(prompt(2, 9), generation_config=config, budget=budget)


def test_a_stored_max_length_is_no_obstacle(parent, monkeypatch):
    ids, schedule = prompt(2, 9), BudgetSchedule("small", "large", after=2)
    expected = greedy(parent, ids, 5, budget=schedule)
    monkeypatch.setattr(parent, "generation_config", GenerationConfig(max_length=100, pad_token_id=0))
    assert torch.equal(greedy(parent, ids, 5, budget=schedule), expected)


# Schedules


def test_switch_after_a_number_of_tokens(parent):
    ids = prompt(2, 9)
    thought = greedy(parent.submodel("small"), ids, 5)
    rows = greedy(parent, ids, 12, budget=BudgetSchedule("small", "large", after=5))
    assert torch.equal(rows, greedy(parent, thought, 7))


def test_switch_at_a_token_for_each_row(parent):
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    thought = greedy(parent.submodel("small"), ids, 10, attention_mask=mask)
    at = int(thought[0, 9 + 3])  # the first row switches here at the latest, others somewhere else or never
    rows = greedy(parent, ids, 14, attention_mask=mask, budget=BudgetSchedule("small", "large", after=10, at=at))
    switches = set()
    for row in range(3):
        found = torch.nonzero(thought[row, 9:] == at).flatten()
        end = 9 + int(found[0]) + 1 if len(found) else 19
        switches.add(end)
        start = 3 if row == 0 else 0
        expected = greedy(parent, thought[row : row + 1, start:end], 9 + 14 - end)
        assert torch.equal(rows[row, start:], expected[0]), row
    assert len(switches) > 1


def test_switch_at_a_text_and_at_several_tokens(parent):
    ids = prompt(1, 9)
    thought = greedy(parent.submodel("small"), ids, 6)
    pair = thought[0, 11:13].tolist()
    expected = greedy(parent, thought[:, :13], 5)
    assert torch.equal(greedy(parent, ids, 9, budget=BudgetSchedule("small", "large", at=pair)), expected)
    text = BudgetSchedule("small", "large", at=f"<{pair[1]}>")
    end = 9 + int(torch.nonzero(thought[0, 9:] == pair[1])[0]) + 1
    rows = greedy(parent, ids, 9, budget=text, tokenizer=words())
    assert torch.equal(rows, greedy(parent, thought[:, :end], 18 - end))
    with pytest.raises(ValueError, match="tokenizer=None"):
        greedy(parent, ids, 9, budget=text)


def test_an_answer_that_ends_before_the_switch(parent):
    ids = prompt(2, 9)
    thought = greedy(parent.submodel("small"), ids, 5)
    eos = int(thought[0, 10])
    rows = parent.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=eos, pad_token_id=0,
                           budget=BudgetSchedule("small", "large", after=5))  # fmt: skip
    end = 9 + int(torch.nonzero(thought[0, 9:] == eos)[0]) + 1
    assert torch.equal(rows[0, :end], thought[0, :end]) and not rows[0, end:].any()
    never = parent.generate(ids[:1], max_new_tokens=9, do_sample=False, eos_token_id=eos, pad_token_id=0,
                            budget=BudgetSchedule("small", "large", after=5))  # fmt: skip
    assert torch.equal(never, thought[:1, :end])


def test_schedules_for_rows(parent):
    ids = prompt(3, 9)
    schedule = BudgetSchedule("small", "large", after=3)
    rows = greedy(parent, ids, 6, budget=[schedule, "small", BudgetSchedule("small", "large", after=3)])
    assert torch.equal(rows[[0, 2]], greedy(parent, ids[[0, 2]], 6, budget=schedule))
    assert torch.equal(rows[1:2], greedy(parent, ids[1:2], 6, budget="small"))


# States taken over


def test_carrying_to_the_same_sizes_is_exact(parent):
    schedule = BudgetSchedule("small", "small", after=5, carry_state=True)
    ids = prompt(2, 9)
    assert torch.equal(greedy(parent, ids, 12, budget=schedule), greedy(parent, ids, 12, budget="small"))
    (carried,) = schedule.carried
    assert carried.num_tokens == 13 and carried.max_difference < 1e-5 and carried.kl < 1e-6 and carried.same_token == 1


@pytest.mark.parametrize(("first", "then"), [("small", "large"), ("large", "small"), ("short", "large"), ("large", "short"),
                                             ("large", "no_attention")])  # fmt: skip
def test_carried_states_are_cut_or_begin_at_zero(parent, first, then):
    source, target = parent.resolve(first), parent.resolve(then)
    given = parent.submodel_of(source)(prompt(2, 9), use_cache=True).past_key_values
    carried = carry_cache(given, source, target)
    layers = [source.layers, target.layers]
    for own, index in enumerate(layers[1]):
        layer = carried.layers[own]
        if parent.config.layers_block_type[index] != "linear_attention":
            continue
        state, conv = layer.recurrent_states[0], layer.conv_states[0]
        if index not in layers[0]:
            assert not state.any() and not conv.any()
            continue
        before = given.layers[list(layers[0]).index(index)].recurrent_states[0]
        sizes = [t.unflatten(1, (2, -1)).shape[2:4] for t in (before, state)]
        heads, channels = (min(pair) for pair in zip(*sizes))
        ours, theirs = (t.unflatten(1, (2, -1))[:, :, :heads, :channels] for t in (before, state))
        assert torch.equal(ours, theirs) and ours.any()
        assert state.count_nonzero() == theirs.count_nonzero()
        old = given.layers[list(layers[0]).index(index)].conv_states[0]
        assert torch.equal(conv[:, -64:], old[:, -64:])  # B and C
    assert int(carried.get_seq_length()) == 9
    logits = parent.submodel_of(target)(prompt(2, 3, seed=4), past_key_values=carried).logits
    assert logits.isfinite().all()


def test_key_value_heads_are_carried_where_the_source_has_them():
    """Where nothing below attention differs, what it reads of the cache is the large model's own."""
    budgets = {"large": {"layers": [3, 6]}, "small": {"layers": [3, 6], "num_key_value_heads": 1}}
    parent = NemotronHElasticForCausalLM.from_model(tiny_model("dense", elastic={"version": 1, "budgets": budgets}))
    large, small, ids = parent.resolve("large"), parent.resolve("small"), prompt(2, 9)
    given = parent.submodel_of(large)(ids, use_cache=True).past_key_values
    model, last = parent.submodel_of(small), prompt(2, 2, seed=4)
    found = model(last, past_key_values=carry_cache(given, large, small)).logits
    torch.testing.assert_close(found, model(torch.cat([ids, last], 1)).logits[:, -2:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'small' has 1 key/value heads, 'large' 2"):
        carry_cache(given, small, large)


def test_carrying_changes_the_logits_and_says_by_how_much(parent, caplog):
    schedule, ids = BudgetSchedule("small", "large", after=5, carry_state=True), prompt(1, 9)
    rows = greedy(parent, ids, 8, budget=schedule)
    (carried,) = schedule.carried
    source = parent.submodel("small")
    cache = HybridCache(source.config)
    source(rows[:, :13], past_key_values=cache)
    cache = carry_cache(cache, parent.resolve("small"), parent.resolve("large"))
    taken = parent(rows[:, 13:14], past_key_values=cache).logits[0, -1]
    exact = parent(rows[:, :14]).logits[0, -1]
    assert carried.max_difference == pytest.approx(float((taken - exact).abs().max()), rel=1e-3)
    kl = torch.nn.functional.kl_div(taken.log_softmax(-1), exact.softmax(-1), reduction="sum")
    assert carried.kl == pytest.approx(float(kl), rel=1e-3) and carried.kl > 1e-3
    assert int(rows[0, 14]) == int(taken.argmax())
    quiet = BudgetSchedule("small", "large", after=5, carry_state=True, measure=False)
    assert torch.equal(greedy(parent, ids, 8, budget=quiet), rows) and not quiet.carried
    assert "KL" in str(Carried.between(exact[None], taken[None], 13))


def test_carrying_with_padding_and_ended_rows(parent):
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    thought = greedy(parent.submodel("small"), ids, 5, attention_mask=mask)
    eos = int(thought[0, 10])
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    rows = parent.generate(ids, attention_mask=mask, **settings,
                           budget=BudgetSchedule("small", "large", after=5, carry_state=True))  # fmt: skip
    for row in range(3):
        alone = parent.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **settings,
                                budget=BudgetSchedule("small", "large", after=5, carry_state=True))  # fmt: skip
        assert torch.equal(rows[row, : alone.shape[1]], alone[0])


# Drafts


@pytest.mark.parametrize("draft", [name for name in BUDGETS if name != "large"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_nested_drafts_give_the_parents_text(parent, draft, tokens):
    small = parent.submodel(draft)
    small.generation_config = copy.deepcopy(small.generation_config)
    small.generation_config.num_assistant_tokens = tokens
    small.generation_config.assistant_confidence_threshold = 0
    for seed in range(2):
        ids = prompt(1, 9, seed=seed)
        assert torch.equal(greedy(parent, ids, 20, assistant_model=small), greedy(parent, ids, 20))


def test_a_draft_with_fewer_experts_gives_the_parents_text():
    budgets = {"few": {"n_routed_experts": 4, "moe_intermediate_size": 16, "hidden_size": 32}}
    parent = NemotronHElasticForCausalLM.from_model(tiny_model("moe", elastic={"version": 1, "budgets": budgets}))
    small = parent.submodel("few")
    small.generation_config.num_assistant_tokens, small.generation_config.assistant_confidence_threshold = 4, 0
    ids = prompt(1, 9)
    assert torch.equal(greedy(parent, ids, 20, assistant_model=small), greedy(parent, ids, 20))


# Bad input


@pytest.mark.parametrize(("budget", "kwargs", "message"), [
    ("7b", {}, "budget='7b'"),
    (["small"], {}, "one for each of the 2 rows"),
    (["small", "large"], {"return_dict_in_generate": True}, "return_dict_in_generate=True"),
    (BudgetSchedule("small", "large", after=2), {"num_beams": 2}, "num_beams=2"),
    (BudgetSchedule("small", "large", after=2), {"max_new_tokens": None}, "max_new_tokens=None"),
    (BudgetSchedule("no_attention", "large", after=2, carry_state=True), {}, r"attention layers \[3\]"),
    (BudgetSchedule("small", "large", at=5, carry_state=True), {}, "allowed is one row"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(parent, budget, kwargs, message):
    with pytest.raises(ValueError, match=message):
        parent.generate(prompt(2, 9), budget=budget, **{"max_new_tokens": 4, **kwargs})


def test_schedules_need_a_switch():
    with pytest.raises(ValueError, match="after=None and at=None"):
        BudgetSchedule("small", "large")
    with pytest.raises(ValueError, match="after=0"):
        BudgetSchedule("small", "large", after=0)
