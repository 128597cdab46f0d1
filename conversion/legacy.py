"""Reads the older format: one torch.save file per (tensor, pipeline, expert) rank, each with its part of every tensor.

    mp_rank_TT            tensor parallel only
    mp_rank_TT_PPP        pipeline parallel; or mp_rank_TT_EEE, expert parallel: the arguments tell which
    mp_rank_TT_PPP_EEE    both

Layers are numbered from 0 in each (pipeline rank, virtual chunk), experts in each expert-parallel rank. Expert weights
are cut over their own tensor-parallel ranks, so the file of (tensor rank t, expert rank e) is that of every global rank
r with t = r % TP and e = r // ETP % EP; its share of the experts' matrices is r % ETP.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import torchzip
from .layouts import expert_range, rank_ranges
from .names import COLUMNS, COPY, PARTS, Place
from .source_checkpoint import Entry, Piece, SourceCheckpoint, lies_in
from .torch_dist import skip_reason
from .unpickle import Extent, StandIn
from .vision import LANGUAGE, place

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(r"((?:language_model\.)?decoder\.layers\.)(\d+)\.")
FILE_NAME = "model_optim_rng.pt"


@dataclass(frozen=True)
class Grid:
    """Numbers of ranks of each kind of parallelism."""

    tp: int
    pp: int
    ep: int
    etp: int

    def expert_rank(self, tp: int, ep: int) -> int:
        """The expert-tensor-parallel rank of the file of (tp, ep)."""
        for rank in range(math.lcm(self.tp, self.etp * self.ep)):
            if rank % self.tp == tp and rank // self.etp % self.ep == ep:
                return rank % self.etp
        raise ValueError(f"no rank has tensor rank {tp} and expert rank {ep} of {self}")


@dataclass
class RankFile:
    """One rank's file: its place, and the tensors of each virtual chunk."""

    path: Path
    tp: int
    pp: int
    ep: int
    segments: list[dict[str, Extent]]


def open_folder(folder: Path) -> SourceCheckpoint:
    """The weights of a legacy checkpoint; of the rank files only the pickles are read yet.

    Raises:
        ValueError: when rank files are missing or do not fit together.
    """
    paths = sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))
    files, ignored, stand_ins, args = [], {}, set(), {}
    for path in paths:
        torch_file = torchzip.read(_rank_file(folder, path))
        stand_ins.update(torch_file.stand_ins)
        segments = _segments(torch_file.value, path, ignored)
        args = args or args_of(torch_file.value)
        files.append((path, segments))
    grid = _grid(folder, args, [path.name for path, _ in files])
    ranks = [RankFile(path, *_rank(path.name, grid), segments) for path, segments in files]
    _check_complete(folder, ranks, grid)
    entries: dict[str, Entry] = {}
    offsets = _layer_offsets(ranks, grid)
    for rank in ranks:
        for chunk, segment in enumerate(rank.segments):
            _add_segment(entries, rank, segment, offsets[chunk][rank.pp], grid)
    _fold_tied(entries, args)
    for name, entry in entries.items():
        covered = sum(math.prod(piece.box) for piece in entry.pieces)
        if covered != math.prod(entry.shape):
            raise ValueError(f"{folder}: {name} has {covered} of {math.prod(entry.shape)} elements; a rank is missing")
    checkpoint = SourceCheckpoint(folder, "torch", entries, args)
    checkpoint.ignored, checkpoint.stand_ins = ignored, sorted(stand_ins)
    checkpoint.notes.append(
        f"tensor, pipeline, expert, expert-tensor parallel: {grid.tp}, {grid.pp}, {grid.ep}, {grid.etp}"
    )
    return checkpoint


def args_of(value: Any) -> dict[str, Any]:
    """The training arguments in a file's object; stand-ins among them are left out."""
    namespace = value.get("args") if isinstance(value, dict) else None
    if isinstance(namespace, dict):
        found = namespace
    else:
        found = vars(namespace) if isinstance(namespace, StandIn) else {}
    return {key: item for key, item in found.items() if not isinstance(item, StandIn) and key not in ("args", "state")}


def _rank_file(folder: Path, path: Path) -> Path:
    file = path / FILE_NAME
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    if not lies_in(file, folder):
        raise ValueError(f"{file} leads outside of the folder")
    return file


