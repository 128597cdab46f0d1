"""Documents into rows of equal length, with positions that restart at every document, by which the model keeps them apart.

    row of 12     a a a a a b b b | c c c c     documents a, b and the beginning of c
    position_ids  0 1 2 3 4 0 1 2 | 0 1 2 3     convolution, scan and attention restart at every 0
    labels        . a a a a . b b | . c c c     not shifted (the model shifts); . is -100: nothing predicts a first token

Splitting (pretraining) fills every row and lets a document continue in the next. Whole documents (fine-tuning) are placed
by best fit decreasing among the documents of a window, and what stays free is padding, its own document at the end.

A long document fills consecutive rows, and a small batch may hold nothing else. `shuffle_rows` deals rows out in random
order, a window of rows at a time.

    l sequence_length
"""

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .bad_data import BadData
from .documents import Document, Resumable, as_document, resumable
from .sources import shuffled

IGNORED = -100
TOO_LONG = "longer than a row"
STATES_KEPT = 512  # more rows than any data loader reads ahead


class PackedRows(IterableDataset):
    """Rows `{"input_ids", "labels", "position_ids"}`, each (l) int64, from documents.

    A new iterator continues at the current row. After the last document (the last row is padded) the next iterator begins
    again with the first, unless `documents` is a Blend, which ends once.

    Args:
        documents: a Blend or other Resumable, or something that can be iterated again and again, such as a list or a
            dataset. A document is token ids, a mapping with `input_ids` and perhaps `labels` of the same length, or a
            pair (source name, one of these).
        sequence_length: l.
        split_documents: whether a document may continue in the next row.
        pad_token_id: fills rows that stay partly empty.
        window_documents: whole documents that are placed together; more waste less and take more memory.
        on_long_document: what to do with a document that may not be split and is longer than a row: "skip" (with a
            warning, counted in `bad.counts`) or "error".
        on_packed: for documents that are not split, called with each one: how many tokens, padding included, have the rows
            that it and all before it fill; see Blend.packed.
        shuffle_rows: of split documents, rows that are made at once and dealt out in random order; 0 keeps the order.
        seed: of that order.
    """

    def __init__(
        self,
        documents: Resumable | Iterable[Any],
        sequence_length: int,
        split_documents: bool = True,
        pad_token_id: int = 0,
        window_documents: int = 256,
        on_long_document: str = "skip",
        on_packed: Callable[[int], None] | None = None,
        shuffle_rows: int = 0,
        seed: int = 0,
    ):
        for field, value in (("sequence_length", sequence_length), ("window_documents", window_documents)):
            if value < 1:
                raise ValueError(f"{field} is {value}; 1 or more is allowed")
        if shuffle_rows < 0 or (shuffle_rows and not split_documents):
            allowed = "0 or more is allowed" if split_documents else "whole documents allow 0"
            raise ValueError(f"shuffle_rows is {shuffle_rows}; {allowed}")
        self.documents = resumable(documents)
        self.sequence_length = sequence_length
        self.split_documents = split_documents
        self.pad_token_id = pad_token_id
        self.window_documents = window_documents
        self.on_packed = on_packed
        self.shuffle_rows, self.seed = shuffle_rows, seed
        self.rows_yielded = 0
        self.bad = BadData("rows", on_long_document)
        self._place = self._here()
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._remember()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise ValueError("num_workers of the data loader is not 0; PackedRows allows 0, or its state would be lost")
        self.documents.load_state_dict(self._place.documents)
        rows = self._split_rows() if self.split_documents else self._whole_rows()
        for pieces, place in self._dealt(rows) if self.shuffle_rows else rows:
            self._place = place
            self.rows_yielded += 1
            self._remember()
            yield self._row(pieces)
        if not self.rows_yielded and self.bad.counts.total():
            raise ValueError(f"sequence_length is {self.sequence_length}, and no document fits; {self.bad.last}")
        self._place = self._here()
        self._remember()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state after the last row yielded."""
        return self.state_after(self.rows_yielded)

    def state_after(self, num_rows: int) -> dict[str, Any]:
        """JSON-able state after the first `num_rows` rows of the whole run, for rows that a loader has read ahead.

        Raises:
            ValueError: for rows not yet yielded, or so long ago that their state is forgotten.
        """
        if num_rows not in self._states:
            first, last = min(self._states), max(self._states)
            raise ValueError(f"num_rows is {num_rows}; states are kept for {first} to {last} rows")
        return self._states[num_rows]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly after the rows that `state` saw; running iterators are not affected.

        Raises:
            ValueError: for a state of rows that were made in another way, or of other documents.
        """
        state = {"dealt": 0, "shuffle_rows": 0, "seed": 0, "window": 0, **state}  # of rows that were never shuffled
        fields = ("split_documents",)  # splitting can continue at any length
        if not self.split_documents:
            fields += ("sequence_length", "window_documents")
        elif state["dealt"]:
            fields += ("sequence_length", "shuffle_rows", "seed")
        for field in fields:
            if state[field] != getattr(self, field):
                raise ValueError(f"{field} is {getattr(self, field)}, the state was saved with {state[field]}")
        if "read" in state:  # the documents of a begun window may not change either: let them be checked
            self.documents.load_state_dict(state["read"])
        self.documents.load_state_dict(state["documents"])
        self.rows_yielded = state["rows"]
        self._place = _Place(*(state[field] for field in _Place._fields))
        self.bad.counts = Counter({TOO_LONG: state["too_long"]})
        self._states.clear()
        self._remember()

    def _split_rows(self) -> Iterator[tuple[list[Document], "_Place"]]:
        """Rows cut from the documents laid end to end; the place is a document and how many of its tokens are used."""
        pieces, free = [], self.sequence_length
        used, before = self._place.done, self._here()
        for item in self.documents:
            document = as_document(item)
            length = len(document.input_ids)
            while used < length:
                piece = Document(*(part[used : used + free] for part in document))
                pieces.append(piece)
                used, free = used + len(piece.input_ids), free - len(piece.input_ids)
                if free == 0:
                    yield pieces, before._replace(done=used) if used < length else self._here()
                    pieces, free = [], self.sequence_length
            used, before = 0, self._here()
        if pieces:
            yield pieces, self._here()

    def _dealt(self, rows: Iterator[tuple[list[Document], "_Place"]]) -> Iterator[tuple[list[Document], "_Place"]]:
        """`shuffle_rows` rows at a time, out of order but for a padded one; the place is before them, and how many are dealt."""
        place = self._place
        before, dealt, size = place._replace(dealt=0, window=0), place.dealt, place.window or self.shuffle_rows
        while window := list(islice(rows, size)):
            full = len(window) - (sum(len(piece.input_ids) for piece in window[-1][0]) < self.sequence_length)
            order = [*shuffled(full, self.seed, self.rows_yielded - dealt), *range(full, len(window))]
            for number in range(dealt, len(window)):
                all_dealt = number + 1 >= full
                place = window[number][1] if all_dealt else before._replace(dealt=number + 1, window=full)
                yield window[order[number]][0], place
            before, dealt, size = window[-1][1], 0, self.shuffle_rows

    def _whole_rows(self) -> Iterator[tuple[list[Document], "_Place"]]:
        """Rows of whole documents; the place is the beginning of a window and how many of its rows are done."""
        done, size, before = self._place.done, self._place.window or self.window_documents, self._here()
        window: list[Document] = []
        for item in self.documents:
            document = as_document(item)
            if len(document.input_ids) > self.sequence_length:
                self.bad.report("a document", TOO_LONG, f"{len(document.input_ids)} tokens, {self.sequence_length} fit")
                continue
            window.append(document)
            if self.on_packed is not None:
                rows = self._fit(window)
                self.on_packed((self.rows_yielded - done + len(rows)) * self.sequence_length)
            if len(window) == size:
                yield from self._rows_of(window, before, done)
                window, done, size, before = [], 0, self.window_documents, self._here()
        if window:
            yield from self._rows_of(window, before, done)

    def _rows_of(
        self, window: list[Document], before: "_Place", done: int
    ) -> Iterator[tuple[list[Document], "_Place"]]:
        rows = self._fit(window)
        for number in range(done, len(rows)):
            place = self._here() if number + 1 == len(rows) else before._replace(done=number + 1, window=len(window))
            yield [window[index] for index in rows[number]], place

    def _fit(self, window: list[Document]) -> list[list[int]]:
        return best_fit([len(document.input_ids) for document in window], self.sequence_length)

    def _here(self) -> "_Place":
        return _Place(self.documents.state_dict(), 0, self.bad.counts[TOO_LONG], 0, 0)

    def _row(self, pieces: list[Document]) -> dict[str, Tensor]:
        """One row (l) of pieces, padded at its end."""
        lengths = [len(piece.input_ids) for piece in pieces]
        missing = self.sequence_length - sum(lengths)
        labels = [piece.labels.clone() for piece in pieces]
        for label in labels:
            label[0] = IGNORED
        ids = [piece.input_ids for piece in pieces] + [torch.full((missing,), self.pad_token_id)]
        labels.append(torch.full((missing,), IGNORED))
        positions = [torch.arange(length) for length in (*lengths, missing)]
        return {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}

    def _remember(self) -> None:
        self._states[self.rows_yielded] = {
            "rows": self.rows_yielded,
            **self._place._asdict(),
            "read": self.documents.state_dict(),
            "sequence_length": self.sequence_length,
            "split_documents": self.split_documents,
            "window_documents": self.window_documents,
            "shuffle_rows": self.shuffle_rows,
            "seed": self.seed,
        }
        while len(self._states) > STATES_KEPT:
            self._states.popitem(last=False)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of documents by row: longest first, each into the row with the least room that is enough.

    Rows and the documents in a row are in order of their first document, which keeps the order of the documents nearly
    what it was. Uses at most 11/9 of the fewest rows possible, and one (Johnson 1973).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), least room first
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[index], 0))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (room - lengths[index], row))
    return sorted(sorted(row) for row in rows)


class _Place(NamedTuple):
    """Where rows stand.

    documents: their state; at the beginning of a window, where there is one.
    done: tokens of the next document (rows of the window, where documents are whole) that are used.
    too_long: documents left out before it.
    dealt: rows of a shuffled window that are yielded.
    window: rows of a shuffled window, or documents of one of whole documents, that is begun. The last window of a run is
        short; a longer run that continues from it must make the same one.
    """

    documents: dict[str, Any]
    done: int
    too_long: int
    dealt: int
    window: int
