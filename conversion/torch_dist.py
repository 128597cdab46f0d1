"""Reads distributed checkpoints: `.metadata` says which bytes of which `.distcp` file hold which box of which tensor.

Keys are global, so parallelism is not visible. Only the parts of the Mamba tensors are joined, which have their own keys
(`in_proj.weight.z`), and the experts are taken out of their stack `[E, out, in]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import torchzip, unpickle
from .names import BLOCKS, PARTS
from .source_checkpoint import Chunk, Entry, Piece, SourceCheckpoint, lies_in
from .unpickle import StandIn
from .vision import LANGUAGE, place, stack_of

SKIPPED = (
    (re.compile(r"(.*\.)?_extra_state(/.*)?|.*\._extra_state/.*"), "extra state of Transformer Engine"),
    (re.compile(r"(chained_\d+\.)?(optimizer|optim)\b.*"), "optimizer state"),
    (re.compile(r"(opt_param_scheduler|lr_scheduler|rerun_state_machine|common_state|args)\b.*"), "training state"),
    (re.compile(r"rng_state\b.*|.*\.rng_state\b.*"), "random state"),
    (re.compile(r"(checkpoint_version|iteration|num_floating_point_operations_so_far|content_metadata)\b.*"),
     "training state"),
)  # fmt: skip
_PART = re.compile(r"(.*\.(?:in_proj|conv1d)\.(?:weight|bias))\.(z|x|B|C|dt)")
_STACK = re.compile(r"(.*\.mlp\.experts)\.experts\.(linear_fc[12]\.weight)")
MAX_CHUNKS_CHECKED_IN_PAIRS = 2000


@dataclass(frozen=True)
class Table:
    """`.metadata`, read: tensors as (dtype, shape, boxes), and where the bytes of every item are."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]]
    objects: list[str]
    places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]
    stand_ins: list[str]


def open_folder(folder: Path, format_name: str, args: dict[str, Any], table: Table) -> SourceCheckpoint:
    """The weights of a distributed checkpoint with this `.metadata`; none is read yet.

    Raises:
        ValueError: naming file and key, when chunks are missing, overlap, leave the folder or a file's end.
    """
    prefix = key_prefix(table.tensors)
    entries: dict[str, Entry] = {}
    ignored = {key: skip_reason(key, prefix) or "an object, not a tensor" for key in table.objects}
    ignored |= {key: reason for key in table.tensors if (reason := skip_reason(key, prefix))}
    wanted = {key: value for key, value in table.tensors.items() if key not in ignored}
    chunks = chunks_of(folder, wanted, table)
    _assemble({key.removeprefix(prefix): value for key, value in chunks.items()}, wanted, prefix, entries)
    checkpoint = SourceCheckpoint(folder, format_name, entries, args)
    checkpoint.ignored, checkpoint.stand_ins = ignored, table.stand_ins
    return checkpoint


def chunks_of(folder: Path, keys: Iterable[str], table: Table) -> dict[str, list[tuple]]:
    """(corner, box, Chunk) of each of these tensors, checked against each other and against the files."""
    chunks = {key: _chunks(folder, key, *table.tensors[key], table) for key in keys}
    _check_byte_ranges(chunks)
    return chunks


def read_metadata(folder: Path) -> Table:
    """Read `.metadata` with the allow-list."""
    path = folder / ".metadata"
    with open(path, "rb") as file:
        value, stand_ins = unpickle.load(file, str(path))
    try:
        tensors, objects = {}, []
        for key, entry in value.state_dict_metadata.items():
            if "chunks" not in vars(entry):
                objects.append(str(key))
                continue
            boxes = [(_size(chunk.offsets), _size(chunk.sizes)) for chunk in entry.chunks]
            tensors[str(key)] = (_dtype(entry.properties), _size(entry.size), boxes)
        places = {}
        for index, info in value.storage_data.items():
            if vars(info).get("transform_descriptors"):
                raise ValueError(
                    f"{index.fqn} is stored transformed ({info.transform_descriptors}), which is not supported"
                )
            offset = vars(index).get("offset")
            places[index.fqn, None if offset is None else _size(offset)] = (
                info.relative_path,
                info.offset,
                info.length,
            )
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not the metadata of a distributed checkpoint: {error}") from None
    known = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "pathlib.", "torch.serialization.")
    return Table(tensors, objects, places, [name for name in stand_ins if not name.startswith(known)])