def _segments(value: Any, path: Path, ignored: dict[str, str]) -> list[dict[str, Extent]]:
    if not isinstance(value, dict):
        raise ValueError(f"{path / FILE_NAME} holds a {type(value).__name__}, not a dict")
    keys = [key for key in value if isinstance(key, str) and re.fullmatch(r"model\d*", key)]
    if not keys:
        raise ValueError(f"{path / FILE_NAME} has no 'model'; it has {', '.join(map(str, value))}")
    for key in value:
        if key not in keys and key not in ("args", "checkpoint_version", "iteration"):
            ignored[f"{path.name}: {key}"] = "not weights"
    segments = []
    for key in sorted(keys, key=lambda key: int(key.removeprefix("model") or 0)):
        segment = {}
        for name, tensor in value[key].items():
            if reason := skip_reason(name, ""):
                ignored[f"{path.name}: {key} {name}"] = reason
            elif isinstance(tensor, Extent):
                segment[name] = tensor
            else:
                raise ValueError(f"{path / FILE_NAME}: {name} is {tensor!r:.120}, not a tensor that can be read")
        segments.append(segment)
    return segments


def _grid(folder: Path, args: dict[str, Any], names: list[str]) -> Grid:
    if "tensor_model_parallel_size" not in args:
        raise ValueError(f"{folder}: its files have no arguments, so their ranks cannot be told apart")
    tp = args["tensor_model_parallel_size"]
    sizes = (tp, args.get("pipeline_model_parallel_size"), args.get("expert_model_parallel_size"),
             args.get("expert_tensor_parallel_size") or tp)  # fmt: skip
    grid = Grid(*(1 if size is None else size for size in sizes))
    if not all(isinstance(size, int) and 0 < size < 10**6 for size in vars(grid).values()):
        raise ValueError(f"{folder}: its arguments give {grid}: allowed are positive integers")
    expected = 1 + (grid.pp > 1) + (grid.ep > 1)
    for name in names:
        found = sum(part is not None for part in _FOLDER.fullmatch(name).groups())
        if found != expected:
            raise ValueError(f"{folder / name} has {found} numbers; the arguments (pipeline parallel {grid.pp}, expert "
                             f"parallel {grid.ep}) ask for {expected}")  # fmt: skip
    return grid


def _rank(name: str, grid: Grid) -> tuple[int, int, int]:
    tp, first, second = (None if part is None else int(part) for part in _FOLDER.fullmatch(name).groups())
    pp, ep = (first, second or 0) if grid.pp > 1 else (0, first or 0)
    if tp >= grid.tp or pp >= grid.pp or ep >= grid.ep:
        raise ValueError(f"{name} is outside of the parallel sizes that the arguments give: {grid}")
    return tp, pp, ep


def _check_complete(folder: Path, ranks: list[RankFile], grid: Grid) -> None:
    """Every stage needs each tensor rank, and each share of each expert rank, in some file."""
    for pp in range(grid.pp):
        here = [rank for rank in ranks if rank.pp == pp]
        for tp in sorted(set(range(grid.tp)) - {rank.tp for rank in here}):
            raise ValueError(f"{folder}: no file has tensor rank {tp} of pipeline stage {pp} "
                             f"(mp_rank_{tp:02d}{f'_{pp:03d}' if grid.pp > 1 else ''}...)")  # fmt: skip
        shares = {(grid.expert_rank(rank.tp, rank.ep), rank.ep) for rank in here}
        for ep in range(grid.ep):
            for etp in range(grid.etp) if grid.ep > 1 else ():
                if (etp, ep) not in shares:
                    raise ValueError(f"{folder}: no file has share {etp} of expert rank {ep} of pipeline stage {pp}")
    counts = {len(rank.segments) for rank in ranks}
    if len(counts) > 1:
        raise ValueError(f"{folder}: its files have different numbers of virtual chunks: {sorted(counts)}")


def _layer_offsets(ranks: list[RankFile], grid: Grid) -> list[list[int]]:
    """offsets[chunk][stage]: the number of layers before a segment; segments follow each other chunk by chunk."""
    offsets, total = [], 0
    for chunk in range(len(ranks[0].segments) if ranks else 0):
        offsets.append([])
        for pp in range(grid.pp):
            offsets[-1].append(total)
            counts = set()
            for rank in (rank for rank in ranks if rank.pp == pp):
                layers = {int(match[2]) for name in rank.segments[chunk] if (match := _LAYER.match(name))}
                if layers != set(range(len(layers))):
                    raise ValueError(
                        f"{rank.path}: its layers are {sorted(layers)}, expected are 0 to {len(layers) - 1}"
                    )
                counts.add(len(layers))
            if len(counts) != 1:
                raise ValueError(f"the files of pipeline stage {pp} have different numbers of layers: {sorted(counts)}")
            total += counts.pop()
    return offsets


