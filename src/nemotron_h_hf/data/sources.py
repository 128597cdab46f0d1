"""Sources of documents: local files or a hub dataset, read without end in a seeded order that can be resumed exactly.

    sources:
      web:  {path: data/web/*.jsonl}
      code: {path: src/**/*.py}
      wiki: {dataset: owner/name, split: train, column: text}

The order of each epoch depends on the seed, the source's name and the epoch alone:

    local files            all records, by an index of their places (index.py)
    streams                files (or shards) shuffled, then records in a moving window: one that is read as number i comes
                           out among those read up to i + shuffle_window, so blocks are not kept apart
    shuffle_window: 0      in the order of the files

gzip files and large parquet files are read as streams. A state is a place to read from again and the number of records that
were taken since; it stays small, and a resumed source reads at most two windows again. A digest of the files is stored with it:
a source whose files changed is refused.
"""

import hashlib
import heapq
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .bad_data import BadData
from .index import FileIndex, RowIndex, file_index
from .phases import check_keys
from .readers import FORMATS, Read, Record, find_files, read_shard, reader_of
from .sortedness import FEWEST, SAMPLED, sorted_by, spread

logger = logging.getLogger(__name__)

SAMPLED_BYTES = 16384  # of the beginning and of the end of a file
SAMPLED_FILES = 1000  # opening a source of very many takes no minutes then
STREAM_WINDOW = 10_000  # records, where a source can only be read in order
ALL = "all records"
BLOCK = 1000  # records read at once in the order of an index


@dataclass(frozen=True)
class Source:
    """Where documents come from; `path` or `dataset`.

    Args:
        name: what weights and reports call it.
        path: file, folder or pattern, or a list of them. `.jsonl`, `.ndjson`, `.json` are JSON lines, `.parquet` is
            parquet, all else whole texts; `.gz` after any but parquet.
        dataset: hub id or folder for `datasets.load_dataset` (streamed), or a dataset that is already loaded.
        subset: configuration of the hub dataset.
        split: split of the hub dataset.
        revision: commit, tag or branch of the hub dataset; only a commit is sure to be the same when a run resumes.
        column: where the text or the list of messages is in a record; None (null in YAML) takes the whole record.
        format: one of text, lines, jsonl, parquet, where the suffix does not tell.
        shuffle_window: how many records a moving window holds; 0 keeps files and records in order. Default: local files are
            shuffled over all their records, and what can only be read in order in a window of STREAM_WINDOW.
    """

    name: str
    path: str | list[str] | tuple[str, ...] | None = None
    dataset: Any = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = "text"
    format: str | None = None
    shuffle_window: int | None = None

    def __post_init__(self):
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                f"source {self.name}: path is {self.path!r} and dataset {self.dataset!r}; give one of them"
            )
        if self.revision is not None and not (isinstance(self.revision, str) and isinstance(self.dataset, str)):
            raise ValueError(
                f"source {self.name}: revision={self.revision!r}: allowed is text, and only with the hub id of a dataset"
            )
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"source {self.name}: format={self.format!r}: allowed are {', '.join(FORMATS)}")
        if self.shuffle_window is not None and (not isinstance(self.shuffle_window, int) or self.shuffle_window < 0):
            raise ValueError(f"source {self.name}: shuffle_window={self.shuffle_window!r}: allowed is 0 or more")


def sources_from(items: Mapping[str, Mapping]) -> list[Source]:
    """Sources from the mapping of a YAML file; a key that is unknown is an error that names the nearest."""
    if not isinstance(items, Mapping) or not items:
        raise ValueError(f"sources={items!r}: allowed is a mapping from names to path or dataset")
    for name, item in items.items():
        check_keys(f"source {name}", item, [f.name for f in fields(Source) if f.name != "name"])
    return [Source(name=str(name), **item) for name, item in items.items()]


