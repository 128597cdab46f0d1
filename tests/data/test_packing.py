"""Packed rows: every token once and in order, the model sees each document alone, and resuming is exact."""

import json
import random
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, tiny_model
from tiny_run import write_texts
from torch.utils.data import DataLoader

from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.packing import STATES_KEPT, Rows, ShuffledRows, SplitRows, WholeRows, best_fit
from nemotron_h_hf.data.phases import phases_from
from nemotron_h_hf.data.sources import sources_from

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def documents_of(lengths, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def pieces_of(row: dict) -> list[dict]:
    """The stretches of a row between restarts of its positions, found without the code under test."""
    starts = [i for i, position in enumerate(row["position_ids"].tolist()) if position == 0]
    cuts = [*starts, len(row["position_ids"])]
    return [{name: tensor[a:b] for name, tensor in row.items()} for a, b in zip(cuts, cuts[1:])]


def equal_rows(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(torch.equal(a[k], b[k]) for a, b in zip(left, right) for k in a)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 25))
def test_split_rows_hold_all_tokens_in_order(lengths, sequence_length):
    documents = documents_of(lengths)
    rows = list(SplitRows(documents, sequence_length))
    flat = [token for document in documents for token in document]
    missing = -len(flat) % sequence_length
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == flat + [0] * missing
    assert len(rows) == -(-len(flat) // sequence_length)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = {0, *ends, *range(0, len(flat), sequence_length), len(flat)}
    for place, position in enumerate(torch.cat([row["position_ids"] for row in rows]).tolist()):
        assert (position == 0) == (place in starts) or place >= len(flat)
    for place, label in enumerate(torch.cat([row["labels"] for row in rows]).tolist()):
        assert label == (-100 if place in starts or place >= len(flat) else flat[place])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 25), st.integers(1, 12), st.integers(0, 3))
def test_shuffled_rows_are_the_same_rows_a_window_at_a_time(lengths, sequence_length, shuffle, seed):
    documents = documents_of(lengths)
    plain = list(SplitRows(documents, sequence_length))
    dealt = list(ShuffledRows(documents, sequence_length, shuffle_rows=shuffle, seed=seed))
    assert len(dealt) == len(plain)

    def contents(rows: list[dict]) -> list[str]:
        return sorted(repr({name: tensor.tolist() for name, tensor in row.items()}) for row in rows)

    for start in range(0, len(plain), shuffle):
        assert contents(dealt[start : start + shuffle]) == contents(plain[start : start + shuffle])


def test_the_order_of_shuffled_rows_is_the_seeds_and_changes_from_window_to_window_and_round_to_round():
    documents = [[number + 3] * 4 for number in range(40)]

    def order(rows: Rows) -> list[int]:
        return [row["input_ids"][0].item() - 3 for row in rows]

    rows = ShuffledRows(documents, 4, shuffle_rows=20, seed=1)
    first, second = order(rows), order(rows)
    assert first == order(ShuffledRows(documents, 4, shuffle_rows=20, seed=1))
    assert first != order(ShuffledRows(documents, 4, shuffle_rows=20, seed=2))
    assert len({tuple(first[:20]), tuple(n - 20 for n in first[20:]), tuple(second[:20])}) == 3
    assert sum(abs(a - b) == 1 for a, b in zip(first, first[1:])) < 12  # 38 neighbours when nothing is shuffled


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(40, 90), st.integers(1, 12))
def test_whole_documents_are_never_cut(lengths, sequence_length, window):
    documents = documents_of(lengths)
    rows = list(WholeRows(documents, sequence_length, window_documents=window))
    found = []
    for row in rows:
        real = int((row["position_ids"] == 0).sum())
        pieces = pieces_of(row)
        used = sum(len(p["input_ids"]) for p in pieces if (p["labels"] != -100).any() or len(p["input_ids"]) == 1)
        assert used <= sequence_length and real == len(pieces)
        found += [p["input_ids"].tolist() for p in pieces]
    found = [piece for piece in found if any(piece)]  # padding is all zeros, documents hold none
    assert sorted(found) == sorted(documents)


