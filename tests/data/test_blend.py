"""Blends keep every source within one document of its share at every moment, and resume exactly from any state."""

import json
import random

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.blended_rows import one_round, packed_blend
from nemotron_h_hf.data.packing import Rows, SplitRows, WholeRows
from nemotron_h_hf.data.phases import Phase, phases_from, resolve_phases
from nemotron_h_hf.data.sources import Source


def words(text: str) -> list[int]:
    """A tokenizer for tests: one token per word, its number."""
    return [int(word) for word in text.split()]


def source_of(path, lengths: list[int], first: int, window: int = 3) -> Source:
    """Documents of these lengths, one per line of a file; each has its own number as its tokens."""
    path.write_text("".join(" ".join([str(first + i)] * length) + "\n" for i, length in enumerate(lengths)))
    return Source(path.name, str(path), format="lines", shuffle_window=window)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    folder, generator = tmp_path_factory.mktemp("blend"), random.Random(0)
    shapes = {"web": (40, 1, 30), "code": (25, 5, 90), "wiki": (7, 1, 4)}
    return [
        source_of(folder / name, [generator.randint(low, high) for _ in range(count)], 1000 * (place + 1))
        for place, (name, (count, low, high)) in enumerate(shapes.items())
    ]


PHASES = [
    Phase({"web": 0.59, "code": 0.2, "wiki": 0.088}, until="60%"),
    Phase({"code": 3, "wiki": 1}, until="80%"),
    Phase({"web": 1, "wiki": 1}),
    Phase({"wiki": 1}, last=150),
]
TOTAL = 6000


def make(sources, **kwargs) -> Blend:
    return Blend(sources, PHASES, words, TOTAL, **{"seed": 4, **kwargs})


def test_shares_are_exact_to_one_document_at_every_moment(sources):
    """Counted again here from what comes out, against the weights as written."""
    blend = make(sources)
    ends = [3600, 4800, 5850, 6000]
    total, phase, counts, longest = 0, 0, {}, 0
    for name, ids in blend:
        while total >= ends[phase]:
            phase, counts = phase + 1, {}
        assert name in PHASES[phase].weights
        counts[name] = counts.get(name, 0) + len(ids)
        total, longest = total + len(ids), max(longest, len(ids))
        weights = PHASES[phase].weights
        for other, weight in weights.items():
            ideal = weight / sum(weights.values()) * sum(counts.values())
            assert abs(counts.get(other, 0) - ideal) <= longest, (phase, counts)
    assert phase == 3 and TOTAL <= total < TOTAL + longest


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1), min_size=2, max_size=7),
    longest=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_shares_are_exact_for_any_weights_and_lengths(tmp_path_factory, weights, longest, seed):
    folder, generator = tmp_path_factory.mktemp("any"), random.Random(seed)
    names = [f"s{i}" for i in range(len(weights))]
    sources = [
        source_of(folder / name, [generator.choice((1, longest, generator.randint(1, longest))) for _ in range(9)], 1)
        for name in names
    ]
    blend = Blend(sources, [Phase(dict(zip(names, weights)))], words, 40 * longest, seed)
    counts = dict.fromkeys(names, 0)
    for name, ids in blend:
        counts[name] += len(ids)
        for other, weight in zip(names, weights):
            assert abs(counts[other] - weight / sum(weights) * sum(counts.values())) <= longest + 1e-6


def test_same_seed_same_order(sources):
    assert list(make(sources)) == list(make(sources))
    assert list(make(sources)) != list(make(sources, seed=5))


def test_resume_at_any_document_goes_on_exactly(sources):
    """In the middle of phases and windows, at their ends, over several epochs of a source, before and after everything."""
    whole = list(make(sources))
    lengths = [len(ids) for _, ids in whole]
    changes = [
        n
        for n in range(1, len(whole))
        if any(sum(lengths[:n]) >= end > sum(lengths[: n - 1]) for end in (3600, 4800, 5850))
    ]
    assert len(changes) == 3
    cuts = {0, 1, len(whole) - 1, len(whole), *random.Random(1).sample(range(len(whole)), 12)}
    for cut in cuts | {change + shift for change in changes for shift in (-1, 0, 1)}:
        before = make(sources)
        iterator = iter(before)
        for _ in range(cut):
            next(iterator)
        state = json.loads(json.dumps(before.state_dict()))
        after = make(sources)
        after.load_state_dict(state)
        assert list(after) == whole[cut:], cut
        uncut = make(sources)
        list(uncut)
        assert after.report() == uncut.report(), cut


def test_state_does_not_grow(sources):
    blend = make(sources)
    sizes = [len(json.dumps(blend.state_dict())) for _ in blend]
    assert max(sizes) < 1500


