"""Padding and packing: every row, and every document in a row, equals itself alone, forward and backward."""

import pytest
import torch
from tiny import assert_close, prompt, tiny_model
from transformers import DataCollatorWithFlattening

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model.padding import find_documents, find_padding, flash_offsets, read_rows, real_tokens

SHAPES = ["dense", "attention_free", "moe"]
LENGTHS = [(5, 12, 1, 9), (7,), (16, 3)]


def place(rows, side, width, seed=0):
    """Rows (1, length) in one batch (n, width), padding left, right, around or at random places; and the mask."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        length = row.shape[1]
        columns = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "middle": torch.cat([torch.arange(length // 2), torch.arange(width - length + length // 2, width)]),
            "random": torch.randperm(width, generator=generator)[:length].sort().values,
        }[side]
        ids[index, columns], mask[index, columns] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "middle", "random"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padded_rows_equal_rows_alone(shape, lengths, side, implementation):
    model = tiny_model(shape)
    model.set_attn_implementation(implementation)
    rows = [prompt(1, length, seed=length) for length in lengths]
    ids, mask = place(rows, side, max(lengths) + 4)
    ids[mask == 0] = prompt(1, 1, seed=99).item()  # what stands on padding must not matter
    more = prompt(len(rows), 6, seed=77)
    with torch.no_grad():
        for cache in (HybridCache(model.config), HybridCache(model.config, max_cache_len=32)):
            alone = [model(torch.cat([row, more[i : i + 1]], dim=1)).logits[0] for i, row in enumerate(rows)]
            out = model(ids, attention_mask=mask, past_key_values=cache)
            seen, logits = mask, [out.logits]
            for part in more.split([1, 3, 1, 1], dim=1):  # decode, continue with several tokens, decode
                seen = torch.cat([seen, torch.ones_like(part)], dim=1)
                logits.append(model(part, attention_mask=seen, past_key_values=cache).logits)
            logits = torch.cat(logits, dim=1)
            for index, expected in enumerate(alone):
                assert_close(logits[index][seen[index].bool()], expected)


def test_padding_in_a_continuation():
    """Turns of a conversation of different lengths, padded on the right each time."""
    model, turns = tiny_model(), [(6, 2), (3, 7), (1, 4)]
    whole = [prompt(1, 10, seed=1), prompt(1, 13, seed=2)]
    cache, seen, logits, start = HybridCache(model.config), torch.zeros(2, 0, dtype=torch.long), [], [0, 0]
    with torch.no_grad():
        for turn in turns:
            rows = [whole[i][:, start[i] : start[i] + n] for i, n in enumerate(turn)]
            start = [s + n for s, n in zip(start, turn)]
            ids, mask = place(rows, "right", max(turn))
            seen = torch.cat([seen, mask], dim=1)
            logits.append(model(ids, attention_mask=seen, past_key_values=cache).logits)
        for index, row in enumerate(whole):
            assert_close(torch.cat(logits, dim=1)[index][seen[index].bool()], model(row).logits[0])


def test_a_row_of_padding_alone_stays_finite():
    model, ids = tiny_model(), prompt(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    out = model(ids, attention_mask=mask)
    assert out.logits.isfinite().all()
    assert_close(out.logits[0], model(ids[:1]).logits[0])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_gradients_of_padded_rows(side):
    model, rows = tiny_model().train(), [prompt(1, length, seed=length) for length in (5, 12, 9)]
    ids, mask = place(rows, side, 15)
    labels = torch.where(mask == 1, ids, -100)
    for index in range(len(rows)):  # a first token is never a target
        labels[index, mask[index].nonzero()[0]] = -100
    logits = model(ids, attention_mask=mask, skip_logits=True).logits
    total = sum((logits[i][mask[i].bool()] ** 2).sum() for i in range(3))
    ours = torch.autograd.grad(total, list(model.parameters()))
    theirs = torch.autograd.grad(sum((model(row).logits ** 2).sum() for row in rows), list(model.parameters()))
    for (name, _), mine, expected in zip(model.named_parameters(), ours, theirs):
        scale = expected.abs().max()
        torch.testing.assert_close(mine / scale, expected / scale, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# Packing


def collate(documents, **kwargs):
    features = [{"input_ids": document[0].tolist()} for document in documents]
    return DataCollatorWithFlattening(return_tensors="pt", **kwargs)(features)


COLLATORS = {
    "position_ids": {},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_equal_documents_alone(shape, kind, implementation, mask):
    model = tiny_model(shape).train().double()
    model.set_attn_implementation(implementation)
    model.set_experts_implementation("eager")  # grouped matrix products have no float64
    documents = [prompt(1, length, seed=length) for length in (5, 1, 2, 17, 3, 8)]
    batch = collate(documents, **COLLATORS[kind])
    if mask:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    out = model(**batch, skip_logits=False)
    alone = [model(document) for document in documents]
    assert_close(out.logits[0], torch.cat([one.logits[0] for one in alone]), 1e-10)
    losses = [model(d, labels=d, num_items_in_batch=1).loss for d in documents if d.shape[1] > 1]
    expected = sum(losses) / sum(d.shape[1] - 1 for d in documents)
    assert_close(out.loss, expected)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    for (name, _), mine, theirs in zip(
        model.named_parameters(), ours, torch.autograd.grad(expected, list(model.parameters()))
    ):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_no_gradient_crosses_documents():
    model, documents = tiny_model().double(), [prompt(1, 6, seed=1), prompt(1, 9, seed=2)]
    batch = collate(documents)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, position_ids=batch["position_ids"]).logits
    (gradient,) = torch.autograd.grad(logits[:, 6:].square().sum(), embeds)
    # not exactly zero: sums of log decays run over the chunk, and what they owe to the first document cancels
    assert gradient[:, :6].abs().max() < 1e-13 * gradient[:, 6:].abs().max()


@pytest.mark.parametrize("kind", ["position_ids", "seq_idx", "cu_seq_lens"])
@pytest.mark.parametrize("mask", [False, True])
def test_packing_in_a_batch_of_two(kind, mask):
    model = tiny_model()
    documents = [[prompt(1, 5, seed=1), prompt(1, 7, seed=2)], [prompt(1, 3, seed=3), prompt(1, 9, seed=4)]]
    ids = torch.cat([torch.cat(row, dim=1) for row in documents])
    batch = {
        "position_ids": {"position_ids": torch.tensor([[*range(5), *range(7)], [*range(3), *range(9)]])},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 9], dtype=torch.int32)},
        "cu_seq_lens": {"cu_seq_lens_q": (offsets := torch.tensor([0, 5, 12, 15, 24], dtype=torch.int32)),
                        "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9},
    }[kind]  # fmt: skip
    if mask:
        batch["attention_mask"] = torch.ones_like(ids)
    logits = model(ids, **batch).logits
    for row, parts in enumerate(documents):
        assert_close(logits[row], torch.cat([model(part).logits[0] for part in parts]))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_and_padded(side, implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    documents = [
        [prompt(1, 5, seed=1), prompt(1, 7, seed=2)],
        [prompt(1, 3, seed=3), prompt(1, 4, seed=4), prompt(1, 2, seed=5)],
    ]
    rows = [torch.cat(row, dim=1) for row in documents]
    ids, mask = place(rows, side, 15)
    positions, numbers = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, parts in enumerate(documents):
        real = mask[index].bool()
        positions[index, real] = torch.cat([torch.arange(part.shape[1]) for part in parts])
        numbers[index, real] = torch.cat([torch.full((part.shape[1],), n) for n, part in enumerate(parts)])
    for given in ({"position_ids": positions}, {"seq_idx": numbers}):
        logits = model(ids, attention_mask=mask, **given).logits
        for index, parts in enumerate(documents):
            assert_close(logits[index][mask[index].bool()], torch.cat([model(part).logits[0] for part in parts]))


def test_long_packed_row_crosses_segments():
    model, lengths = tiny_model(), (700, 400, 30, 900)
    documents = [prompt(1, length, seed=length) for length in lengths]
    with torch.no_grad():
        logits = model(**collate(documents)).logits[0]
        assert_close(logits, torch.cat([model(document).logits[0] for document in documents]), 5e-5)


def test_packing_with_gradient_checkpointing():
    model, documents = tiny_model().train(), [prompt(1, 6, seed=1), prompt(1, 9, seed=2)]
    batch = collate(documents)
    expected = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    for mine, theirs in zip(torch.autograd.grad(model(**batch).loss, list(model.parameters())), expected):
        assert_close(mine, theirs)


def test_packed_rows_have_no_cache():
    model, batch = tiny_model(), collate([prompt(1, 6, seed=1), prompt(1, 9, seed=2)])
    assert model(**batch).past_key_values is None
    with pytest.raises(ValueError, match="packed rows"):
        model(**batch, past_key_values=HybridCache(model.config))


def test_positions_that_do_not_restart_are_one_document():
    model, ids = tiny_model(), prompt(2, 11)
    expected = model(ids).logits
    out = model(ids, position_ids=torch.arange(11)[None])
    assert out.past_key_values is not None
    assert_close(out.logits, expected, 0)
    assert_close(model(ids, position_ids=torch.arange(5, 16).expand(2, -1)).logits, expected, 0)
    step = model(ids[:, :1], position_ids=torch.full((2, 1), 11), past_key_values=out.past_key_values)
    assert_close(step.logits, model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:])


@pytest.mark.parametrize(
    "bad",
    [
        {"position_ids": torch.zeros(2, 4, dtype=torch.long)},
        {"seq_idx": torch.zeros(3, 5, dtype=torch.long)},
        {"cu_seq_lens_q": torch.tensor([0, 4])},
        {"cu_seq_lens_q": torch.tensor([1, 10])},
        {"cu_seq_lens_q": torch.tensor([0, 7, 5, 10])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 10]), "cu_seq_lens_k": torch.tensor([0, 4, 10])},
        {"cu_seq_lens_k": torch.tensor([0, 5, 10])},
    ],
)
def test_inputs_that_do_not_fit_the_batch(bad):
    with pytest.raises(ValueError, match="position_ids|seq_idx|cu_seq_lens"):
        tiny_model()(prompt(2, 5), **bad)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("max_cache_len", [None, 12])
@torch.no_grad()
def test_a_mask_that_leaves_out_what_is_cached_is_refused(implementation, max_cache_len):
    """Attention would count its columns from the first token, Mamba layers from the last."""
    model, ids = tiny_model(), prompt(2, 10)
    model.set_attn_implementation(implementation)
    cache = HybridCache(model.config, max_cache_len)
    model(ids[:, :6], cache=cache)
    for columns in (4, 7, 11):
        with pytest.raises(ValueError, match=f"attention_mask has {columns} columns .* the 6 tokens in the cache"):
            model(ids[:, 6:], cache=cache, attention_mask=torch.ones(2, columns, dtype=torch.long))
    continued = model(ids[:, 6:], cache=cache, attention_mask=torch.ones(2, 10, dtype=torch.long)).logits
    torch.testing.assert_close(continued, model(ids).logits[:, 6:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_form_of_a_mask_says_the_same():
    """(b, l), attention's own (b, 1, l, l) and both as generate() makes them, against each row alone; the second cannot tell
    the Mamba layers where the padding is, and one has none."""
    model, ids = tiny_model(), prompt(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    both = model.create_masks_for_generate(model.config, model.get_input_embeddings()(ids), mask)
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(expected[1, 2:], model(ids[1:, 2:]).logits[0], rtol=0, atol=1e-5)
    assert torch.equal(model(ids, attention_mask=both).logits, expected)
    window = torch.ones(6, 6).tril().bool() & ~torch.ones(6, 6).tril(-3).bool()
    near = model(ids, attention_mask=window[None, None]).logits
    assert (near - model(ids).logits).abs().max() > 1e-3
    rows = read_rows(window[None, None], ids)
    assert rows.is_custom and not rows.can_split() and rows.real is None
    assert read_rows(both, ids).can_split() and torch.equal(real_tokens(both), mask)
    model.model.tokens_per_pass = {"cpu": 2}  # 256 at a time, the least
    long, far = prompt(1, 300), torch.ones(300, 300).tril().bool()
    parts, whole = model(long).logits, model(long, attention_mask=far[None, None]).logits
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 6, 6\): allowed is"):
        model(ids, attention_mask=torch.ones(2, 6, 6))


def test_finding_documents_and_padding():
    assert find_padding(torch.ones(2, 5), 5) is None and find_padding(None, 5) is None
    padding = find_padding(torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]), 4)
    x = torch.arange(8).view(2, 4)
    assert padding.compact(x).tolist() == [[1, 3, 0, 2], [4, 5, 6, 7]]
    assert torch.equal(padding.restore(padding.compact(x)), x)
    documents = find_documents(1, 6, torch.device("cpu"), seq_idx=torch.tensor([[4, 4, 2, 2, 9, 9]]))
    assert documents.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert find_documents(1, 6, torch.device("cpu"), seq_idx=torch.full((1, 6), 3)) is None
    offsets = flash_offsets(torch.tensor([[0, 0, 1], [0, 0, 0]]), None)
    assert offsets["cu_seq_lens_q"].tolist() == [0, 2, 3, 6] and offsets["max_length_q"] == 3
    offsets = flash_offsets(torch.tensor([[0, 0, 1], [0, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert offsets["cu_seq_lens_q"].tolist() == [0, 2, 3, 4, 6]
