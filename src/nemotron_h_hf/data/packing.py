"""Documents into rows of equal length, with positions that restart at every document, by which the model keeps them apart.

    row of 12     a a a a a b b b | c c c c     documents a, b and the beginning of c
    position_ids  0 1 2 3 4 0 1 2 | 0 1 2 3     convolution, scan and attention restart at every 0
    labels        . a a a a . b b | . c c c     not shifted (the model shifts); . is -100: nothing predicts a first token

Three ways, one protocol (`Rows`):

    SplitRows       every row is full and a document continues in the next one (pretraining)
    ShuffledRows    the same rows dealt in random order, a window at a time: in order, a long document fills whole batches
    WholeRows       no document is cut (fine-tuning): best fit decreasing among a window of documents, the rest is padding

    l sequence_length
"""

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .bad_data import BadData
from .documents import Document, Resumable, as_document, resumable
from .sources import shuffled

IGNORED = -100
TOO_LONG = "longer than a row"
STATES_KEPT = 512  # more rows than any data loader reads ahead


class Place(NamedTuple):
    """Where rows stand.

    documents: their state; at the beginning of a window, where there is one.
    done: tokens of the next document (rows of the window, for whole documents) that are used.
    too_long: documents left out before it.
    dealt: rows of a shuffled window that are yielded.
    window: size of the window that is begun, in rows (shuffled) or documents (whole). The last window of a run is short; a
        longer run that goes on from it has to make it as it was.
    """

    documents: dict[str, Any]
    done: int
    too_long: int
    dealt: int
    window: int


