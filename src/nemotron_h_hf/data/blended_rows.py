"""Rows for fine-tuning and distillation: files named on the command line or a blend, packed; and how long an epoch is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .bad_data import tell_left_out
from .blend import Blend, encoded_document
from .long_conversations import LongConversations
from .packing import Rows, ShuffledRows, SplitRows, WholeRows
from .phases import Phase, check_windows, phases_from
from .sources import Source, SourceStream, sources_from

Encode = Callable[[Any], Mapping[str, Any]]


def sources_and_phases(
    data: Sequence[str] | None, sources: Mapping | None, phases: Sequence[Mapping] | None, column: str | None = None
) -> tuple[list[Source], list[Phase]]:
    """Files as one source of whole records, or else a blend's two mappings; without phases all sources weigh the same."""
    if data:
        found = [Source("data", path=list(data), column=None)]
    else:
        found = sources_from({name: {"column": column, **item} for name, item in sources.items()})
    return found, phases_from(phases) if phases else [Phase({source.name: 1.0 for source in found})]


def packed_blend(
    sources: Sequence[Source],
    phases: Sequence[Phase],
    encode: Encode,
    total_tokens: int,
    sequence_length: int,
    pad_token_id: int,
    seed: int = 0,
    split_documents: bool = False,
    on_bad_data: str = "skip",
    join: Callable[..., Mapping[str, Any]] | None = None,
    shuffle_rows: int = 0,
) -> Rows:
    """Rows that last for `total_tokens` of row, padding included; phases change where they should by tokens of row.

    Documents of both sides of a change may share the rows of one window of packing.

    Args:
        join: makes token ids and labels of messages and tools; conversations are then joined to long ones with turns that
            refer back, and `encode` must give their `messages`, and `tools` if they have any, in addition to the token ids.
        shuffle_rows: of split documents, rows that are made at once and dealt out in random order.
    """
    longest = None if split_documents else sequence_length
    ahead = shuffle_rows * sequence_length
    documents = Blend(sources, phases, encode, total_tokens, seed, on_bad_data, longest, read_ahead=ahead)
    check_windows(documents.spans, shuffle_rows, sequence_length)
    if join is not None:
        documents = LongConversations(documents, join, sequence_length, seed=seed, on_bad_data=on_bad_data)
    if not split_documents:
        return WholeRows(documents, sequence_length, pad_token_id)
    if shuffle_rows:
        return ShuffledRows(documents, sequence_length, pad_token_id, shuffle_rows=shuffle_rows, seed=seed)
    return SplitRows(documents, sequence_length, pad_token_id)


def one_round(
    source: Source,
    encode: Encode,
    sequence_length: int,
    pad_token_id: int,
    split_documents: bool = False,
    on_bad_data: str = "skip",
) -> Iterator[dict[str, Tensor]]:
    """One row after the other of a source, read once in its own order; then tells how many records were left out.

    Raises:
        ValueError: if no record of it can be used.
    """
    documents = Round(source, encode, on_bad_data, None if split_documents else sequence_length)
    rows = (SplitRows if split_documents else WholeRows)(documents, sequence_length, pad_token_id)
    yield from rows
    if not rows.rows_yielded:
        raise ValueError(f"{source.name}: {source.path or source.dataset} has no usable record; {documents.bad.last}")
    tell_left_out({source.name: documents.bad.counts})


class Round:
    """The encoded records of a source, once; can be read again. Records that cannot be used are reported."""

    def __init__(
        self, source: Source, encode: Encode, on_bad_data: str = "skip", max_document_tokens: int | None = None
    ):
        self.stream, self.encode = SourceStream(source, on_bad_data=on_bad_data), encode
        self.max_document_tokens = max_document_tokens
        self.bad = self.stream.bad

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for record in self.stream.once():
            found = encoded_document(record, self.encode, self.bad, self.max_document_tokens)
            if found is not None:
                yield found[0]
