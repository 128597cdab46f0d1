"""Sources read every record once per epoch in a seeded order, resume anywhere, and leave bad data out with a report."""

import gzip
import json
import os
import random

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h_hf.data import sources
from nemotron_h_hf.data.sources import SAMPLED_BYTES, Source, SourceStream, digest_of_files, shuffled, sources_from


def take(stream: SourceStream, count: int) -> list[str]:
    return [next(stream).value for _ in range(count)]


def write_jsonl(path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """30 texts, t0 to t29, in three files of JSON lines."""
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"t{number * 10 + i}" for i in range(10)])
    return tmp_path


TEXTS = {f"t{i}" for i in range(30)}


def test_every_epoch_has_every_record_once_in_an_order_of_its_own(folder, caplog):
    stream = SourceStream(Source("s", f"{folder}/*.jsonl", shuffle_window=7), seed=1)
    first, second = take(stream, 30), take(stream, 30)
    assert set(first) == set(second) == TEXTS and first != second and first != sorted(first)
    assert stream.epoch == 1
    assert "source s ended after epoch 1 and starts again" in caplog.text
    again = SourceStream(Source("s", f"{folder}/*.jsonl", shuffle_window=7), seed=1)
    assert take(again, 60) == first + second
    other = SourceStream(Source("s", f"{folder}/*.jsonl", shuffle_window=7), seed=2)
    assert take(other, 30) != first


def test_without_a_window_records_come_as_they_lie(folder):
    stream = SourceStream(Source("s", str(folder), shuffle_window=0))
    assert take(stream, 40) == [f"t{i % 30}" for i in range(40)]


def test_files_are_shuffled_too(folder):
    def firsts(seed: int) -> list[str]:
        stream = SourceStream(Source("s", str(folder), shuffle_window=1), seed=seed)
        return take(stream, 30)[::10]

    orders = {tuple(firsts(seed)) for seed in range(20)}
    assert len(orders) > 3 and all(set(order) == {"t0", "t10", "t20"} for order in orders)


def test_shuffling_is_the_same_in_every_process():
    assert shuffled(8, 0, "web", 3) == [6, 0, 3, 2, 4, 5, 7, 1]


def test_local_files_are_shuffled_over_all_records(tmp_path):
    """A beginning of the run is a sample of the whole source, however it is sorted."""
    write_jsonl(tmp_path / "a.jsonl", [f"{i:04d}" for i in range(3000)])
    (tmp_path / "b.txt").write_text("3000")
    (tmp_path / "c.lines").write_text("\n\n".join(f"{i:04d}" for i in range(3001, 4001)))
    pa.parquet.write_table(pa.table({"text": [f"{i:04d}" for i in range(4001, 6000)]}), tmp_path / "d.parquet")
    parts = [SourceStream(Source("s", f"{tmp_path}/{name}*", format=form))
             for name, form in (("a", None), ("b", None), ("c", "lines"), ("d", None))]  # fmt: skip
    assert [part.num_records for part in parts] == [3000, 1, 1999, 1999]  # blank lines have a number too
    (tmp_path / "c.lines").unlink()
    stream = SourceStream(Source("s", str(tmp_path)), seed=7)
    numbers = [int(text) for text in take(stream, 5000)]
    assert sorted(numbers) == [*range(3001), *range(4001, 6000)]
    for part in (numbers[:500], numbers[2000:2500]):  # five standard errors of the mean of 500
        assert abs(sum(part) / 500 - sum(numbers) / 5000) < 5 * 1830 / 500**0.5
    assert take(stream, 5000) != numbers


def test_a_loaded_dataset_is_shuffled_over_all_rows():
    dataset = datasets.Dataset.from_dict({"text": [f"{i}" for i in range(4000)]})
    stream = SourceStream(Source("s", dataset=dataset))
    numbers = [int(text) for text in take(stream, 4000)]
    assert sorted(numbers) == list(range(4000)) and abs(sum(numbers[:400]) / 400 - 2000) < 5 * 1155 / 20


@pytest.mark.parametrize("window", [1, 5, 64, 999, 1000, 2000])
def test_a_window_moves(tmp_path, window):
    """No record comes more than the window early or late, and records on both sides of a multiple of the window mixes."""
    write_jsonl(tmp_path / "a.jsonl", map(str, range(1000)))
    numbers = [int(text) for text in take(SourceStream(Source("s", str(tmp_path), shuffle_window=window)), 1000)]
    assert sorted(numbers) == list(range(1000))
    assert max(abs(place - number) for place, number in enumerate(numbers)) < window
    if window == 64:
        blocks = [set(numbers[start : start + window]) for start in range(0, 1000, window)]
        apart = sum(block == set(range(n * window, min(1000, (n + 1) * window))) for n, block in enumerate(blocks))
        assert apart < len(blocks) / 10


