"""The documents that packing takes: their forms, and iterators that know their position."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Resumable(Protocol):
    """Documents that know their position, such as a Blend.

    `take` gives the next one, None at the end. `filled` is how many tokens, padding included, the rows of all documents
    before it have; it counts where `asks_filled`.
    """

    asks_filled: bool

    def take(self, filled: int = 0) -> Any | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Document(NamedTuple):
    """Token ids and labels of a document, both (tokens) int64."""

    input_ids: Tensor
    labels: Tensor


def resumable(documents: Resumable | Iterable[Any]) -> Resumable:
    """The documents themselves if they know where they stand; otherwise counted, which needs a list or a dataset."""
    return documents if isinstance(documents, Resumable) else Counted(documents)


def document_encoder(tokenizer: Any) -> Callable[[str | list[int]], list[int]]:
    """Text -> beginning of document (eos where the tokenizer has no bos), its tokens, eos; token ids stay as they are.

    The encoder raises ValueError for anything else, and for ids that the tokenizer does not have.
    """
    end, size = tokenizer.eos_token_id, len(tokenizer)
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(document: str | list[int]) -> list[int]:
        if isinstance(document, list) and set(map(type, document)) == {int}:
            if min(document) < 0 or max(document) >= size:
                raise ValueError(
                    f"the document has token ids from {min(document)} to {max(document)}: allowed are 0 to {size - 1}"
                )
            return document
        if not isinstance(document, str):
            kind = type(document).__name__
            raise ValueError(
                f"the document is a {kind}: allowed are text and lists of token ids, name their column in the source"
            )
        return [begin, *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], end]

    return encode


def as_document(item: Any) -> Document:
    """A document from token ids, a mapping with `input_ids` and perhaps `labels`, or a pair (source name, one of these).

    Raises:
        ValueError: for labels of another length, or no tokens.
    """
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        item = item[1]
    named = isinstance(item, Mapping)
    input_ids = torch.as_tensor(item["input_ids"] if named else item, dtype=torch.int64)
    labels = torch.as_tensor(item["labels"], dtype=torch.int64) if named and "labels" in item else input_ids
    if input_ids.dim() != 1 or input_ids.shape != labels.shape or not len(input_ids):
        raise ValueError(
            f"a document has input_ids of shape {tuple(input_ids.shape)} and labels of {tuple(labels.shape)}: allowed is "
            "one dimension, the same for both, and at least one token"
        )
    return Document(input_ids, labels)


class Counted:
    """Documents that can be iterated again, with a state: how many were taken in which round."""

    asks_filled = False

    def __init__(self, documents: Iterable[Any]):
        if iter(documents) is documents:
            raise ValueError(
                f"documents is a {type(documents).__name__}, which can be read once: allowed is a list, a dataset or a Blend"
            )
        self.documents = documents
        self.taken = 0
        self.rounds = 0
        self._round: Iterator[Any] | None = None

    def take(self, filled: int = 0) -> Any | None:
        """The next document of the round; None ends it, and the next call begins another."""
        self._round = self._round or self._rest()
        if (item := next(self._round, None)) is None:
            self._round = None
        return item

    def _rest(self) -> Iterator[Any]:
        skipped = self.taken
        for index, item in enumerate(self.documents):
            if index >= skipped:
                self.taken = index + 1
                yield item
        at_end = skipped and skipped == self.taken  # it was the state after the last document: this is the next round
        self.taken = 0
        self.rounds += 1
        if at_end:
            yield from self._rest()

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.taken, self.rounds, self._round = state["taken"], state["rounds"], None