@pytest.mark.parametrize("split", [True, False])
def test_rows_resume_at_any_row(sources, split):
    """The same through packing: rows cut documents, and phases change inside of rows."""
    make_rows = lambda: (  # noqa: E731
        SplitRows(make(sources), 128) if split else WholeRows(make(sources), 128, window_documents=20)
    )
    whole = list(make_rows())
    for cut in range(0, len(whole), 7):
        before = make_rows()
        iterator = iter(before)
        for _ in range(min(cut + 4, len(whole))):
            next(iterator)
        after = make_rows()
        after.load_state_dict(json.loads(json.dumps(before.state_after(cut))))
        rest = list(after)
        assert len(rest) == len(whole) - cut
        assert all((a[name] == b[name]).all() for a, b in zip(rest, whole[cut:]) for name in a)


def talk_of(ids: list[int]) -> list[dict]:
    return [{"role": "user", "content": ids}, {"role": "assistant", "content": []}]


def join(messages: list[dict], tools: list | None = None) -> dict:
    ids = [number for message in messages for number in message["content"]]
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def padded(tmp_path) -> list[Source]:
    """Documents of which one fits into a row of 100, with 40 to 45 and with 10 tokens to spare, and short ones."""
    lengths = {"wide": [55, 60, 58, 57], "full": [90], "short": [7, 3, 11]}
    return [source_of(tmp_path / name, lens * 90, 1000 * n) for n, (name, lens) in enumerate(lengths.items(), 1)]


