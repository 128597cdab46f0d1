"""Self-speculation by multi-token prediction: plain greedy text whatever is drafted, the model's distribution where it samples."""

import pytest
import torch
from tiny import prompt, tiny_model

from nemotron_h_hf import HybridCache

FEW = {"vocab_size": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # drafts are often right by chance
CASES = {
    "dense": ("dense", {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-"}),
    "mamba": ("dense", {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "M*"}),
    "attention_free": ("attention_free", {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "-"}),
    "window": ("dense", {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-", "sliding_window": 6}),
    "latent": ("latent", {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}),
}


def drafting_model(case="dense", seed=0, **more):
    shape, fields = CASES[case]
    return tiny_model(shape, seed, **{**FEW, **fields, **more})


def few(batch, length, seed=1):
    return prompt(batch, length, seed) % 6


def left_padded(batch=3, length=9):
    ids, mask = few(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("num_mtp_tokens", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_of_one_row(case, num_mtp_tokens):
    model = drafting_model(case)
    plain = model.generate(few(1, 7), max_new_tokens=24, do_sample=False)
    output = model.generate(
        few(1, 7), max_new_tokens=24, do_sample=False, num_mtp_tokens=num_mtp_tokens, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert 0 < output.acceptance_rate < 1 and 1 < output.tokens_per_step < num_mtp_tokens + 1
    assert len(output.acceptance_by_depth) == num_mtp_tokens and output.tokens_per_second > 0


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_of_rows(case):
    """Rows of different lengths, which keep different numbers of drafts, and end at different tokens."""
    model, given = drafting_model(case, eos_token_id=2), left_padded()
    plain = model.generate(**given, max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=24, do_sample=False, num_mtp_tokens=3), plain)
    unending = {"max_new_tokens": 16, "eos_token_id": None, "do_sample": False}
    plain = model.generate(**given, **unending)
    assert torch.equal(model.generate(**given, **unending, num_mtp_tokens=2), plain)


@pytest.mark.parametrize("settings", [
    {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 12, "eos_token_id": 2}, {"max_length": 10},
    {"max_new_tokens": 1}, {"num_beams": 1, "bad_words_ids": [[3]]},
])  # fmt: skip
def test_what_changes_logits_or_ends_texts(settings):
    model, given = drafting_model(), left_padded(2)
    settings = {"do_sample": False, **({} if "max_length" in settings else {"max_new_tokens": 16}), **settings}
    plain = model.generate(**given, **settings)
    assert torch.equal(model.generate(**given, **settings, num_mtp_tokens=3), plain)


@torch.no_grad()
def test_a_perfect_head_is_always_right():
    """A model whose next token depends on the last one alone, and a head that computes the same."""
    model = drafting_model()
    for layer in [*model.model.layers, *model.mtp.layers]:
        for weight in layer.mixer.parameters():
            weight.zero_()
    first, last = model.mtp.layers[0], model.mtp.layers[-1]
    first.eh_proj.weight.copy_(torch.cat([torch.eye(48), torch.zeros(48, 48)], dim=1))
    first.enorm.weight.fill_(1)
    last.final_layernorm.weight.copy_(model.model.norm_f.weight)
    settings = {"max_new_tokens": 31, "num_mtp_tokens": 4, "return_dict_in_generate": True}
    output = model.generate(few(2, 4), do_sample=False, **settings)
    assert output.acceptance_by_depth == (1, 1, 1, 1) and output.acceptance_rate == 1 and output.tokens_per_step == 5


def test_the_cache_of_one_row_goes_on():
    model, ids = drafting_model(eos_token_id=2), few(1, 8)
    first = model.generate(ids, max_new_tokens=9, do_sample=False, num_mtp_tokens=3, return_dict_in_generate=True)
    cache = first.get("cache") or first.get("past_key_values")
    assert isinstance(cache, HybridCache) and int(cache.get_seq_length()) == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, few(1, 3, seed=5)], dim=1)
    plain = model.generate(longer, max_new_tokens=12, do_sample=False)
    again = model.generate(longer, max_new_tokens=12, do_sample=False, num_mtp_tokens=2, past_key_values=cache)
    assert torch.equal(again, plain)


def test_embeddings_as_prompt_and_several_answers():
    model, ids = drafting_model(), few(1, 8)
    embeds = model.model.embeddings(ids)
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings, num_mtp_tokens=2), plain)
    torch.manual_seed(0)
    answers = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, num_mtp_tokens=2)
    assert answers.shape == (3, 14) and torch.equal(answers[:, :8], ids.expand(3, -1))


def test_a_streamer_gets_every_token():
    seen = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    ids = few(1, 5)
    written = drafting_model().generate(ids, max_new_tokens=9, do_sample=False, num_mtp_tokens=2, streamer=Streamer())
    assert seen == [*written[0].tolist(), "end"]


@pytest.mark.parametrize("rows, settings", [(1, {}), (3, {"temperature": 0.6, "top_k": 4})])
def test_sampling_has_the_models_distribution(rows, settings):
    """Frequencies of all texts of three tokens against exact probabilities: chi-squared."""
    model, length = drafting_model(seed=3), 3
    ids = few(1, 6)
    expected = exact_distribution(model, ids, length, **settings)
    counts = torch.zeros(6**length)
    torch.manual_seed(1)
    for _ in range(6):
        texts = model.generate(
            ids.expand(rows, -1), max_new_tokens=length, do_sample=True, num_mtp_tokens=2, num_return_sequences=600 // rows,
            top_k=settings.get("top_k", 0), temperature=settings.get("temperature", 1.0),
        )[:, 6:]  # fmt: skip
        counts += torch.bincount((texts * torch.tensor([36, 6, 1])).sum(1), minlength=len(counts))
    assert counts[expected == 0].sum() == 0
    often = expected * counts.sum() >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * counts.sum()
    chi = ((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()
    freedom = len(wanted) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)


@torch.no_grad()
def exact_distribution(model, ids, length, temperature=1.0, top_k=6):
    """Probability of every text of `length` tokens, (6 ** length), by running the model over each of them."""
    texts = torch.cartesian_prod(*[torch.arange(6)] * length)
    logits = model(torch.cat([ids.expand(len(texts), -1), texts], 1)).logits[:, ids.shape[1] - 1 : -1] / temperature
    logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.softmax(-1).gather(2, texts[..., None]).prod(1)[:, 0]


@pytest.mark.parametrize("settings, words", [
    ({"num_mtp_tokens": 0}, "num_mtp_tokens=0: allowed is 1 to 255"),
    ({"num_mtp_tokens": 256}, "num_mtp_tokens=256: allowed is 1 to 255"),
    ({"num_mtp_tokens": True}, "num_mtp_tokens=True"),
    ({"num_beams": 2}, "beam"),
    ({"prompt_lookup_num_tokens": 2}, "assisted"),
    ({"output_scores": True}, "output_scores=True"),
    ({"use_cache": False}, "needs a cache"),
    ({"cache_implementation": "static"}, "static"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        drafting_model().generate(few(1, 4), **{"max_new_tokens": 3, "num_mtp_tokens": 2, **settings})


def test_models_and_drafts_that_cannot_be():
    plain = tiny_model("dense")
    with pytest.raises(ValueError, match="the model has no multi-token prediction"):
        plain.generate(prompt(), max_new_tokens=2, num_mtp_tokens=1)
    model = drafting_model()
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(few(1, 4), max_new_tokens=2, num_mtp_tokens=1, assistant_model=model)