class SourceStream:
    """Records of a source, epoch after epoch.

    Args:
        source: what to read.
        seed: of the order.
        on_bad_data: "skip" (with a count and a warning) or "error".

    Raises:
        ValueError: if nothing is found, on bad data under "error", or when a whole epoch has no usable record.
    """

    def __init__(self, source: Source, seed: int = 0, on_bad_data: str = "skip"):
        self.source = source
        self.seed = seed
        self.bad = BadData(source.name, on_bad_data)
        self._dataset = None if source.dataset is None else open_dataset(source)
        self._files = find_files(source.name, source.path) if source.dataset is None else self._shard_names()
        self._digest = digest_of_files(self._files) if source.dataset is None else self._digest_of_dataset()
        index = self._make_index(source.column)
        self.num_records = None if index is None else len(index)
        self._index = index if source.shuffle_window is None else None
        self._window = STREAM_WINDOW if source.shuffle_window is None else source.shuffle_window
        self._first: list[Any] = []  # values of a stream, as they come, until it is known whether they are sorted
        if index is not None and self._index is None:
            self._warn_of_sorted_files()
        self.order = ALL if self._index is not None else f"{self._window or 'no'} records at a time"
        self._begin({"epoch": 0, "part": 0, "at": None, "window": 0, "taken": 0, "bad": {}})

    @property
    def epoch(self) -> int:
        """How often the whole source was read; rises when the first record of the next round is taken."""
        return self._start["epoch"]

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        while (taken := next(self._records, None)) is None:
            self._next_epoch()
        record, place = taken
        self._read_in_epoch = True
        if place is None:
            self._taken += 1
        else:
            self._start |= place
            self._taken = place["taken"]
        return record

    def once(self) -> Iterator[Record]:
        """The records of one epoch, those of a file in its order, without moving."""
        return (record for record, _ in self._read_epoch())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place of the next record."""
        return self._start | {"taken": self._taken, "order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state.

        Raises:
            ValueError: if the files are others than when the state was taken, see `digest_of_files`; of a hub dataset, if
                its id, subset, split, revision or number of shards is.
        """
        if state["files"] != self._digest:
            what = "files" if self._dataset is None else "dataset, subset, split, revision or shards"
            raise ValueError(
                f"source {self.source.name}: its {what} changed since the state was saved "
                f"({len(self._files)} now, digest {self._digest}, saved {state['files']}); restore them or start again"
            )
        if (order := state.get("order", "blocks, as an earlier version had it")) != self.order:
            raise ValueError(
                f"source {self.source.name}: shuffle_window={self.source.shuffle_window}: allowed is a new run, or what the state "
                f"was saved with, {order}, not {self.order}"
            )
        self._begin(state)
        for _ in range(state["taken"]):
            if next(self._records, None) is None:
                raise ValueError(
                    f"source {self.source.name}: its files hold fewer records than when the state was saved"
                )
        self._taken = state["taken"]

    def _begin(self, state: Mapping[str, Any]) -> None:
        kept = ("epoch", "part", "at", "window", "bad")
        self._start = {name: state[name] for name in kept} | {"files": self._digest}
        self._taken = 0
        self._read_in_epoch = bool(state["window"] or state["taken"])
        self.bad.counts = Counter(state["bad"])
        self._records = self._ordered()

    def _next_epoch(self) -> None:
        name = self.source.name
        if not self._read_in_epoch:
            last = f"; the last problem was: {self.bad.last}" if self.bad.last else ""
            raise ValueError(f"source {name}: no usable record in {len(self._files)} files{last}")
        rounds = self.epoch + 1
        if rounds & (rounds - 1) == 0:  # a small source may go round thousands of times: told at 1, 2, 4, 8, ...
            logger.warning("source %s ended after epoch %d and starts again from its beginning", name, rounds)
        bad = dict(self.bad.counts)
        self._begin({"epoch": self.epoch + 1, "part": 0, "at": None, "window": 0, "taken": 0, "bad": bad})

    def _ordered(self) -> Iterator[tuple[Record, dict | None]]:
        """Records from the start to the end of the epoch; with some, a place that can be started from once they are taken."""
        if self._index is not None:
            return self._by_index(self._index)
        return self._by_window(self._window) if self._window else self._as_they_lie()

    def _as_they_lie(self) -> Iterator[tuple[Record, dict]]:
        for record, place in self._read_epoch():
            yield record, place | {"window": 1, "taken": 0}

    def _by_index(self, index: FileIndex | RowIndex) -> Iterator[tuple[Record, dict | None]]:
        """All records in random order; read a block at a time in disk order, which is faster."""
        order = permutation(len(index), self.seed, self.source.name, self.epoch)
        for first in range(self._start["at"] or 0, len(order), BLOCK):
            block = order[first : first + BLOCK]
            read = {number: list(index.read(number, self.bad)) for number in sorted(block.tolist())}
            records = [record for number in block.tolist() for record in read[number] if self._usable(record)]
            place = {"at": first + BLOCK, "window": 1, "taken": 0, "bad": dict(self.bad.counts)}
            for count, record in enumerate(records, 1):
                yield record, place if count == len(records) else None

    def _by_window(self, size: int) -> Iterator[tuple[Record, dict | None]]:
        """Records in the order of their number plus a random one below `size`, so at most `size` are held.

        Numbers are those of usable records in the epoch. A start is where a block of `size` of them begins that has not
        come out as a whole; `taken` then counts those of it and of the next that have.
        """
        block = self._start["window"]
        waiting: list[tuple[float, int, Record]] = []
        left, places = Counter(), {}
        number = block * size
        draws: list[float] = []

        def out() -> tuple[Record, dict | None]:
            nonlocal block, emitted
            _, of, record = heapq.heappop(waiting)
            left[of // size] -= 1
            emitted += 1
            place = None
            while block + 1 in places and not left[block]:
                block += 1
                emitted -= size
                place = places.pop(block) | {"window": block, "taken": emitted}
            return record, place

        emitted = 0
        for record, place in self._read_epoch():
            if number % size == 0:
                draws = draws_of(size, self.seed, self.source.name, self.epoch, number // size)
            self._warn_of_sorted_stream(record, number)
            heapq.heappush(waiting, (number + size * draws[number % size], number, record))
            left[number // size] += 1
            number += 1
            if number % size == 0:
                places[number // size] = place
            while waiting and waiting[0][0] < number:
                yield out()
        while waiting:
            yield out()

    def _read_epoch(self) -> Iterator[tuple[Record, dict]]:
        """Usable records in the order of the files from the start to the end of the epoch, each with the place after it."""
        order = range(len(self._files))
        if self._window:
            order = shuffled(len(self._files), self.seed, self.source.name, self.epoch)
        part, at = self._start["part"], self._start["at"]
        while part < len(order):
            for record, after in self._read_part(order[part], at):
                if self._usable(record):
                    yield record, {"part": part, "at": after, "bad": dict(self.bad.counts)}
            part, at = part + 1, None

    def _read_part(self, index: int, at: Any) -> Read:
        if self._dataset is not None:
            return read_shard(self._dataset, index, self.source.name, self.source.column, self.bad, at)
        path = self._files[index]
        return reader_of(path, self.source.format)(path, self.source.column, self.bad, at)

    def _usable(self, record: Record) -> bool:
        """Text that is not blank, or a list or mapping that is not empty."""
        value = record.value
        if not isinstance(value, (str, list, dict)):
            self.bad.report(record.origin, "neither text nor list", type(value).__name__)
        elif not (value.strip() if isinstance(value, str) else value):
            self.bad.report(record.origin, "empty document")
        else:
            return True
        return False

    def _make_index(self, column: str | None) -> FileIndex | RowIndex | None:
        """The places of all records; None for sources that can only be read in order, or should be."""
        source = self.source
        if source.dataset is None:
            return file_index(self._files, source.format, column)
        if isinstance(source.dataset, str):
            return None
        import datasets

        has_rows = isinstance(source.dataset, datasets.Dataset)
        return RowIndex(source.dataset, source.name, column) if has_rows else None

    def _warn_of_sorted_files(self) -> None:
        """Look at some records of a source that could be shuffled as a whole, but has a window."""
        index = self._make_index(None)
        if 0 < self._window < len(index):
            quiet = BadData(self.source.name)
            quiet.report = lambda *_: None
            values = [record.value for number in spread(len(index)) for record in index.read(number, quiet)]
            self._warn_if_sorted(values, f"{len(index):,}")

    def _warn_of_sorted_stream(self, record: Record, number: int) -> None:
        """Look at the records of a stream until there are more of them than its window holds."""
        if self.num_records is None and self.epoch == 0 and number <= self._window:
            if number < SAMPLED or number == self._window:
                self._first.append(record.value)
            if number == self._window and self._window >= FEWEST:
                self._warn_if_sorted(self._first, f"more than {self._window:,}")

    def _warn_if_sorted(self, values: Sequence[Any], count: str) -> None:
        if (what := sorted_by(values)) is not None:
            logger.warning(
                "source %s: its %s records are sorted by %s, and shuffle_window is %s: a run that does not read all of them sees only "
                "a part of that order; %s",
                self.source.name, count, what, f"{self._window:,}",
                "without shuffle_window all are shuffled" if self.num_records else "a larger shuffle_window helps",
            )  # fmt: skip

    def _shard_names(self) -> list[str]:
        return [f"shard {index}" for index in range(self._dataset.num_shards)]

    def _digest_of_dataset(self) -> str:
        named = [self.source.dataset] if isinstance(self.source.dataset, str) else []
        return _digest(*named, *map(str, (self.source.subset, self.source.split, self.source.revision)), *self._files)


def open_dataset(source: Source) -> Any:
    """The source's dataset as a `datasets.IterableDataset`."""
    import datasets

    dataset = source.dataset
    if isinstance(dataset, str):
        dataset = datasets.load_dataset(
            dataset, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    elif isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    if not isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"source {source.name}: dataset is a {type(dataset).__name__}: allowed is a hub id, a folder, a Dataset "
            "or an IterableDataset"
        )
    return dataset


def digest_of_files(files: Sequence[str]) -> str:
    """Digest of names, sizes, and the first and last SAMPLED_BYTES of the files (of SAMPLED_FILES of them if there are more).

    gzip ends with a checksum and parquet with its footer. What it misses is a change in the middle of a long text, or in a
    file that is not sampled, that keeps the file's size.
    """
    every = -(-len(files) // SAMPLED_FILES)
    parts = []
    for number, path in enumerate(files):
        size = os.path.getsize(path)
        parts += [path, str(size)]
        if number % every == 0:
            with open(path, "rb") as file:
                sample = file.read(SAMPLED_BYTES)
                file.seek(max(size - SAMPLED_BYTES, len(sample)))
                parts.append(hashlib.sha256(sample + file.read(SAMPLED_BYTES)).hexdigest())
    return _digest(*parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def permutation(count: int, *key: object) -> np.ndarray:
    """(count) int64: as `shuffled`, for very many."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:16], "big")
    return np.argsort(np.random.RandomState(np.random.MT19937(seed)).random_sample(count), kind="stable")


def draws_of(count: int, *key: object) -> list[float]:
    """Random numbers from 0 to 1 that depend on `key` alone, in every process and version of Python."""
    generator = random.Random("/".join(map(str, key)))
    return [generator.random() for _ in range(count)]


def shuffled(count: int, *key: object) -> list[int]:
    """A permutation of range(count) that depends on `key` alone, in every process and version of Python."""
    draws = draws_of(count, *key)
    return sorted(range(count), key=draws.__getitem__)