@pytest.mark.parametrize("joined", [False, True])
def test_phases_end_at_their_share_of_the_rows(padded, joined):
    """However much of them is padding; counted here in the rows."""
    phases = [Phase({"wide": 1}, until="30%"), Phase({"full": 1}, until="75%"), Phase({"short": 1})]
    encode = lambda text: {**join(talk_of(words(text))), "messages": talk_of(words(text))}  # noqa: E731
    num_rows = 2000
    rows = packed_blend(padded, phases, encode, num_rows * 100, 100, 0, join=join if joined else None)
    kinds = [int(row["input_ids"][0]) // 1000 for row, _ in zip(rows, range(num_rows))]
    changes = [kinds.index(kind) for kind in (1, 2, 3)]
    assert changes[0] == 0 and abs(changes[1] - 600) <= 1 and abs(changes[2] - 1500) <= 1
    assert kinds == sorted(kinds), "phases follow each other"


@pytest.mark.parametrize("joined, window", [(False, 9), (True, 9), (True, 1)])
def test_padded_rows_resume_at_any_row(padded, joined, window):
    phases = [
        Phase({"wide": 2, "short": 1}, until="40%"), Phase({"full": 1, "short": 1}, until="70%"), Phase({"wide": 1}),
    ]  # fmt: skip
    encode = lambda text: {**join(talk_of(words(text))), "messages": talk_of(words(text))}  # noqa: E731

    def make() -> Rows:
        rows = packed_blend(padded, phases, encode, 60 * 100, 100, 0, seed=3, join=join if joined else None)
        return WholeRows(rows.documents, 100, window_documents=window)

    first = make()
    whole = list(first)
    assert len(whole) >= 60
    for cut in range(len(whole) + 1):
        before, after = make(), make()
        for _ in zip(range(min(cut + 3, len(whole))), before):
            pass
        after.load_state_dict(json.loads(json.dumps(before.state_after(cut))))
        rest = list(after)
        assert len(rest) == len(whole) - cut
        assert all((a[name] == b[name]).all() for a, b in zip(rest, whole[cut:]) for name in a)
        assert after.documents.left_out() == first.documents.left_out()


def test_shares_within_a_phase_stay_exact_when_phases_end_by_rows(padded):
    weights = {"wide": 3, "full": 2, "short": 1}
    blend = Blend(padded, [Phase(weights, until="50%"), Phase({"short": 1})], words, 10_000)
    counts, tokens = dict.fromkeys(weights, 0), 0
    while blend.phase == 0:
        name, ids = blend.take(round(1.5 * tokens))
        if blend.phase == 1:
            break
        counts[name] += len(ids)
        tokens += len(ids)
        for other, weight in weights.items():
            assert abs(counts[other] - weight / 6 * tokens) <= 90
    assert 5000 <= 1.5 * tokens <= 5000 + 1.5 * 90


def test_report(sources):
    blend = make(sources)
    documents = list(blend)
    report = blend.report()
    for name in ("web", "code", "wiki"):
        mine = [ids for other, ids in documents if other == name]
        assert report[name]["tokens"] == sum(report[name]["tokens_by_phase"]) == sum(map(len, mine))
        assert report[name]["documents"] == len(mine)
    assert report["wiki"]["epoch"] > 10 and report["code"]["tokens_by_phase"][2:] == [0, 0]


def test_read_ahead_is_more_of_the_last_phase(sources):
    """What comes within the run is the same; beyond it the last phase's weights hold."""
    phases = [Phase({"web": 1.0}, until=300), Phase({"code": 1.0})]
    plain, longer = (Blend(sources, phases, words, 600, read_ahead=more) for more in (0, 500))
    within, all_of_it = list(plain), list(longer)
    assert all_of_it[: len(within)] == within
    assert 1100 <= longer.tokens < 1200 and {name for name, _ in all_of_it[len(within) :]} == {"code"}


def test_a_short_run_sees_rows_of_all_documents(tmp_path):
    """A tenth of an epoch, dealt out of windows as long as an epoch: rows of nearly all documents; resumed exactly."""
    source = source_of(tmp_path / "text", [100] * 50, 1000)

    def rows_of(tokens: int) -> Rows:
        return packed_blend(
            [source], [Phase({"text": 1.0})], words, tokens, 10, 0, split_documents=True, shuffle_rows=500
        )

    def taken(rows: Rows, count: int) -> list[int]:
        return [int(row["input_ids"][0]) for row, _ in zip(rows, range(count), strict=False)]

    seen = taken(rows_of(500), 50)
    assert len(set(seen)) > 20 and len(seen) == 50  # 32 are to be expected; whole documents would be 5
    before, after, longer = rows_of(500), rows_of(500), rows_of(2000)
    assert taken(before, 17) == seen[:17]
    for rows in (after, longer):
        rows.load_state_dict(json.loads(json.dumps(before.state_after(17))))
        assert taken(rows, 33) == seen[17:], "a longer run reads on with the same windows"
    with pytest.raises(ValueError, match="shuffle_rows=500: allowed is up to 40, the rows of the shortest phase"):
        phases = [Phase({"text": 1.0}, until=600), Phase({"text": 1.0})]
        packed_blend([source], phases, words, 1000, 10, 0, split_documents=True, shuffle_rows=500)


def test_documents_that_cannot_be_used_are_counted(caplog):
    texts = ["1 2 3", "not numbers", "4 " * 50, "5"]
    source = Source("web", dataset=datasets.Dataset.from_dict({"text": texts}), shuffle_window=0)
    make_one = lambda **kw: Blend([source], [Phase({"web": 1})], words, 12, max_document_tokens=20, **kw)  # noqa: E731
    blend = make_one()
    assert [ids for _, ids in blend] == [[1, 2, 3], [5]] * 3
    assert blend.report()["web"]["bad"] == {"cannot be encoded": 3, "too long": 3}
    assert "web, shard 0:3: too long (50 tokens, allowed are 20)" in caplog.text
    with pytest.raises(ValueError, match="shard 0:2: cannot be encoded"):
        list(make_one(on_bad_data="error"))
    nothing = Blend([source], [Phase({"web": 1})], lambda text: [], 12)
    with pytest.raises(ValueError, match="source web: no usable document in a whole epoch; .* no tokens"):
        list(nothing)


def test_totals_are_told_once_by_the_first_process(tmp_path, caplog, monkeypatch):
    (tmp_path / "a").write_text("1 2\nno\n" + "3 " * 9 + "\n\xff\n" + "x\n" * 6 + "4\n")
    source = Source("web", str(tmp_path / "a"), format="lines", shuffle_window=0)
    blend = Blend([source], [Phase({"web": 1})], words, 3, max_document_tokens=8)
    list(blend)
    assert blend.left_out() == {"web": {"cannot be encoded": 8, "too long": 1}}
    caplog.clear()
    tell_left_out({**blend.left_out(), "code": {}})
    assert caplog.messages == ["left out in all of source web: 8 x cannot be encoded, 1 x too long"]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank, times in ((0, 2), (1, 2)):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        tell_left_out(blend.left_out())
        assert len(caplog.messages) == times


def test_a_round_names_what_is_too_long_and_tells_totals(tmp_path, caplog):
    (tmp_path / "a").write_text("1 2\nno\n" + "3 " * 9 + "\n4\n")
    source = Source("held_out", str(tmp_path / "a"), format="lines")
    rows = list(one_round(source, words, 8, 0))
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 4, 0, 0, 0, 0, 0]]
    assert f"{tmp_path}/a:3: too long (9 tokens, allowed are 8)" in caplog.text
    assert caplog.messages[-1] == "left out in all of source held_out: 1 x cannot be encoded, 1 x too long"
    with pytest.raises(ValueError, match="held_out: .* has no usable record; .*a:4: too long"):
        list(one_round(source, lambda text: words(text) * 9, 8, 0))
    with pytest.raises(ValueError, match="a:3: too long"):
        list(one_round(source, lambda text: [3] * len(text.split()), 8, 0, on_bad_data="error"))