class Rows(IterableDataset):
    """Rows `{"input_ids", "labels", "position_ids"}`, each (l) int64, from documents.

    A new iterator goes on where the rows stand. After the last document (the last row is padded) the next iterator begins
    again with the first, unless `documents` is a Blend, which ends once.

    Args:
        documents: a Blend or other Resumable, or something that can be iterated again and again, such as a list or a
            dataset. A document is token ids, a mapping with `input_ids` and perhaps `labels` of the same length, or a
            pair (source name, one of these).
        sequence_length: l.
        pad_token_id: fills rows that stay partly empty.
    """

    kind: ClassVar[str]  # a state goes on in rows of the same kind alone

    def __init__(self, documents: Resumable | Iterable[Any], sequence_length: int, pad_token_id: int = 0):
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length}: allowed is 1 or more")
        self.documents = resumable(documents)
        self.sequence_length, self.pad_token_id = sequence_length, pad_token_id
        self.rows_yielded = 0
        self.bad = BadData("rows")
        self._place = self._here()
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._remember()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise ValueError(
                "num_workers of the data loader is not 0; packed rows allow 0, or their state would be lost"
            )
        self.documents.load_state_dict(self._place.documents)
        for pieces, place in self._rows():
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
        """Go on exactly after the rows that `state` saw; an iterator that is running does not notice.

        Raises:
            ValueError: for a state of rows that were made in another way, or of other documents.
        """
        now = {"kind": self.kind, **self._settings()}
        for field in ("kind", *self._fixed(state)):
            if state[field] != now[field]:
                raise ValueError(f"{field} of the rows is {now[field]}, the state was saved with {state[field]}")
        self.documents.load_state_dict(state["read"])  # the documents of a begun window may not change: check them
        self.documents.load_state_dict(state["documents"])
        self.rows_yielded = state["rows"]
        self._place = Place(*(state[field] for field in Place._fields))
        self.bad.counts = Counter({TOO_LONG: state["too_long"]})
        self._states.clear()
        self._remember()

    def _rows(self) -> Iterator[tuple[list[Document], Place]]:
        """The pieces of each row, and the place after it."""
        raise NotImplementedError

    def _settings(self) -> dict[str, int]:
        """How the rows are made."""
        return {"sequence_length": self.sequence_length, "window_documents": 0, "shuffle_rows": 0, "seed": 0}

    def _fixed(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings that a run from this state on must share."""
        raise NotImplementedError

    def _here(self) -> Place:
        return Place(self.documents.state_dict(), 0, self.bad.counts[TOO_LONG], 0, 0)

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
        read = self.documents.state_dict()
        state = {
            "kind": self.kind,
            "rows": self.rows_yielded,
            **self._place._asdict(),
            "read": read,
            **self._settings(),
        }
        self._states[self.rows_yielded] = state
        while len(self._states) > STATES_KEPT:
            self._states.popitem(last=False)


class SplitRows(Rows):
    """Rows cut from the documents laid end to end. Between rows another length may go on."""

    kind = "split"

    def _rows(self) -> Iterator[tuple[list[Document], Place]]:
        """The place is a document and how many of its tokens are used."""
        pieces, free = [], self.sequence_length
        used, before = self._place.done, self._here()
        while (item := self.documents.take()) is not None:
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

    def _fixed(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sequence_length", "shuffle_rows", "seed") if state["dealt"] else ()


class ShuffledRows(SplitRows):
    """Split rows, `shuffle_rows` made at once and dealt in random order.

    Args:
        shuffle_rows: rows of a window. With as many as the data has, a short run sees pieces of all documents.
        seed: of the order.
    """

    def __init__(
        self,
        documents: Resumable | Iterable[Any],
        sequence_length: int,
        pad_token_id: int = 0,
        *,
        shuffle_rows: int,
        seed: int = 0,
    ):
        if shuffle_rows < 1:
            raise ValueError(f"shuffle_rows={shuffle_rows}: allowed is 1 or more")
        self.shuffle_rows, self.seed = shuffle_rows, seed
        super().__init__(documents, sequence_length, pad_token_id)

    def _rows(self) -> Iterator[tuple[list[Document], Place]]:
        """All but a padded row out of order; the place is before the window, and how many of its rows are dealt."""
        before, dealt = self._place._replace(dealt=0, window=0), self._place.dealt
        rows, size = super()._rows(), self._place.window or self.shuffle_rows
        while window := list(islice(rows, size)):
            full = len(window) - (sum(len(piece.input_ids) for piece in window[-1][0]) < self.sequence_length)
            order = [*shuffled(full, self.seed, self.rows_yielded - dealt), *range(full, len(window))]
            for number in range(dealt, len(window)):
                all_dealt = number + 1 >= full
                place = window[number][1] if all_dealt else before._replace(dealt=number + 1, window=full)
                yield window[order[number]][0], place
            before, dealt, size = window[-1][1], 0, self.shuffle_rows

    def _settings(self) -> dict[str, int]:
        return super()._settings() | {"shuffle_rows": self.shuffle_rows, "seed": self.seed}


class WholeRows(Rows):
    """Rows of whole documents.

    Args:
        window_documents: documents that are placed together; more waste less and take more memory.
        on_long_document: what to do with a document longer than a row: "skip" (with a warning, counted in `bad.counts`)
            or "error".
    """

    kind = "whole"

    def __init__(
        self,
        documents: Resumable | Iterable[Any],
        sequence_length: int,
        pad_token_id: int = 0,
        *,
        window_documents: int = 256,
        on_long_document: str = "skip",
    ):
        if window_documents < 1:
            raise ValueError(f"window_documents={window_documents}: allowed is 1 or more")
        self.window_documents = window_documents
        super().__init__(documents, sequence_length, pad_token_id)
        self.bad = BadData("rows", on_long_document)

    def _rows(self) -> Iterator[tuple[list[Document], Place]]:
        """The place is the beginning of a window and how many of its rows are done."""
        done, size, before = self._place.done, self._place.window or self.window_documents, self._here()
        window: list[Document] = []
        while (item := self.documents.take(self._filled(window, done))) is not None:
            document = as_document(item)
            if len(document.input_ids) > self.sequence_length:
                self.bad.report("a document", TOO_LONG, f"{len(document.input_ids)} tokens, {self.sequence_length} fit")
                continue
            window.append(document)
            if len(window) == size:
                yield from self._rows_of(window, before, done)
                window, done, size, before = [], 0, self.window_documents, self._here()
        if window:
            yield from self._rows_of(window, before, done)

    def _filled(self, window: list[Document], done: int) -> int:
        """Tokens, padding included, of the rows of all documents so far; 0 where the documents do not ask."""
        if not self.documents.asks_filled:
            return 0
        return (self.rows_yielded - done + len(self._fit(window))) * self.sequence_length

    def _rows_of(self, window: list[Document], before: Place, done: int) -> Iterator[tuple[list[Document], Place]]:
        rows = self._fit(window)
        for number in range(done, len(rows)):
            place = self._here() if number + 1 == len(rows) else before._replace(done=number + 1, window=len(window))
            yield [window[index] for index in rows[number]], place

    def _fit(self, window: list[Document]) -> list[list[int]]:
        return best_fit([len(document.input_ids) for document in window], self.sequence_length)

    def _settings(self) -> dict[str, int]:
        return super()._settings() | {"window_documents": self.window_documents}

    def _fixed(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sequence_length", "window_documents")


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
