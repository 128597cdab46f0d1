"""Reading records out of files: whole texts, lines, JSON lines, parquet, and shards of a `datasets` dataset.

Each reader yields `(record, position)`. The position is small and JSON-able; given as `start`, it leads to the next
record. Unusable records go to the source's `BadData` with file and line. An error of the file system is not bad data and
is raised.
"""

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .bad_data import BadData

FORMATS = ("text", "lines", "jsonl", "parquet")
FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
BATCH_ROWS = 256  # rows of a parquet file in memory at once


class Record(NamedTuple):
    """A value of the column asked for, and where it stands, such as `web/a.jsonl:17`."""

    value: Any
    origin: str


Position = Any  # anything JSON can hold
Read = Iterator[tuple[Record, Position]]


def find_files(name: str, path: str | list[str] | tuple[str, ...]) -> list[str]:
    """Files of a source in sorted order: each path is a file, a folder (everything under it) or a pattern (`**` too)."""
    found: set[str] = set()
    for pattern in [path] if isinstance(path, str) else path:
        pattern = str(Path(pattern).expanduser())
        wanted = str(Path(glob.escape(pattern), "**", "*")) if Path(pattern).is_dir() else pattern
        files = [pattern] if Path(pattern).is_file() else glob.glob(wanted, recursive=True)
        files = [file for file in files if Path(file).is_file()]
        if not files:
            raise ValueError(f"source {name}: path={pattern!r}: allowed is a file, folder or pattern that exists")
        found.update(files)
    return sorted(found)


def reader_of(path: str, format: str | None) -> Callable[..., Read]:
    """The reader for a file."""
    readers = {"text": read_text, "lines": read_lines, "jsonl": read_jsonl, "parquet": read_parquet}
    return readers[format_of(path, format)]


def format_of(path: str, format: str | None) -> str:
    """The format given, or that of the file's suffix; whole texts if that says nothing."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return format or FORMAT_OF_SUFFIX.get(suffixes[-1] if suffixes else "", "text")


def read_text(path: str, column: str | None, bad: BadData, start: Position = None) -> Read:
    """The file as one document."""
    if start is not None:
        return
    try:
        with _open(path) as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return bad.report(path, "cut short or not gzip", str(error))
    if not data:
        return bad.report(path, "empty file")
    text = _decoded(data, path, 1, bad)
    if text is not None:
        yield Record(text, f"{path}:1"), "end"


def read_lines(path: str, column: str | None, bad: BadData, start: Position = None) -> Read:
    """Every line that is not blank as a document."""
    return _read_records(path, "lines", column, bad, start)


def read_jsonl(path: str, column: str | None, bad: BadData, start: Position = None) -> Read:
    """A JSON object per line; the value under `column`, or with None the whole object."""
    return _read_records(path, "jsonl", column, bad, start)


def _read_records(path: str, format: str, column: str | None, bad: BadData, start: Position) -> Read:
    for number, line, position in _lines(path, bad, start):
        record = as_record(line, path, number, format, column, bad)
        if record is not None:
            yield record, position


def as_record(line: bytes, path: str, number: int, format: str, column: str | None, bad: BadData) -> Record | None:
    """The record in a line that is not blank; None, and a report, if it has no record."""
    origin = f"{path}:{number}"
    text = _decoded(line, path, number, bad)
    if text is None:
        return None
    if format == "lines":
        return Record(text.rstrip("\r\n"), origin)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        return bad.report(origin, "malformed JSON", str(error))
    if not isinstance(row, dict):
        return bad.report(origin, "not a JSON object", type(row).__name__)
    if column is not None and column not in row:
        return bad.report(origin, f"no column {column!r}", f"it has {', '.join(row) or 'none'}")
    value = row if column is None else row[column]
    if ("\\ud" in text or "\\uD" in text) and (half := _half_character(value)):
        return bad.report(origin, "half a character", f"{half} alone")
    return Record(value, origin)


def _half_character(value: Any) -> str | None:
    """Of a JSON value, an escape such as \\ud83d without its other half, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def read_parquet(path: str, column: str | None, bad: BadData, start: Position = None) -> Read:
    """Rows of a parquet file, a batch at a time."""
    import pyarrow
    import pyarrow.parquet

    first, row = start or (0, 0)
    before = 0  # rows of the groups before
    with open(path, "rb") as opened:
        if not opened.read(1):
            return bad.report(path, "empty file")
        try:
            file = pyarrow.parquet.ParquetFile(path)
            names = file.schema_arrow.names
            if column is not None and column not in names:
                return bad.report(path, f"no column {column!r}", f"it has {', '.join(names)}")
            columns = None if column is None else [column]
            before = sum(file.metadata.row_group(i).num_rows for i in range(first))
            for group in range(first, file.num_row_groups):
                seen = 0
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for value in _values(batch.slice(max(0, row - seen))) if row < seen + len(batch) else []:
                        row += 1
                        if value is None:
                            bad.report(f"{path}:{before + row}", "not UTF-8")
                            continue
                        value = value if column is None else value[column]
                        yield Record(value, f"{path}:{before + row}"), [group, row]
                    seen += len(batch)
                before, row = before + seen, 0
        except (pyarrow.ArrowException, OSError) as error:
            bad.report(f"{path}: after row {before + row}", "unreadable parquet", str(error).splitlines()[0])


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one with text that is not UTF-8, which parquet does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [value for row in range(len(batch)) for value in _values(batch.slice(row, 1))]


def read_shard(dataset: Any, index: int, name: str, column: str | None, bad: BadData, start: Position = None) -> Read:
    """Rows of one shard of a `datasets.IterableDataset`; the position is the shard's own state."""
    shard = dataset.shard(num_shards=dataset.num_shards, index=index)
    number = 0
    if start is not None:
        number, state = start
        shard.load_state_dict(state)
    for row in shard:
        number += 1
        origin = f"{name}, shard {index}:{number}"
        if column is not None and column not in row:
            bad.report(origin, f"no column {column!r}", f"it has {', '.join(row)}")
            continue
        yield Record(row if column is None else row[column], origin), [number, shard.state_dict()]


def _lines(path: str, bad: BadData, start: Position) -> Iterator[tuple[int, bytes, Position]]:
    """Line number (from 1), bytes, and position after the line, for lines that are not blank."""
    offset, number = start or (0, 0)
    with _open(path) as file:
        file.seek(offset)
        while True:
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                return bad.report(f"{path}:{number + 1}", "cut short or not gzip", str(error))
            if not line:
                break
            offset, number = offset + len(line), number + 1
            if line.strip():
                yield number, line, [offset, number]
    if number == 0:
        bad.report(path, "empty file")


def _open(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def _decoded(data: bytes, path: str, number: int, bad: BadData) -> str | None:
    """UTF-8 text without a byte order mark; None, and a report with the line of the first wrong byte, if it is not."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data[: error.start].count(b"\n")
        return bad.report(f"{path}:{line}", "not UTF-8", f"byte {data[error.start]:#04x}, {error.reason}")