def test_encoded_mappings_pass_through():
    source = Source("chat", dataset=datasets.Dataset.from_dict({"text": ["1 2", "3 4"]}), shuffle_window=0)
    encode = lambda text: {"input_ids": words(text), "labels": [-100, 9]}  # noqa: E731
    first = next(iter(Blend([source], [Phase({"chat": 1})], encode, 4)))
    assert first == ("chat", {"input_ids": [1, 2], "labels": [-100, 9], "origin": "chat, shard 0:1"})
    blend = Blend([source], [Phase({"chat": 1})], encode, 4)
    (row,) = SplitRows(blend, 4)
    assert row["input_ids"].tolist() == [1, 2, 3, 4] and row["labels"].tolist() == [-100, 9, -100, 9]


def test_resume_refuses_another_blend(sources, caplog):
    blend = make(sources)
    iterator = iter(blend)
    for _ in range(150):
        next(iterator)
    assert blend.phase == 0
    state = blend.state_dict()
    with pytest.raises(ValueError, match="seed is 5, the state was saved with 4"):
        make(sources, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"sources are \['web'\], the state was saved with \['code', 'web', 'wiki'\]"):
        Blend(sources, [Phase({"web": 1})], words, TOTAL, 4).load_state_dict(state)
    other = [Phase({"web": 1, "code": 1, "wiki": 1})]
    with pytest.raises(ValueError, match="those begun may not change"):
        Blend(sources, other, words, TOTAL, 4).load_state_dict(state)
    longer = Blend(sources, PHASES, words, 2 * TOTAL, 4)
    longer.load_state_dict(state)
    assert "are changed" in caplog.text
    assert sum(len(ids) for _, ids in longer) + state["tokens"] >= 2 * TOTAL


def test_phases_cover_the_run():
    phases = phases_from(
        [{"until": "60%", "weights": {"a": 3, "b": 1}}, {"weights": {"a": 1}}, {"last": "380B", "weights": {"b": 2}}]
    )
    spans = resolve_phases(phases, ["a", "b"], 15 * 10**12)
    assert [(s.start, s.end) for s in spans] == [
        (0, 9 * 10**12),
        (9 * 10**12, 14_620 * 10**9),
        (14_620 * 10**9, 15 * 10**12),
    ]
    assert [s.weights for s in spans] == [{"a": 0.75, "b": 0.25}, {"a": 1}, {"b": 1}]


@pytest.mark.parametrize(
    "phases, said",
    [
        ([Phase({"a": 1}, until="60%"), Phase({"a": 1}, last=10)], "last is 10, so it begins at 90 tokens, .* end at 60"),
        ([Phase({"a": 1}, until="60%")], "phases end at 60 tokens, total_tokens is 100"),
        ([Phase({"a": 1}, until=50), Phase({"a": 1}, until="40%")], "number 2 ends at 40 tokens: allowed is more than 50"),
        ([Phase({"a": 1}), Phase({"a": 1})], "number 1 has no `until`"),
        ([Phase({"a": 1}, last=5), Phase({"a": 1})], "number 1: last is 5; only the last phase"),
        ([Phase({"a": 1}, last=5, until=5)], "only the last phase may have it, and then no `until`"),
        ([Phase({"ab": 1})], "weights has a key 'ab'; did you mean 'a'"),
        ([Phase({"a": -1})], "weight of a is -1"),
        ([Phase({"a": float("nan")})], "weight of a is nan"),
        ([Phase({"a": "1"})], "weight of a is '1'"),
        ([Phase({"a": 0})], "at least one source needs a positive weight"),
        ([Phase({"a": 1}, until="half")], "until='half': allowed is a number of tokens"),
        ([], "phases is empty"),
    ],
)  # fmt: skip
def test_phases_that_make_no_sense(phases, said):
    with pytest.raises(ValueError, match=said):
        resolve_phases(phases, ["a"], 100)


def test_what_a_blend_refuses(sources):
    with pytest.raises(ValueError, match="each name is allowed once"):
        Blend([*sources, sources[0]], PHASES, words, TOTAL)
    with pytest.raises(ValueError, match="total_tokens=0"):
        Blend(sources, PHASES, words, 0)
    with pytest.raises(ValueError, match="phases, number 1 has a key 'untl'; did you mean 'until'"):
        phases_from([{"untl": 5, "weights": {}}])
