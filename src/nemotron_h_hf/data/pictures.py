"""Records with pictures for fine-tuning a vision-language model: each a row alone, padded in its batch.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["cat.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "..."}]}, ...]}
    {"prompt": "<image>What is this?", "completion": "A cat.", "image": {"bytes": ..., "path": ...}}

A picture is a path (from the folder of the data file on), bytes, base64, or a hub `Image` feature. Records without pictures are
text. Layouts and losses are those of fine_tuning_records.py; nothing on a picture, its tags included, counts for the loss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bad_data import BadData
from .chat import IGNORED
from .fine_tuning_records import encode_record
from .sources import Source, SourceStream

COLUMNS = ("images", "image")
TOO_LONG = "longer than a row"
STATES_KEPT = 512  # more rows than any data loader reads ahead


class PictureRows:
    """Rows without end: `input_ids`, `labels` (l) of one record each, and the pixels of its pictures.

    The order depends on the seed alone, and a state says where to go on (see `RowsWithState` of training/trainer.py).

    Args:
        source: what to read; whole records.
        processor: of the model.
        sequence_length: longer records are left out.
    """

    def __init__(self, source: Source, processor: Any, sequence_length: int, seed: int = 0, on_bad_data: str = "skip"):
        self.stream = SourceStream(source, seed, on_bad_data)
        self.processor, self.sequence_length = processor, sequence_length
        self.rows_yielded = 0
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._remember()

    @property
    def bad(self) -> BadData:
        """What was left out."""
        return self.stream.bad

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch = self.stream.epoch
        while True:
            record = next(self.stream)
            if self.stream.epoch > epoch + 1 and not self.rows_yielded:
                raise ValueError(f"source {self.stream.source.name} has no usable record; {self.bad.last}")
            row = usable_row(record, self.processor, self.sequence_length, self.bad)
            if row is not None:
                self.rows_yielded += 1
                self._remember()
                yield row

    def once(self) -> Iterator[dict[str, Tensor]]:
        """The rows of one epoch, without moving."""
        for record in self.stream.once():
            row = usable_row(record, self.processor, self.sequence_length, self.bad)
            if row is not None:
                yield row

    def state_after(self, num_rows: int) -> dict[str, Any]:
        """JSON-able state after so many rows of the run."""
        return self._states[num_rows]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows that `state` saw."""
        self.stream.load_state_dict(state["stream"])
        self.rows_yielded = state["rows"]
        self._states.clear()
        self._remember()

    def _remember(self) -> None:
        self._states[self.rows_yielded] = {"rows": self.rows_yielded, "stream": self.stream.state_dict()}
        while len(self._states) > STATES_KEPT:
            self._states.popitem(last=False)


def usable_row(record: Any, processor: Any, sequence_length: int, bad: BadData) -> dict[str, Tensor] | None:
    """The row of a record, or None for one that cannot be used, which is reported."""
    try:
        row = encode_pictures(record.value, processor, Path(record.origin.rpartition(":")[0]).parent)
    except ValueError as error:
        bad.report(record.origin, "unusable record", str(error))
        return None
    if len(row["input_ids"]) > sequence_length:
        bad.report(record.origin, TOO_LONG, f"{len(row['input_ids'])} tokens, {sequence_length} fit")
        return None
    return row


def encode_pictures(record: Mapping[str, Any], processor: Any, folder: Path = Path()) -> dict[str, Tensor]:
    """`input_ids`, `labels` (l), and if the record has pictures `pixel_values` (and `image_grid_hw`), as the model takes them.

    Raises:
        ValueError: for a record of no known layout, a picture that cannot be read, or another number of pictures than
            its text has `<image>`.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is a {type(record).__name__}: allowed is a mapping")
    record, images = _flat(record)
    marks = _count(record, processor.image_token)
    if marks != len(images):
        raise ValueError(f"the text has {marks} {processor.image_token}, {len(images)} pictures are given")
    pixels: Mapping[str, Tensor] = {}
    if images:
        pixels = processor.image_processor(
            processor.image_processor.fetch_images([_place(image, folder) for image in images])
        )
        blocks = iter([processor.replace_image_token(pixels, index) for index in range(len(images))])
        record = _replaced(record, processor.image_token, blocks)
    encoded = encode_record(record, processor.tokenizer)
    ids, labels = (torch.tensor(encoded[name]) for name in ("input_ids", "labels"))
    tags = len(processor.tokenizer.tokenize(processor.tags(1)[0])) if processor.use_tile_tags else 1
    given = {name: pixels[name] for name in ("pixel_values", "image_grid_hw") if name in pixels}
    return {"input_ids": ids, "labels": mask_pictures(ids, labels, processor.image_token_id, tags), **given}


def mask_pictures(input_ids: Tensor, labels: Tensor, image_token_id: int, before: int) -> Tensor:
    """Labels (l) with -100 on pictures and on the `before` tokens in front of each tile: its tag, or the last of the text."""
    images = (input_ids == image_token_id).long()
    ahead = torch.nn.functional.pad(images, (0, before))
    near = ahead.unfold(0, before + 1, 1).amax(-1)
    return labels.masked_fill(near.bool(), IGNORED)


class PictureCollator:
    """Rows of different lengths to a batch: padded on the right, the pictures' pixels end to end."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in fills.items()
        }
        for name in ("pixel_values", "image_grid_hw"):
            if found := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(found)
        return batch


def _flat(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The record with strings for contents, and its pictures in the order of the text."""
    columns = [record[name] for name in COLUMNS if record.get(name) is not None]
    given = [image for column in columns for image in (column if isinstance(column, (list, tuple)) else [column])]
    rest = {name: value for name, value in record.items() if name not in COLUMNS}
    inside: list[Any] = []

    def flat(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        words = []
        for part in content:
            if part.get("type") == "image":
                words.append("<image>")
                inside.extend(
                    part[name] for name in ("image", "path", "url", "bytes", "base64") if part.get(name) is not None
                )
            elif part.get("type") == "text":
                words.append(part["text"])
            else:
                raise ValueError(f"a part of a message has type {part.get('type')!r}: allowed are image and text")
        return "".join(words)

    for name in ("messages", "prompt", "completion"):
        if isinstance(rest.get(name), list):
            rest[name] = [{**message, "content": flat(message.get("content"))} for message in rest[name]]
    return rest, inside or given


def _replaced(record: Mapping[str, Any], mark: str, blocks: Iterator[str]) -> dict[str, Any]:
    """Each mark of the record's texts replaced by the next block."""

    def fill(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        first, *others = text.split(mark)
        return first + "".join(next(blocks) + other for other in others)

    def fill_all(value: Any) -> Any:
        if isinstance(value, list):
            return [{**message, "content": fill(message.get("content"))} for message in value]
        return fill(value)

    texts = ("messages", "prompt", "completion", "text")
    return {name: fill_all(value) if name in texts else value for name, value in record.items()}


def _count(record: Mapping[str, Any], mark: str) -> int:
    texts = [value for name in ("messages", "prompt", "completion", "text") if (value := record.get(name)) is not None]
    parts = [part.get("content") for value in texts if isinstance(value, list) for part in value]
    return sum(text.count(mark) for text in [*texts, *parts] if isinstance(text, str))


def _place(image: Any, folder: Path) -> Any:
    """A path that is relative to the data file."""
    path = image.get("path") if isinstance(image, Mapping) and not image.get("bytes") else image
    return folder / path if isinstance(path, str) and (folder / path).is_file() else image
