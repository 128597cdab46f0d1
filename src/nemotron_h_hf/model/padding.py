"""What the rows of a batch hold: padding, documents, masks. Every form of `attention_mask` becomes `Rows`, once per forward.

Padding may be anywhere (left, right, in the middle of a continued conversation). A recurrent layer must not see it, so
Mamba layers move the real tokens of each row to the front, run, and move the results back.

Packing puts several documents in one row. They are found in `position_ids` that restart, in `seq_idx`, or in
`cu_seq_lens_q`, whichever is given, and become one tensor of document numbers that convolution, scan and attention honour.

    b batch, l length
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .cache import sequence_length


@dataclass
class Padding:
    """How to bring the real tokens of each row to the front, and back."""

    order: Tensor  # (b, l) column that each compacted place is filled from
    inverse: Tensor  # (b, l) compacted place of each column
    lengths: Tensor  # (b) real tokens per row
    real: Tensor  # (b, l) bool: compacted places that hold a real token

    def to(self, device: torch.device, **kwargs: object) -> "Padding":
        """On another device, for layers that device_map placed there."""
        return Padding(*(t.to(device) for t in (self.order, self.inverse, self.lengths, self.real)))

    def compact(self, x: Tensor) -> Tensor:
        """(b, l, ...) -> (b, l, ...) with the real tokens first."""
        return _gather(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `compact`."""
        return _gather(x, self.inverse)


@dataclass
class Rows:
    """The content of rows of l new tokens. If `is_masked`, `attention_mask` is already in the form that attention takes."""

    length: int
    real: Tensor | None  # (b, past + l), 0 for padding; None if not given
    padding: Padding | None
    documents: Tensor | None = None  # (b, l)
    is_masked: bool = False
    attention_mask: Any = (
        None  # in the form of the attention implementation; None sees everything before; a dict has several
    )
    is_custom: bool = False  # the mask says more than `real` does

    def can_split(self) -> bool:
        """Whether the tokens may run a part at a time."""
        return self.documents is None and not self.is_custom

    def part(self, start: int, end: int) -> "Rows":
        """The columns from `start` to `end`, after those before."""
        real = None if self.real is None else self.real[:, : self.real.shape[1] - self.length + end]
        return Rows(end - start, real, find_padding(real, end - start))


