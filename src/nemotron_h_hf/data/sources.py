"""Sources of documents: local files or a hub dataset, read without end in a seeded order that can be resumed exactly.

    sources:
      web:  {path: data/web/*.jsonl}
      code: {path: src/**/*.py}
      wiki: {dataset: owner/name, split: train, column: text}

Order: files (or shards) are shuffled anew in each epoch, then the records inside a moving window. Both depend on the
seed, the source's name and the epoch alone. A state is the place where the current window begins and the number of
its records that were taken, so it stays small and a resumed source reads at most one window again. A digest of the
files goes with it, so that a source whose files changed is refused.
"""

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .bad_data import BadData
from .phases import check_keys
from .readers import FORMATS, Read, Record, find_files, read_shard, reader_of

logger = logging.getLogger(__name__)

SAMPLED_BYTES = 16384  # of the beginning and of the end of a file
SAMPLED_FILES = 1000  # so that opening a source of very many takes no minutes


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
        revision: commit, tag or branch of the hub dataset; only a commit is sure to hold the same when a run goes on.
        column: where the text or the list of messages is in a record; None (null in YAML) takes the whole record.
        format: one of text, lines, jsonl, parquet, where the suffix does not tell.
        shuffle_window: records shuffled together; 0 keeps files and records in order.
    """

    name: str
    path: str | list[str] | tuple[str, ...] | None = None
    dataset: Any = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = "text"
    format: str | None = None
    shuffle_window: int = 1000

    def __post_init__(self):
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                f"source {self.name}: path is {self.path!r} and dataset {self.dataset!r}; give one of them"
            )
        if self.revision is not None and not (isinstance(self.revision, str) and isinstance(self.dataset, str)):
            raise ValueError(
                f"source {self.name}: revision is {self.revision!r}; text is allowed, and only beside the hub id of a dataset"
            )
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"source {self.name}: format is {self.format!r}; allowed are {', '.join(FORMATS)}")
        if not isinstance(self.shuffle_window, int) or self.shuffle_window < 0:
            raise ValueError(f"source {self.name}: shuffle_window is {self.shuffle_window!r}; 0 or more is allowed")


def sources_from(items: Mapping[str, Mapping]) -> list[Source]:
    """Sources from the mapping of a YAML file; a key that is unknown is an error that names the nearest."""
    if not isinstance(items, Mapping) or not items:
        raise ValueError(f"sources is {items!r}; a mapping from names to path or dataset is allowed")
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
        self._begin({"epoch": 0, "part": 0, "at": None, "window": 0, "taken": 0, "bad": {}})

    @property
    def epoch(self) -> int:
        """How often the whole source was read; rises when the first record of the next round is taken."""
        return self._start["epoch"]

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        while self._taken == len(self._window):
            self._next_window()
        self._taken += 1
        return self._window[self._taken - 1]

    def once(self) -> Iterator[Record]:
        """The records of one epoch, without moving."""
        return (record for record, _ in self._read_epoch())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place of the next record."""
        return self._start | {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state.

        Raises:
            ValueError: if the files are others than when the state was taken, see `digest_of_files`; of a hub dataset, if
                its id, subset, split, revision or number of shards is.
        """
        if state["files"] == _digest(*self._files):
            logger.warning(
                "source %s: the state is of an earlier version and knows names alone; whether contents changed is not checked",
                self.source.name,
            )
        elif state["files"] != self._digest:
            what = "files" if self._dataset is None else "dataset, subset, split, revision or shards"
            raise ValueError(
                f"source {self.source.name}: its {what} changed since the state was saved "
                f"({len(self._files)} now, digest {self._digest}, saved {state['files']}); bring them back or start anew"
            )
        self._begin(state)
        if state["taken"]:
            self._next_window()
            self._taken = state["taken"]
            if self._taken > len(self._window):
                raise ValueError(
                    f"source {self.source.name}: its files hold fewer records than when the state was saved"
                )

    def _begin(self, state: Mapping[str, Any]) -> None:
        self._start = dict(state) | {"files": self._digest, "taken": 0}
        self._window: list[Record] = []
        self._taken = 0
        self._read_in_epoch = bool(state["window"])
        self._reader = self._read_epoch()
        self._at = (state["part"], state["at"])
        self.bad.counts = Counter(state["bad"])

    def _next_window(self) -> None:
        """Fill the window with the next records, or go on to the next epoch if there are none."""
        part, at = self._at
        done = bool(self._window)
        self._start |= {"part": part, "at": at, "window": self._start["window"] + done, "bad": dict(self.bad.counts)}
        self._window, self._taken = [], 0
        size = max(self.source.shuffle_window, 1)
        for record, place in self._reader:
            self._at = place
            self._window.append(record)
            if len(self._window) == size:
                break
        if self._window:
            self._read_in_epoch = True
            if self.source.shuffle_window:
                order = shuffled(len(self._window), self.seed, self.source.name, self.epoch, self._start["window"])
                self._window = [self._window[i] for i in order]
        else:
            self._next_epoch()

    def _next_epoch(self) -> None:
        name = self.source.name
        if not self._read_in_epoch:
            last = f"; the last problem was: {self.bad.last}" if self.bad.last else ""
            raise ValueError(f"source {name}: no usable record in {len(self._files)} files{last}")
        rounds = self.epoch + 1
        if rounds & (rounds - 1) == 0:  # a small source may go round thousands of times: told at 1, 2, 4, 8, ...
            logger.warning("source %s ended after epoch %d and starts again from its beginning", name, rounds)
        bad = dict(self.bad.counts)
        self._begin({"epoch": self.epoch + 1, "part": 0, "at": None, "window": 0, "bad": bad})

    def _read_epoch(self) -> Iterator[tuple[Record, tuple[int, Any]]]:
        """Records from the start of the current window to the end of the epoch, each with the place after it."""
        order = range(len(self._files))
        if self.source.shuffle_window:
            order = shuffled(len(self._files), self.seed, self.source.name, self.epoch)
        part, at = self._start["part"], self._start["at"]
        while part < len(order):
            for record, after in self._read_part(order[part], at):
                if self._usable(record):
                    yield record, (part, after)
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
            f"source {source.name}: dataset is a {type(dataset).__name__}; a hub id, a folder, a Dataset or "
            "an IterableDataset is allowed"
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


def shuffled(count: int, *key: object) -> list[int]:
    """A permutation of range(count) that depends on `key` alone, in every process and version of Python."""
    generator = random.Random("/".join(map(str, key)))
    draws = [generator.random() for _ in range(count)]
    return sorted(range(count), key=draws.__getitem__)