def test_gzip_files_have_a_moving_window(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STREAM_WINDOW", 50)
    lines = "".join(json.dumps({"text": str(i)}) + "\n" for i in range(300))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    make = lambda: SourceStream(Source("s", str(tmp_path)), seed=2)  # noqa: E731
    whole = take(make(), 700)
    assert whole[:300] != whole[300:600] and make().num_records is None
    assert max(abs(place - int(text)) for place, text in enumerate(whole[:300])) < 50
    for done in (0, 1, 49, 50, 51, 299, 300, 301, 455):
        before, after = make(), make()
        take(before, done)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert take(after, 700 - done) == whole[done:], done


SORTED = {
    # name: (records, what is told)
    "text": ([{"text": f"{i:04d}"} for i in range(200)], "sorted by their field 'text'"),
    "name": ([{"name": f"{i:04d}", "text": f"{i * 37 % 101}"} for i in range(200)], "sorted by their field 'name'"),
    "date": ([{"date": 200 - i, "text": f"{i * 37 % 101}"} for i in range(200)], "sorted by their field 'date'"),
    "not": ([{"date": i * 37 % 101, "text": f"{i * 37 % 101}"} for i in range(200)], None),
    "same": ([{"date": 2000, "text": f"{i * 37 % 101}"} for i in range(200)], None),
}


@pytest.mark.parametrize("name", SORTED)
def test_a_sorted_source_larger_than_its_window_is_named(tmp_path, caplog, name):
    records, said = SORTED[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for window in (None, 0, 200, 5000):  # nothing is out of reach
        take(SourceStream(Source("files", str(tmp_path), shuffle_window=window)), 200)
    assert "sorted" not in caplog.text
    take(SourceStream(Source("files", str(tmp_path), shuffle_window=50)), 1)
    assert said is None and "sorted" not in caplog.text or f"source files: its 200 records are {said}" in caplog.text


def test_a_sorted_stream_larger_than_its_window_is_named(caplog):
    dataset = datasets.Dataset.from_dict({"text": [f"{i:04d}" for i in range(200)]}).to_iterable_dataset()
    take(SourceStream(Source("small", dataset=dataset, shuffle_window=200)), 200)
    assert "sorted" not in caplog.text
    take(SourceStream(Source("hub", dataset=dataset, shuffle_window=50)), 200)
    assert "source hub: its more than 50 records are sorted by their text" in caplog.text


def test_another_window_and_an_order_of_before_are_refused_on_resume(folder):
    state = SourceStream(Source("s", str(folder), shuffle_window=7)).state_dict()
    for window in (None, 0, 8):
        with pytest.raises(ValueError, match=f"source s: shuffle_window={window}: .*saved with, 7 records at a time"):
            SourceStream(Source("s", str(folder), shuffle_window=window)).load_state_dict(state)
    del state["order"]
    with pytest.raises(ValueError, match="saved with, blocks, as an earlier version had it"):
        SourceStream(Source("s", str(folder), shuffle_window=7)).load_state_dict(state)


@settings(max_examples=60, deadline=None)
@given(window=st.none() | st.integers(0, 40), done=st.integers(0, 75))
def test_resume_goes_on_exactly(tmp_path_factory, window, done):
    folder = tmp_path_factory.mktemp("resume")
    write_jsonl(folder / "a.jsonl", [f"a{i}" for i in range(13)])
    write_jsonl(folder / "b.jsonl", [f"b{i}" for i in range(8)])
    (folder / "c.txt").write_text("c")
    make = lambda: SourceStream(Source("s", str(folder), shuffle_window=window), seed=3)  # noqa: E731
    whole = take(make(), 100)
    before = make()
    take(before, done)
    state = json.loads(json.dumps(before.state_dict()))
    after = make()
    after.load_state_dict(state)
    assert take(after, 100 - done) == whole[done:]
    assert len(json.dumps(state)) < 250


def test_formats(tmp_path):
    """The same records from every format, compressed or not."""
    texts = [f"text {i} \u00fc\u20ac\U0001f600" for i in range(700)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "a.lines").write_text("\n".join(texts), encoding="utf-8")
    pa.parquet.write_table(pa.table({"other": range(700), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    for name, form in (("a.jsonl", None), ("a.jsonl.gz", None), ("a.parquet", None), ("a.lines", "lines")):
        stream = SourceStream(Source("s", str(tmp_path / name), format=form, shuffle_window=0))
        assert take(stream, 700) == texts, name
        for done in (1, 255, 256, 299, 300, 301, 699, 700):
            before = SourceStream(Source("s", str(tmp_path / name), format=form, shuffle_window=0))
            take(before, done)
            after = SourceStream(Source("s", str(tmp_path / name), format=form, shuffle_window=0))
            after.load_state_dict(json.loads(json.dumps(before.state_dict())))
            assert next(after).value == texts[done % 700], (name, done)


def test_texts_keep_their_bytes(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfdef f():\r\n\treturn 1\r\n")
    stream = SourceStream(Source("code", f"{tmp_path}/**/*.py"))
    record = next(stream)
    assert record.value == "def f():\r\n\treturn 1\r\n"
    assert record.origin == f"{tmp_path}/a.py:1"


def test_conversations_and_whole_records(tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}], "id": 7}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert next(SourceStream(Source("s", str(tmp_path), column="messages"))).value == row["messages"]
    assert next(SourceStream(Source("s", str(tmp_path), column=None))).value == row


BAD_FILES = {
    # name: (content, where and what is reported, kind, good records in it)
    "empty.jsonl": (b"", "empty.jsonl: empty file", "empty file", 0),
    "empty.txt": (b"", "empty.txt: empty file", "empty file", 0),
    "empty.parquet": (b"", "empty.parquet: empty file", "empty file", 0),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', "utf8.jsonl:2: not UTF-8", "not UTF-8", 2),
    "utf8.txt": (b"one\ntwo\nthr\xffee\n", "utf8.txt:3: not UTF-8 (byte 0xff", "not UTF-8", 0),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": \n', "json.jsonl:3: malformed JSON", "malformed JSON", 1),
    "half.jsonl": (
        b'{"text": "a \\ud83d b"}\n{"text": "\\uD83D\\uDE00"}\n{"text": "\\\\ud83d"}\n{"text": "c", "more": [{"\\udE00": 1}]}\n',
        "half.jsonl:1: half a character (\\ud83d alone)", "half a character", 3,
    ),
    "digits.jsonl": (
        b'{"text": "a", "id": ' + b"7" * 5000 + b'}\n{"text": "b"}\n', "digits.jsonl:1: malformed JSON", "malformed JSON", 1,
    ),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl:2: malformed JSON", "malformed JSON", 1),
    "list.jsonl": (b'["text"]\n', "list.jsonl:1: not a JSON object (list)", "not a JSON object", 0),
    "column.jsonl": (b'{"body": "a", "id": 1}\n', "column.jsonl:1: no column 'text' (it has body, id)", "no column 'text'", 0),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl:1: neither text nor list (int)", "neither text nor list", 0),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl:1: neither text nor list (NoneType)", "neither text nor list", 0),
    "blank.jsonl": (b'{"text": " \\n"}\n', "blank.jsonl:1: empty document", "empty document", 0),
    "cut.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 5)[:-12], "cut.jsonl.gz:2: cut short or not gzip", "cut short or not gzip", 1,
    ),
    "not.txt.gz": (b"plain", "not.txt.gz: cut short or not gzip", "cut short or not gzip", 0),
    "junk.parquet": (b"not parquet at all", "junk.parquet: after row 0: unreadable", "unreadable parquet", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_reported_and_left_out(tmp_path, caplog, name):
    content, said, kind, good = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "zz.jsonl", ["good"])
    stream = SourceStream(Source("s", str(tmp_path), shuffle_window=0))
    assert take(stream, good + 1)[-1] == "good" and stream.epoch == 0
    assert dict(stream.bad.counts) == {kind: 1}
    (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert line.startswith(f"source s: {tmp_path}/") and said in line
    with pytest.raises(ValueError, match=f"source s: .*{kind}"):
        take(SourceStream(Source("s", str(tmp_path), shuffle_window=0), on_bad_data="error"), good + 1)


def test_parquet_that_is_cut_or_lacks_the_column(tmp_path):
    table = pa.table({"body": ["a" * 50, "b", "c"]})
    pa.parquet.write_table(table, tmp_path / "column.parquet")
    data = (tmp_path / "column.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    write_jsonl(tmp_path / "z.jsonl", ["good"])
    stream = SourceStream(Source("s", str(tmp_path), shuffle_window=0))
    assert next(stream).value == "good"
    assert dict(stream.bad.counts) == {"no column 'text'": 1, "unreadable parquet": 1}


@pytest.mark.parametrize("window", [None, 0])
def test_parquet_with_text_that_is_not_utf8(tmp_path, window, caplog):
    """Of 600 rows, in three batches, one is left out, by any way of reading."""
    data = pa.array([b"row %d" % number if number != 300 else b"r\xffw" for number in range(600)])
    column = pa.Array.from_buffers(pa.string(), len(data), data.buffers())
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    stream = SourceStream(Source("s", str(tmp_path), shuffle_window=window))
    found = take(stream, 599)
    assert sorted(found) == sorted(f"row {number}" for number in range(600) if number != 300) and stream.epoch == 0
    assert "a.parquet:301: not UTF-8" in caplog.text


def test_parquet_damaged_in_the_middle_keeps_what_comes_before(tmp_path):
    texts = [f"{i:05d}" * 20 for i in range(600)]
    pa.parquet.write_table(
        pa.table({"text": texts}),
        tmp_path / "a.parquet",
        row_group_size=300,
        compression="snappy",
        use_dictionary=False,
    )
    start = pa.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[start : start + 400] = b"\xff" * 400
    (tmp_path / "a.parquet").write_bytes(data)
    stream = SourceStream(Source("s", str(tmp_path), shuffle_window=0))
    assert take(stream, 301) == [*texts[:300], texts[0]]  # then the next epoch
    assert dict(stream.bad.counts) == {"unreadable parquet": 1}


def test_counts_survive_a_resume_and_are_not_doubled(tmp_path):
    lines = ['{"text": "a"}', "broken", '{"text": "b"}', "broken", '{"text": "c"}', '{"text": "d"}', "broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for window in (0, 2, 10, None):
        for done in range(1, 12):
            source = Source("s", str(tmp_path), shuffle_window=window)
            whole, before, after = SourceStream(source), SourceStream(source), SourceStream(source)
            take(before, done)
            after.load_state_dict(before.state_dict())
            take(after, 12 - done)
            take(whole, 12)
            assert after.bad.counts == whole.bad.counts, (window, done)


def test_many_bad_records_are_told_a_few_times_only(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text("x\n" * 50 + '{"text": "a"}\n')
    stream = SourceStream(Source("s", str(tmp_path)))
    next(stream)
    assert stream.bad.counts["malformed JSON"] == 50
    assert len(caplog.records) == 5 and "counted only" in caplog.records[-1].getMessage()


def test_source_with_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(
        ValueError, match=r"source s: no usable record in 1 files; the last .*a.jsonl:1: no column 'text'"
    ):
        next(SourceStream(Source("s", str(tmp_path))))
    with pytest.raises(ValueError, match="source s: path=.*none"):
        SourceStream(Source("s", str(tmp_path / "none*.txt")))


def test_changed_files_are_refused_on_resume(folder):
    stream = SourceStream(Source("s", str(folder)))
    take(stream, 25)
    state = stream.state_dict()
    texts = (folder / "1.jsonl").read_text()
    edits = {"longer": texts + '{"text": "more"}\n', "shorter": texts[:-17], "as long": texts.replace("t15", "x15")}
    for edited in edits.values():
        (folder / "1.jsonl").write_text(edited)
        with pytest.raises(ValueError, match="source s: its files changed since the state was saved"):
            SourceStream(Source("s", str(folder))).load_state_dict(state)
    (folder / "1.jsonl").write_text(texts)
    os.utime(folder / "1.jsonl", (0, 0))  # as after a copy
    SourceStream(Source("s", str(folder))).load_state_dict(state)
    write_jsonl(folder / "new.jsonl", ["x"])
    with pytest.raises(ValueError, match="source s: its files changed since the state was saved"):
        SourceStream(Source("s", str(folder))).load_state_dict(state)


@pytest.mark.parametrize("place", ["beginning", "end", "middle of a packed file"])
def test_a_large_file_of_the_same_size_that_changed(tmp_path, place):
    path = tmp_path / ("a.jsonl.gz" if "packed" in place else "a.jsonl")
    lines = [json.dumps({"text": f"{random.Random(n).random()} {n:08d}"}) for n in range(4000)]
    pack = (lambda text: gzip.compress(text.encode(), 0)) if "packed" in place else str.encode
    path.write_bytes(pack("\n".join(lines)))
    size, before = path.stat().st_size, digest_of_files([str(path)])
    number = {"beginning": 0, "end": -1}.get(place, 2000)
    lines[number] = lines[number][:-10] + '90000000"}'
    path.write_bytes(pack("\n".join(lines)))
    assert size == path.stat().st_size > 5 * SAMPLED_BYTES
    assert digest_of_files([str(path)]) != before


def test_of_very_many_files_a_sample_is_read(folder, monkeypatch):
    files = sorted(str(path) for path in folder.iterdir())
    opened = []
    monkeypatch.setattr(sources, "SAMPLED_FILES", 2)
    monkeypatch.setattr(sources, "open", lambda path, mode: opened.append(path) or open(path, mode), raising=False)
    before = digest_of_files(files)
    assert opened == files[::2]
    with open(files[1], "a") as file:
        file.write("\n")
    assert digest_of_files(files) != before, "the size of every file counts"


def test_missing_records_show_where_the_digest_of_the_files_does_not(folder):
    """As where only a sample of very many files is read."""
    make = lambda: SourceStream(Source("s", str(folder), shuffle_window=100))  # noqa: E731
    stream = make()
    take(stream, 25)
    state = stream.state_dict() | {"taken": 20}
    for number in range(3):
        (folder / f"{number}.jsonl").write_text('{"text": "other"}\n')
    after = make()
    with pytest.raises(ValueError, match="source s: its files changed"):
        after.load_state_dict(state)
    with pytest.raises(ValueError, match="source s: its files hold fewer records"):
        make().load_state_dict(state | {"files": after.state_dict()["files"]})


def test_revision_of_a_hub_dataset(monkeypatch):
    asked = []

    def load(name, subset, **named):
        asked.append((name, subset, named))
        return datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    make = lambda **more: SourceStream(Source("hub", dataset="owner/name", **more))  # noqa: E731
    state = make(revision="abc").state_dict()
    assert asked == [("owner/name", None, {"split": "train", "revision": "abc", "streaming": True})]
    make(revision="abc").load_state_dict(state)
    for other in ({}, {"revision": "abd"}, {"revision": "abc", "subset": "x"}, {"revision": "abc", "split": "test"}):
        with pytest.raises(ValueError, match="source hub: its dataset, subset, split, revision or shards changed"):
            make(**other).load_state_dict(state)


@pytest.mark.parametrize("kind", ["folder", "dataset", "iterable"])
def test_datasets(tmp_path, kind):
    """A folder by name (as a hub id would be), and datasets that are loaded already."""
    if kind == "folder":
        for number in range(3):
            write_jsonl(tmp_path / f"{number}.jsonl", [f"t{number * 10 + i}" for i in range(10)])
        dataset = str(tmp_path)
    else:
        dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(30)]})
        dataset = dataset if kind == "dataset" else dataset.to_iterable_dataset(num_shards=3)
    make = lambda: SourceStream(Source("hub", dataset=dataset, shuffle_window=4), seed=5)  # noqa: E731
    whole = take(make(), 70)
    assert set(whole[:30]) == set(whole[30:60]) == TEXTS and whole[:30] != whole[30:60]
    for done in (0, 1, 3, 4, 5, 17, 29, 30, 31, 60):
        before, after = make(), make()
        take(before, done)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert take(after, 70 - done) == whole[done:], done


def test_dataset_with_bad_records(caplog):
    dataset = datasets.Dataset.from_dict({"text": ["a", None, "", "b"]})
    stream = SourceStream(Source("hub", dataset=dataset, shuffle_window=0))
    assert take(stream, 2) == ["a", "b"]
    assert dict(stream.bad.counts) == {"neither text nor list": 1, "empty document": 1}
    assert "hub, shard 0:2: neither text nor list" in caplog.text
    with pytest.raises(ValueError, match="no column 'body'"):
        next(SourceStream(Source("hub", dataset=dataset, column="body")))


def test_what_a_source_refuses():
    with pytest.raises(ValueError, match="path is None and dataset None; give one"):
        Source("s")
    with pytest.raises(ValueError, match="format='csv': allowed are text, lines, jsonl, parquet"):
        Source("s", "x", format="csv")
    with pytest.raises(ValueError, match="shuffle_window=-1"):
        Source("s", "x", shuffle_window=-1)
    for more in ({"path": "x"}, {"dataset": datasets.Dataset.from_dict({"text": ["a"]})}):
        with pytest.raises(ValueError, match="revision='v1': allowed is text, and only with the hub id"):
            Source("s", revision="v1", **more)
    with pytest.raises(ValueError, match="source web has a key 'pth'; did you mean 'path'"):
        sources_from({"web": {"pth": "x"}})
    with pytest.raises(ValueError, match="sources=None"):
        sources_from(None)
    with pytest.raises(ValueError, match="on_bad_data='ignore': allowed are 'skip' and 'error'"):
        SourceStream(Source("s", __file__), on_bad_data="ignore")
    with pytest.raises(ValueError, match="dataset is a int: allowed is a hub id"):
        SourceStream(Source("s", dataset=5))
    assert sources_from({"web": {"path": "x", "column": None}}) == [Source("web", "x", column=None)]