def _size(value: Any) -> tuple[int, ...]:
    if not (isinstance(value, tuple) and all(isinstance(n, int) and n >= 0 for n in value)):
        raise TypeError(f"{value!r:.80} is not a size")
    return value


def _dtype(properties: StandIn) -> torch.dtype:
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r:.80} is not a dtype that is read")
    return dtype


def key_prefix(keys: Iterable[str]) -> str:
    """What stands before Megatron's names: nothing, `module.` (NeMo 2) or `model.` (plain torch)."""
    name = "embedding.word_embeddings.weight"
    found = [key for key in keys if key.endswith(name) and not skip_reason(key, "")]
    prefixes = [key.removesuffix(name).removesuffix(LANGUAGE) for key in found]
    if len(prefixes) != 1:
        raise ValueError(f"{len(prefixes)} tensors are called {name}, one is expected: {prefixes}")
    return prefixes[0]


def skip_reason(key: str, prefix: str) -> str:
    """Why a key is not a weight; empty if it is one."""
    for pattern, reason in SKIPPED:
        if pattern.fullmatch(key) or (prefix and pattern.fullmatch(key.removeprefix(prefix))):
            return reason
    return "" if key.startswith(prefix) else f"outside of {prefix}"


def _chunks(folder: Path, key: str, dtype: torch.dtype, shape: tuple, boxes: list, table: Table) -> list[tuple]:
    """(corner, box, Chunk) of a tensor, checked against each other and against the files."""
    check_tiling(key, shape, boxes)
    found = []
    for corner, box in boxes:
        place_of = table.places.get((key, corner))
        if place_of is None and not any(corner):
            place_of = table.places.get((key, None))
        if place_of is None:
            raise ValueError(f"{folder / '.metadata'} does not say where the part of {key} at {corner} is stored")
        path, offset, length = inside(folder, place_of[0], key), *place_of[1:]
        if not all(isinstance(n, int) and n >= 0 for n in (offset, length)) or offset + length > path.stat().st_size:
            raise ValueError(f"{path} is cut short: {key} needs bytes {offset} to {offset + length}, it has "
                             f"{path.stat().st_size}")  # fmt: skip
        if length < math.prod(box) * dtype.itemsize:
            raise ValueError(f"{path}: {key} at {corner} has {length} bytes, too few for {dtype} {box}")
        found.append((corner, box, Chunk(path, offset, length, dtype, box)))
    return found


def inside(folder: Path, relative: Any, key: str) -> Path:
    """The file that the metadata names, which must be in the folder."""
    if not isinstance(relative, str) or not relative:
        raise ValueError(f"{folder / '.metadata'} names {relative!r:.80} as the file of {key}; a file name is expected")
    path = folder / relative
    if not lies_in(path, folder):
        raise ValueError(f"{folder / '.metadata'} sends {key} to {relative!r}, which is outside of the folder")
    if not path.is_file():
        raise ValueError(f"{path} is missing; {key} is stored there")
    return path


