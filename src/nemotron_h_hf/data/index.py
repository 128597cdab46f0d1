"""Where every record of a local source is, to read them in any order.

The index has the offset of each line, and of a parquet file only the number of rows: a hundred million lines take 800 MB.
A gzip file cannot be read from its middle, and a large parquet file only by whole row groups: such sources have no index.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np

from .bad_data import BadData
from .readers import Record, as_record, format_of, read_parquet, read_text

MAX_PARQUET_BYTES = 2**28  # of the column in memory
FILES_OPEN = 64
BLOCK_BYTES = 2**22


class FileIndex:
    """The records of local files by number, in the order of the files; blank lines have a number too.

    Args:
        files: paths.
        format: as a source's.
        column: as a source's.
    """

    def __init__(self, files: Sequence[str], format: str | None, column: str | None):
        self.files, self.column = files, column
        self.formats = [format_of(path, format) for path in files]
        self._lines = {
            number: _line_offsets(path)
            for number, (path, kind) in enumerate(zip(files, self.formats, strict=True))
            if kind in ("lines", "jsonl")
        }
        counts = (self._count(number) for number in range(len(files)))
        self._ends = list(accumulate(counts))
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._tables: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, number: int, bad: BadData) -> Iterator[Record]:
        """Record `number`; none where it cannot be used, which is reported."""
        file = bisect_right(self._ends, number)
        place = number - (self._ends[file - 1] if file else 0)
        path, kind = self.files[file], self.formats[file]
        if kind == "text":
            yield from (record for record, _ in read_text(path, self.column, bad))
        elif kind == "parquet":
            yield from self._row(file, place, bad)
        elif not len(self._lines[file]):
            bad.report(path, "empty file")
        else:
            yield from self._line(file, place, bad)

    def _count(self, number: int) -> int:
        kind = self.formats[number]
        if kind == "parquet":
            return max(1, parquet_size(self.files[number], self.column)[0])
        return max(1, len(self._lines[number])) if kind in ("lines", "jsonl") else 1  # an empty file is told

    def _line(self, file: int, place: int, bad: BadData) -> Iterator[Record]:
        path = self.files[file]
        opened = self._file(path)
        opened.seek(int(self._lines[file][place]))
        line = opened.readline()
        if line.strip():
            record = as_record(line, path, place + 1, self.formats[file], self.column, bad)
            if record is not None:
                yield record

    def _row(self, file: int, place: int, bad: BadData) -> Iterator[Record]:
        """A row of a parquet file, whose column is read when the first of it is asked for."""
        if file not in self._tables:
            self._tables[file] = [record for record, _ in read_parquet(self.files[file], self.column, bad)]
        rows = self._tables[file]
        if place < len(rows):
            yield rows[place]

    def _file(self, path: str) -> BinaryIO:
        if path not in self._open:
            self._open[path] = open(path, "rb")  # noqa: SIM115
        self._open.move_to_end(path)
        if len(self._open) > FILES_OPEN:
            self._open.popitem(last=False)[1].close()
        return self._open[path]


class RowIndex:
    """The rows of a `datasets.Dataset` that is loaded."""

    def __init__(self, dataset: Any, name: str, column: str | None):
        self.dataset, self.name, self.column = dataset, name, column

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int, bad: BadData) -> Iterator[Record]:
        """As FileIndex's."""
        row, origin = self.dataset[number], f"{self.name}, row {number + 1}"
        if self.column is not None and self.column not in row:
            bad.report(origin, f"no column {self.column!r}", f"it has {', '.join(row)}")
        else:
            yield Record(row if self.column is None else row[self.column], origin)


def file_index(files: Sequence[str], format: str | None, column: str | None) -> FileIndex | None:
    """The index of local files; None where there is no reading in any order."""
    if any(path.lower().endswith(".gz") for path in files):
        return None
    parquet = [path for path in files if format_of(path, format) == "parquet"]
    if sum(parquet_size(path, column)[1] for path in parquet) > MAX_PARQUET_BYTES:
        return None
    return FileIndex(files, format, column)


def parquet_size(path: str, column: str | None) -> tuple[int, int]:
    """Rows of a parquet file, and bytes of the column in memory; (0, 0) where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowException, OSError):
        return 0, 0
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if column is None or chunk.path_in_schema.split(".")[0] == column]
    return metadata.num_rows, sum(chunk.total_uncompressed_size for chunk in wanted)


def _line_offsets(path: str) -> np.ndarray:
    """(lines) int64: where each line begins; none for an empty file."""
    size = os.path.getsize(path)
    found, start = [np.zeros(min(size, 1), np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (start + 1))
            start += len(block)
    offsets = np.concatenate(found)
    return offsets[offsets < size]