def test_whole_documents_keep_their_labels():
    documents = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [9, -100]}]
    (row,) = WholeRows(documents, 8, pad_token_id=1)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10, 1, 1]
    assert row["labels"].tolist() == [-100, -100, 7, 8, -100, -100, -100, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert all(tensor.dtype == torch.int64 for tensor in row.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_best_fit_leaves_no_two_rows_that_fit_in_one(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    half_empty = sum(sum(lengths[i] for i in row) <= 25 for row in rows)
    assert half_empty <= 1


def test_best_fit_takes_the_fewest_rows_where_that_is_known():
    assert best_fit([6, 4, 5, 5, 3, 7], 10) == [[0, 1], [2, 3], [4, 5]]
    assert best_fit([4, 4, 4, 6, 6, 6], 10) == [[0, 3], [1, 4], [2, 5]]
    assert best_fit([10, 1, 9], 10) == [[0], [1, 2]]


@pytest.mark.parametrize("shape", ["dense", "moe"])
@pytest.mark.parametrize("split", [True, False])
def test_model_sees_each_document_alone(shape, split):
    """Logits of every stretch of a packed row are those of the stretch in its own row: convolution, scan, attention."""
    model = tiny_model(shape).double()
    if shape == "moe":
        model.set_experts_implementation("eager")  # grouped matrix products have no float64
    documents = documents_of([9, 1, 30, 2, 17, 3, 40, 5])
    rows = list((SplitRows if split else WholeRows)(documents, 40))
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert any(len(pieces_of(row)) > 2 for row in rows)
    with torch.no_grad():
        packed = model(**batch)
        total, count = 0.0, 0
        for row, logits in zip(rows, packed.logits):
            alone = [(piece, model(piece["input_ids"][None]).logits[0]) for piece in pieces_of(row)]
            torch.testing.assert_close(logits, torch.cat([part for _, part in alone]), rtol=1e-10, atol=1e-10)
            for piece, part in alone:
                learned = piece["input_ids"][1:].clone()
                learned[piece["labels"][1:] == -100] = -100  # padding
                total += F.cross_entropy(part[:-1], learned, reduction="sum")
                count += int((learned != -100).sum())
        leaked = model(batch["input_ids"]).logits
    torch.testing.assert_close(packed.loss.double(), total / count, rtol=1e-6, atol=0)  # the loss itself is in float32
    assert count == sum(int((row["labels"] != -100).sum()) for row in rows)
    assert (leaked - packed.logits).abs().max() > 0.1, "documents do not influence each other even without positions"


def test_gradients_do_not_cross_documents():
    """The loss of one document has no gradient at the embeddings of another."""
    model = tiny_model().double()
    (row,) = SplitRows([[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14]], 12)
    labels = row["labels"].clone()
    labels[:5] = labels[8:] = -100
    model(row["input_ids"][None], labels=labels[None], position_ids=row["position_ids"][None]).loss.backward()
    gradient = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert gradient[[8, 9]].min() > 0.1  # 10 is only predicted
    gradient[[8, 9]] = 0
    assert gradient.max() < 1e-15  # rounding of sums over the whole row


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(3, 50), st.booleans(), st.integers(1, 9), st.integers(0, 9), st.data())
def test_resume_goes_on_exactly(lengths, sequence_length, split, window, shuffle, data):
    documents = [document[:sequence_length] for document in documents_of(lengths)]

    def make() -> Rows:
        if not split:
            return WholeRows(documents, sequence_length, window_documents=window)
        if not shuffle:
            return SplitRows(documents, sequence_length)
        return ShuffledRows(documents, sequence_length, shuffle_rows=shuffle, seed=3)

    both = make()
    whole = [*both, *both]  # two rounds
    cut = data.draw(st.integers(0, len(whole) // 2), label="rows done")
    ahead = data.draw(st.integers(0, len(whole) // 2 - cut), label="rows the loader has read ahead")
    before = make()
    iterator = iter(before)
    for _ in range(cut + ahead):
        next(iterator)
    after = make()
    after.load_state_dict(json.loads(json.dumps(before.state_after(cut))))
    assert after.rows_yielded == cut
    rest = list(after)
    rest += list(after) if len(rest) < len(whole) - cut else []
    assert equal_rows(rest, whole[cut:])


@pytest.mark.parametrize("split", [True, False])
def test_a_longer_run_goes_on_with_every_token_once(split):
    """The shorter run's last window is cut short, and its last row or two are not read."""
    draw = random.Random(0)
    for _ in range(60):
        documents = [[number + 1] * draw.randint(5, 30) for number in range(24)]
        shorter, longer = (
            ShuffledRows(part, 40, shuffle_rows=8) if split else WholeRows(part, 40, window_documents=8)
            for part in (documents[: draw.randint(2, 20)], documents)
        )
        rows = list(shorter)
        done = max(0, len(rows) - draw.randint(1, 2))
        longer.load_state_dict(json.loads(json.dumps(shorter.state_after(done))))
        tokens = torch.cat([row["input_ids"] for row in [*rows[:done], *longer]]).tolist()
        assert sorted(filter(None, tokens)) == [token for document in documents for token in document]


def test_a_change_of_phase_that_a_begun_window_has_seen_may_not_move(tmp_path):
    """The window begins in the first phase; some of its rows, already dealt, are of the second."""
    write_texts(tmp_path)
    phases = [{"until": "50%", "weights": {"low": 3, "high": 1}}, {"weights": {"low": 1, "high": 3}}]

    def make(total_tokens: int) -> Rows:
        sources = sources_from({name: {"path": str(tmp_path / name / "*.txt")} for name in ("low", "high")})
        blend = Blend(sources, phases_from(phases), lambda text: [ord(c) for c in text], total_tokens)
        return ShuffledRows(blend, 20, shuffle_rows=16)

    rows = make(600)  # the phase changes at 300, the window ends at 320
    assert len(list(islice(rows, 15))) == 15
    state = rows.state_after(15)
    assert state["documents"]["tokens"] == 0
    make(600).load_state_dict(state)
    with pytest.raises(ValueError, match="phases"):
        make(2000).load_state_dict(state)


def test_loader_reads_ahead_and_state_stays_exact():
    documents = documents_of(range(1, 60))
    rows = SplitRows(documents, 32)
    loader = DataLoader(rows, batch_size=4)
    batches = iter(loader)
    seen = [next(batches) for _ in range(3)]
    resumed = SplitRows(documents, 32)
    resumed.load_state_dict(rows.state_after(8))
    third = next(iter(DataLoader(resumed, batch_size=4)))
    assert all(torch.equal(third[name], seen[2][name]) for name in third)


def test_states_are_kept_for_the_last_rows():
    rows = SplitRows(documents_of([700]), 1)
    list(rows)
    assert rows.state_after(700)["rows"] == 700
    assert rows.state_after(700 - STATES_KEPT + 1)["done"] == 700 - STATES_KEPT + 1
    with pytest.raises(ValueError, match=f"num_rows is 3; states are kept for {700 - STATES_KEPT + 1} to 700 rows"):
        rows.state_after(3)


def test_another_row_length_may_go_on_where_documents_are_split():
    documents = documents_of([50, 30, 20])
    before = SplitRows(documents, 16)
    iterator = iter(before)
    for _ in range(3):
        next(iterator)
    after = SplitRows(documents, 20)
    after.load_state_dict(before.state_after(3))
    flat = [token for document in documents for token in document]
    assert torch.cat([row["input_ids"] for row in after]).tolist()[: 100 - 48] == flat[48:]
    dealing = ShuffledRows(documents, 16, shuffle_rows=4)
    next(iter(dealing))
    with pytest.raises(ValueError, match="sequence_length of the rows is 20, the state was saved with 16"):
        after.load_state_dict(dealing.state_dict())
    with pytest.raises(ValueError, match="shuffle_rows of the rows is 0, the state was saved with 4"):
        before.load_state_dict(dealing.state_dict())
    with pytest.raises(ValueError, match="seed of the rows is 1, the state was saved with 0"):
        ShuffledRows(documents, 16, shuffle_rows=4, seed=1).load_state_dict(dealing.state_dict())
    whole = WholeRows(documents, 64)
    with pytest.raises(ValueError, match="kind of the rows is whole, the state was saved with split"):
        whole.load_state_dict(before.state_after(3))
    other = WholeRows(documents, 60)
    with pytest.raises(ValueError, match="sequence_length of the rows is 60, the state was saved with 64"):
        other.load_state_dict(whole.state_dict())


def test_documents_longer_than_a_row(caplog):
    documents = documents_of([5, 90, 6, 70])
    rows = WholeRows(documents, 16)
    assert len(list(rows)) == 1
    assert dict(rows.bad.counts) == {"longer than a row": 2}
    assert "90 tokens, 16 fit" in caplog.text
    again = WholeRows(documents, 16)
    again.load_state_dict(rows.state_dict())
    assert again.bad.counts == rows.bad.counts
    assert len(list(again)) == 1
    with pytest.raises(ValueError, match="90 tokens, 16 fit"):
        list(WholeRows(documents, 16, on_long_document="error"))
    with pytest.raises(ValueError, match="sequence_length is 4, and no document fits"):
        list(WholeRows(documents, 4))


def test_what_packing_refuses():
    with pytest.raises(ValueError, match="documents is a generator, which can be read once"):
        SplitRows((document for document in [[1]]), 8)
    with pytest.raises(ValueError, match="sequence_length=0"):
        SplitRows([[1]], 0)
    with pytest.raises(ValueError, match="shuffle_rows=-1: allowed is 1 or more"):
        ShuffledRows([[1]], 8, shuffle_rows=-1)
    with pytest.raises(ValueError, match="window_documents=0: allowed is 1 or more"):
        WholeRows([[1]], 8, window_documents=0)
    with pytest.raises(ValueError, match=r"input_ids of shape \(2,\) and labels of \(1,\)"):
        list(SplitRows([{"input_ids": [1, 2], "labels": [1]}], 8))
    with pytest.raises(ValueError, match="at least one token"):
        list(SplitRows([[]], 8))
    with pytest.raises(ValueError, match="num_workers of the data loader is not 0"):
        list(DataLoader(SplitRows([[1]], 8), num_workers=1))


def test_resumed_rows_that_have_ended_are_no_error():
    """A run that stops after its last row, with documents left out before: there is just nothing more."""
    rows = WholeRows(EndsOnce([[5] * 4, [5] * 99, [5] * 4]), 4)
    list(rows)
    again = WholeRows(EndsOnce([[5] * 4, [5] * 99, [5] * 4]), 4)
    again.load_state_dict(rows.state_dict())
    assert again.rows_yielded == 2 and list(again) == []


class EndsOnce:
    """Documents that end once, as a Blend does."""

    def __init__(self, documents):
        self.documents, self.taken = documents, 0

    asks_filled = False

    def take(self, filled=0):
        if self.taken == len(self.documents):
            return None
        self.taken += 1
        return self.documents[self.taken - 1]

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]