def check_tiling(key: str, shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """The boxes must fill the tensor exactly: inside of it, as many elements, none twice."""
    for corner, box in boxes:
        fits = len(corner) == len(box) == len(shape)
        if not fits or any(start + n > size for start, n, size in zip(corner, box, shape, strict=True)):
            raise ValueError(f"{key}: a chunk of {box} at {corner} reaches beyond its shape {shape}")
    covered = sum(math.prod(box) for _, box in boxes)
    if covered != math.prod(shape):
        raise ValueError(f"{key}: its chunks have {covered} elements, its shape {shape} has {math.prod(shape)}")
    if len({corner for corner, box in boxes if math.prod(box)}) != sum(1 for _, box in boxes if math.prod(box)):
        raise ValueError(f"{key}: two chunks start at the same place")
    edges = [sorted({corner[axis] for corner, _ in boxes} | {size}) for axis, size in enumerate(shape)]
    following = [dict(zip(edge, edge[1:], strict=False)) for edge in edges]
    if all(all(following[a].get(c) == c + n for a, (c, n) in enumerate(zip(*pair, strict=True))) for pair in boxes):
        return  # a grid: different corners cannot overlap
    if len(boxes) > MAX_CHUNKS_CHECKED_IN_PAIRS:
        raise ValueError(
            f"{key}: {len(boxes)} chunks that form no grid; at most {MAX_CHUNKS_CHECKED_IN_PAIRS} are read"
        )
    for (i, first), (j, second) in product(enumerate(boxes), repeat=2):
        if i < j and all(
            a < b + m and b < a + n
            for a, n, b, m in zip(first[0], first[1], second[0], second[1], strict=True)
        ):  # fmt: skip
            raise ValueError(f"{key}: the chunks at {first[0]} and {second[0]} overlap")


def _check_byte_ranges(chunks: dict[str, list[tuple]]) -> None:
    """No two chunks may share bytes of a file."""
    ranges = sorted(
        (str(chunk.path), chunk.offset, chunk.offset + chunk.length, key)
        for key, found in chunks.items()
        for _, _, chunk in found
    )
    for before, after in zip(ranges, ranges[1:], strict=False):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(f"{before[0]}: the bytes of {before[3]} and {after[3]} overlap at {after[1]}")


def _assemble(chunks: dict[str, list[tuple]], wanted: dict, prefix: str, entries: dict[str, Entry]) -> None:
    """Turn chunks under keys into pieces under names."""
    parts: dict[str, set[str]] = {}
    for key, found in chunks.items():
        dtype, shape, _ = wanted[prefix + key]
        if stack := _STACK.fullmatch(key):
            for expert, pieces in unstacked(key, shape, found).items():
                _put(entries, f"{stack[1]}.{stack[2]}{expert}", Entry(dtype, shape[1:], pieces))
        elif tower := stack_of(key):
            for layer, pieces in unstacked(key, shape, found).items():
                name = f"{tower[0]}.{layer}.{tower[1]}"
                spot = place(name)
                _put(entries, spot.name() if spot else name, Entry(dtype, shape[1:], pieces))
        elif part := _PART.fullmatch(key):
            parts.setdefault(part[1], set()).add(part[2])
        else:
            spot = place(key)
            name = spot.name() if spot else key
            pieces = [Piece(chunk, 0, box or (1,), corner or (0,)) for corner, box, chunk in found]
            _put(entries, name, Entry(dtype, shape, pieces))
    for name, present in parts.items():
        _put(entries, name, _join_parts(name, present, chunks, wanted, prefix))


def unstacked(key: str, shape: tuple[int, ...], found: list[tuple]) -> dict[int, list[Piece]]:
    """The pieces of each tensor of a stack; a chunk may hold several, one may be spread over several chunks."""
    if len(shape) < 2:
        raise ValueError(f"{key}: a stack has at least two axes, not {len(shape)}")
    pieces: dict[int, list[Piece]] = {number: [] for number in range(shape[0])}
    for corner, box, chunk in found:
        for i in range(box[0]):
            pieces[corner[0] + i].append(Piece(chunk, i * box[1], box[1:], corner[1:]))
    return pieces


def _join_parts(name: str, present: set[str], chunks: dict, wanted: dict, prefix: str) -> Entry:
    row = next(row for row in BLOCKS["M"] if row.layout == PARTS and name.endswith(row.megatron))
    order = row.shape[0]
    if present != set(order):
        raise ValueError(f"{name} has the parts {sorted(present)}, expected are {order}")
    pieces, start = [], 0
    for part in order:
        key = f"{name}.{part}"
        dtype, shape, _ = wanted[prefix + key]
        pieces += [Piece(chunk, 0, box, (corner[0] + start, *corner[1:])) for corner, box, chunk in chunks[key]]
        start += shape[0]
    return Entry(dtype, (start, *shape[1:]), pieces)


def _put(entries: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in entries:
        raise ValueError(f"{name} is stored twice, under two spellings")
    entries[name] = entry


def read_object(folder: Path, key: str, table: Table) -> torchzip.TorchFile | None:
    """An object that is stored under a key, such as the arguments in `common_state`; None without one."""
    found = table.places.get((key, None))
    if found is None:
        return None
    return torchzip.read(inside(folder, found[0], key), *found[1:])