def read_rows(
    attention_mask: Any,
    source: Tensor,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Rows:
    """The rows of an input.

    Args:
        attention_mask: (b, past + l), 0 for padding; a mask of attention itself, (b, heads or 1, l, past + l); or both, as
            `create_masks_for_generate` makes them.
        source: (b, l, ...) tokens or embeddings.
        position_ids, seq_idx, cu_seq_lens: see `find_documents`.

    Raises:
        ValueError: for shapes or offsets that do not fit the input.
    """
    (batch_size, length), real = source.shape[:2], real_tokens(attention_mask)
    padding = find_padding(real, length)
    documents = find_documents(batch_size, length, source.device, position_ids, seq_idx, cu_seq_lens, padding)
    if isinstance(attention_mask, dict):
        return Rows(length, real, padding, documents, True, attention_mask)
    is_custom = attention_mask is not None and real is None
    return Rows(length, real, padding, documents, is_custom, attention_mask if is_custom else None, is_custom)


def real_tokens(attention_mask: Any) -> Tensor | None:
    """(b, past + l) of any `attention_mask`, 0 for padding; None if it does not tell."""
    mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    return mask if mask is not None and len(mask.shape) == 2 else None


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """The sliding windows that attention layers have, each once; None is to see everything before."""
    layers = [index for index, kind in enumerate(config.layers_block_type) if kind == "full_attention"]
    return list(dict.fromkeys(config.size("sliding_window", layer) for layer in layers))


def mask_name(window: int | None) -> str:
    """Where the mask of layers with that window is among those of `create_masks_for_generate`."""
    return "full_attention" if window is None else f"window_{window}"


def within_window(
    window: int | None, real: Tensor | None, cache: Cache | None, documents: Tensor | None = None
) -> Callable | None:
    """Which pairs of tokens a causal mask keeps, as transformers' masks take it; None for all.

    A window counts real tokens: padding between them takes no room in it.

    Args:
        real: (b, past + l), 0 for padding.
        documents: (b, l), of packed rows, which have no past.
    """
    places = None
    if window is not None and real is not None:
        room = getattr(cache, "max_cache_len", None) or real.shape[1]
        places = torch.nn.functional.pad(real.long().cumsum(1), (0, max(0, room - real.shape[1])))

    def keeps(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = True
        if window is not None:
            near = query - key < window if places is None else places[row, query] - places[row, key] < window
        return near if documents is None else near & (documents[row, query] == documents[row, key])

    return None if window is None and documents is None else keeps


def check_mask(attention_mask: Any, batch_size: int, length: int, cache: object = None) -> None:
    """Refuse a mask of another form, and one of tokens that is not (b, past + l): attention counts a mask's columns from the
    first token in the cache, Mamba layers from the last of the input, and a shorter mask would mean two things.

    Raises:
        ValueError: with the mask's shape and what is allowed.
    """
    real = real_tokens(attention_mask)
    if real is None:
        if attention_mask is not None and not isinstance(attention_mask, dict) and len(attention_mask.shape) != 4:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: allowed is (batch, columns), 0 for padding, or a "
                "mask of attention itself, (batch, heads or 1, length, columns)"
            )
        return
    if torch.compiler.is_compiling():
        return
    seen = sequence_length(cache) if isinstance(cache, Cache) else 0
    # A static cache counts on its device, and asking any but the CPU would wait for it.
    if not isinstance(seen, int) and seen.device.type == "cpu":
        seen = int(seen)
    rows, columns = real.shape
    alone = isinstance(seen, int) and not isinstance(attention_mask, dict)  # a dict has attention's own mask, too
    needed = seen + length if alone else max(columns, length)
    if rows != batch_size or columns != needed:
        past = f"the {seen} tokens in the cache and " if isinstance(seen, int) and seen else ""
        raise ValueError(
            f"attention_mask has {columns} columns and {rows} rows: allowed is a row for each of the batch's {batch_size}, "
            f"with a column for each of {past}the {length} tokens of the input"
        )


def find_padding(attention_mask: Tensor | None, length: int) -> Padding | None:
    """Padding of the last `length` columns of a 2-D mask (b, past + l), or None if every token is real.

    Raises:
        ValueError: for a mask with fewer columns than there are tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns, the input has {length} tokens")
    real = attention_mask[:, -length:].bool()
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    order = torch.argsort(~real, dim=1, stable=True)
    lengths = real.sum(1)
    places = torch.arange(length, device=real.device)
    return Padding(order, torch.argsort(order, dim=1), lengths, places < lengths[:, None])


def find_documents(
    batch_size: int,
    length: int,
    device: torch.device,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    padding: Padding | None = None,
) -> Tensor | None:
    """Document number of each token (b, l), non-decreasing over the real tokens of a row; None if no row holds two documents.

    Args:
        position_ids: (b, l) or (1, l); a document starts where the next position is not one more.
        seq_idx: (b, l) or (1, l) document numbers; wins over the others.
        cu_seq_lens: (documents + 1) offsets into the row (batch 1) or into all rows laid end to end.

    Raises:
        ValueError: for shapes or offsets that do not fit the batch.
    """
    if seq_idx is not None:
        values, step = _expect_rows("seq_idx", seq_idx, batch_size, length).to(device), 0
    elif cu_seq_lens is not None:
        values, step = _documents_from_offsets(cu_seq_lens, batch_size, length, device), 0
    elif position_ids is not None and position_ids.dim() == 2 and length > 1:
        values, step = _expect_rows("position_ids", position_ids, batch_size, length).to(device), 1
    else:
        return None
    values = values if padding is None else padding.compact(values)
    starts = torch.diff(values, dim=1, prepend=values[:, :1] - step) != step
    if padding is not None:  # what follows the real tokens belongs to the last document
        starts = starts & padding.real
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    documents = starts.cumsum(1)
    return documents if padding is None else padding.restore(documents)


def flash_offsets(documents: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | int]:
    """What variable-length FlashAttention wants: offsets over all rows laid end to end; a run of padding is its own document."""
    b, l = documents.shape
    change = torch.diff(documents, dim=1, prepend=documents[:, :1] - 1) != 0
    if attention_mask is not None:
        real = attention_mask[:, -l:].bool()
        change[:, 1:] |= real[:, 1:] != real[:, :-1]
    starts = change.flatten().nonzero().flatten()
    offsets = torch.cat([starts, starts.new_tensor([b * l])]).int()
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}


def _gather(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(index.shape + (1,) * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)


def _expect_rows(name: str, rows: Tensor, batch_size: int, length: int) -> Tensor:
    if rows.dim() != 2 or rows.shape[0] not in (1, batch_size) or rows.shape[1] != length:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}: allowed is {(batch_size, length)} or {(1, length)}")
    return rows.expand(batch_size, -1)


def _documents_from_offsets(cu_seq_lens: Tensor, batch_size: int, length: int, device: torch.device) -> Tensor:
    total = batch_size * length
    if not torch.compiler.is_compiling():
        fits = cu_seq_lens.dim() == 1 and len(cu_seq_lens) > 1 and int(cu_seq_lens[0]) == 0
        if not fits or int(cu_seq_lens[-1]) != total or bool((cu_seq_lens.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q={cu_seq_lens.tolist()}: allowed are offsets that rise from 0 to {total}, the tokens in the batch"
            )
    places = torch.arange(total, device=device)
    offsets = cu_seq_lens.to(device=device, dtype=torch.long).contiguous()
    return torch.searchsorted(offsets, places, right=True).view(batch_size, length)