def _add_segment(
    entries: dict[str, Entry], rank: RankFile, segment: dict[str, Extent], offset: int, grid: Grid
) -> None:
    spots = {}
    for local in segment:
        found = _LAYER.match(local)  # a tower has layers too, all on one stage
        name = f"{found[1]}{int(found[2]) + offset}.{local[found.end() :]}" if found else local
        spots[local] = (name, place(name))
    num_experts = _num_local_experts(rank.path, [spot for _, spot in spots.values() if spot is not None])
    for local, extent in segment.items():
        name, spot = spots[local]
        if spot is None:
            piece = Piece(extent, 0, extent.shape or (1,), (0,) * max(1, len(extent.shape)))
            entries.setdefault(name, Entry(extent.dtype, extent.shape, [piece]))
            continue
        if spot.expert is None:
            expert, size, share = None, grid.tp, rank.tp
        else:
            num_local = num_experts[spot.prefix, spot.row.megatron]
            expert = expert_range(num_local * grid.ep, grid.ep, rank.ep)[spot.expert]
            size, share = grid.etp, grid.expert_rank(rank.tp, rank.ep)
        _add(entries, spot, expert, extent, size, share, segment, local)


def _fold_tied(entries: dict[str, Entry], args: dict[str, Any]) -> None:
    """With tied embeddings the last stage's output layer is a copy of the embedding; it has to be equal."""
    for prefix in ("", LANGUAGE) if args.get("untie_embeddings_and_output_weights") is False else ():
        output = entries.pop(f"{prefix}output_layer.weight", None)
        if output is not None:
            entries[f"{prefix}embedding.word_embeddings.weight"].copies += output.pieces + output.copies


def _num_local_experts(path: Path, spots: list[Place]) -> dict[tuple[str, str], int]:
    """(layer, row of the table) -> how many experts this rank has of it; they must be numbered from 0."""
    found: dict[tuple[str, str], set[int]] = {}
    for spot in spots:
        if spot.expert is not None:
            found.setdefault((spot.prefix, spot.row.megatron), set()).add(spot.expert)
    for (prefix, _), numbers in found.items():
        if numbers != set(range(len(numbers))):
            expected = f"0 to {len(numbers) - 1}"
            raise ValueError(f"{path}: the experts of {prefix} are {sorted(numbers)}, expected are {expected}")
    return {family: len(numbers) for family, numbers in found.items()}


def _add(
    entries: dict[str, Entry],
    spot: Place,
    expert: int | None,
    extent: Extent,
    num_ranks: int,
    share: int,
    segment: dict[str, Extent],
    local: str,
) -> None:
    """Put one rank's tensor into its place in the whole one; a second copy of the same place is kept to be compared."""
    name, shape, split = spot.name(expert), extent.shape, spot.row.split
    axis = 1 if split == COLUMNS else 0
    if len(shape) <= axis:
        raise ValueError(f"{extent.path}: {local} has shape {shape}, too few axes")
    count = 1 if split == COPY else num_ranks
    whole = tuple(n * count if i == axis else n for i, n in enumerate(shape))
    entry = entries.setdefault(name, Entry(extent.dtype, whole))
    if (entry.dtype, entry.shape) != (extent.dtype, whole):
        raise ValueError(f"{extent.path}: {local} makes a whole of {extent.dtype} {whole}, another rank one of "
                         f"{entry.dtype} {entry.shape}")  # fmt: skip
    sizes = _part_sizes(spot, local, segment, shape, count) if split != COPY else [shape[0]]
    rank = 0 if split == COPY else share
    known = {(piece.corner, piece.box) for piece in entry.pieces}
    for local_start, start, length in rank_ranges(sizes, count, rank):
        box = tuple(length if i == axis else n for i, n in enumerate(shape))
        corner = tuple(start if i == axis else 0 for i in range(len(shape)))
        piece = Piece(extent, 0 if axis else local_start, box, corner)
        (entry.copies if (corner, box) in known else entry.pieces).append(piece)


def _part_sizes(spot: Place, local: str, segment: dict[str, Extent], shape: tuple, num_ranks: int) -> list[int]:
    """Sizes in the whole tensor of the parts that each rank has a share of, seen from the layer's other tensors."""
    if spot.row.layout != PARTS:
        return [shape[1 if spot.row.split == COLUMNS else 0] * num_ranks]
    start = local[: local.index("mixer.")]
    sizes = {}
    try:
        sizes["dt"] = segment[start + "mixer.A_log"].shape[0]
        sizes["z"] = sizes["x"] = segment[start + "mixer.norm.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{local} cannot be cut into its parts: {error} is missing") from None
    order = spot.row.shape[0]
    rest = shape[0] - sum(sizes[part] for part in order if part in sizes)
    sizes["B"] = sizes["C"] = rest // 2
    if rest < 2 or rest % 2:
        raise ValueError(f"{local} has {shape[0]} rows, which do not hold {order} of a layer with {sizes}")
    return [sizes[part] * num_ranks for part in order]
