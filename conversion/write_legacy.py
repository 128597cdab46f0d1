"""Writes the older Megatron format: one torch.save file per (tensor, pipeline, expert) rank, stage by stage.

All files of a pipeline stage are open together, so each tensor is read once, cut for the ranks, and freed. Layers
are numbered from 0 in each stage, experts in each expert rank; expert matrices are cut over the same tensor ranks as
the rest. The last stage has the embedding too with multi-token prediction, and as its output layer if they are tied.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h_hf.checkpoint import Digest, Digester, pieces
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import byte_view
from nemotron_h_hf.resumable import Journal
from nemotron_h_hf.whole_files import whole_file

from . import torchzip
from .layouts import cut_for_rank, expert_range
from .legacy import FILE_NAME
from .names import COLUMNS, COPY
from .plan import Job, Plan, to_megatron
from .read_ahead import ahead
from .torchzip import Later
from .vision import prefix
from .write_megatron import Layout, Read, Written, cut_sizes, extra_states, namespace, stage_sizes

_LAYER = re.compile(r"^((?:language_model\.)?decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(?<=\.weight)\d+$")


class Part(NamedTuple):
    """A whole tensor as one stage has it: the job, its name there, and whether it was written under another before."""

    job: Job
    name: str
    again: bool = False


def write_ranks(
    plan: Plan,
    read: Read,
    folder: Path,
    journal: Journal,
    max_bytes: int,
    layout: Layout,
    progress: Callable[[int], None],
) -> Written:
    """Write the files of all ranks, as large as the ranks make them; stages that `journal` names are kept if whole."""
    stages = stage_sizes(plan.text, layout.pp)
    digests: dict[str, Digest] = {}
    files, kept = [], []
    for stage in range(len(stages)):
        parts = list(_parts(plan, stages, stage, layout))
        paths = {rank: _path(folder, rank, stage, len(stages), layout) for rank in _ranks(layout)}
        names = [f"{folder.name}/{path.relative_to(folder)}" for path in paths.values()]
        record = journal.done.get(f"stage {stage}")
        if record is None or not all(_is_whole(path, record["sizes"]) for path in paths.values()):
            seen = _write_stage(plan, parts, read, paths, stages, stage, layout, progress)
            record = {"digests": seen, "sizes": {path.parent.name: path.stat().st_size for path in paths.values()}}
            journal.add(f"stage {stage}", record)
        else:
            kept += names
            progress(sum(part.job.targets[0].num_bytes for part in parts if not part.again))
        files += names
        digests |= {name: Digest(*values) for name, values in record["digests"].items()}
    return Written(digests, files, kept)


def _ranks(layout: Layout) -> list[tuple[int, int]]:
    return [(tp, ep) for tp in range(layout.tp) for ep in range(layout.ep)]


def _path(folder: Path, rank: tuple[int, int], stage: int, num_stages: int, layout: Layout) -> Path:
    tp, ep = rank
    name = f"mp_rank_{tp:02d}" + (f"_{stage:03d}" if num_stages > 1 else "") + (f"_{ep:03d}" if layout.ep > 1 else "")
    return folder / name / FILE_NAME


def _is_whole(path: Path, sizes: dict[str, int]) -> bool:
    if not path.is_file() or path.stat().st_size != sizes[path.parent.name]:
        return False
    return torchzip.is_whole(path, 0, path.stat().st_size)


def _parts(plan: Plan, stages: list[int], stage: int, layout: Layout) -> Iterator[Part]:
    """The tensors of one stage, under the names they have there."""
    first_layer, last, before = sum(stages[:stage]), len(stages) - 1, prefix(plan.config)
    newer = layout.newest(plan.text) == "0.19"
    for job in plan.jobs:
        name, layer = job.targets[0].name, job.link.layer
        if newer:
            name = re.sub(r"\.conv1d\.(weight|bias)$", r".conv1d_\1", name)
        if layer is not None:
            if first_layer <= layer < first_layer + stages[stage]:
                yield Part(job, _LAYER.sub(rf"\g<1>{layer - first_layer}.", name))
        elif name.startswith("vision_"):
            if stage == 0:
                yield Part(job, name)
        elif name.startswith(f"{before}embedding."):
            if stage == 0 or (stage == last and plan.text.num_nextn_predict_layers):
                yield Part(job, name, again=stage > 0)
            if stage == last > 0 and plan.text.tie_word_embeddings:
                yield Part(job, f"{before}output_layer.weight", again=True)
        elif stage == last:
            yield Part(job, name)


def _write_stage(
    plan: Plan,
    parts: list[Part],
    read: Read,
    paths: dict[tuple[int, int], Path],
    stages: list[int],
    stage: int,
    layout: Layout,
    progress: Callable[[int], None],
) -> dict[str, Digest]:
    args = namespace(plan, layout, stages)
    extras = _extra_names(plan, stages, stage)
    writers: dict[tuple[int, int], torchzip.Writer] = {}
    digests: dict[str, Digest] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        for rank, path in paths.items():
            path.parent.mkdir(exist_ok=True)
            file = stack.enter_context(open(stack.enter_context(whole_file(path, only_writer=True)), "w+b"))
            model = OrderedDict(_promises(parts, rank, plan.text, layout))
            model.update((name, Later(torch.uint8, (0,))) for name in extras)
            value = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
            writers[rank] = torchzip.Writer(file, value)
        same = [list(group) for _, group in groupby(parts, lambda part: part.job.targets[0].name)]
        for group, whole in ahead(same, lambda group: to_megatron(group[0].job, read)):
            for part in group:
                digester = Digester(pool)
                digests[part.job.targets[0].name] = _write_part(plan, part, whole, writers, layout, digester, progress)
            del whole  # before the next but one is read
        for writer in writers.values():
            for _ in extras:
                writer.write([], torch.uint8, (0,))
            writer.close()
    return digests


def _promises(
    parts: list[Part], rank: tuple[int, int], config: NemotronHConfig, layout: Layout
) -> Iterator[tuple[str, Later]]:
    for part in parts:
        name = _local_name(part, rank[1], config, layout)
        if name is not None:
            spec = part.job.targets[0]
            shape = _cut(torch.empty(spec.shape, device="meta"), part, rank[0], layout).shape
            yield name, Later(spec.dtype, tuple(shape))


def _local_name(part: Part, ep: int, config: NemotronHConfig, layout: Layout) -> str | None:
    """The name in the files of one expert rank; None if the expert belongs to another."""
    expert = part.job.link.expert
    if expert is None:
        return part.name
    owned = expert_range(config.n_routed_experts, layout.ep, ep)
    return _EXPERT.sub(str(expert - owned.start), part.name) if expert in owned else None


def _cut(whole: Tensor, part: Part, tp: int, layout: Layout) -> Tensor:
    link = part.job.link
    if link.split == COPY:
        return whole
    return cut_for_rank(whole, 1 if link.split == COLUMNS else 0, cut_sizes(part.job), layout.tp, tp)


def _write_part(
    plan: Plan,
    part: Part,
    whole: Tensor,
    writers: dict[tuple[int, int], torchzip.Writer],
    layout: Layout,
    digester: Digester,
    progress: Callable[[int], None],
) -> Digest:
    dtype = part.job.targets[0].dtype
    for piece in pieces(whole, dtype):
        digester.add(piece)
    holders = {rank: w for rank, w in writers.items() if _local_name(part, rank[1], plan.text, layout) is not None}
    first_ep = min(ep for _, ep in holders)
    for (tp, ep), writer in holders.items():
        local = _cut(whole, part, tp, layout)
        first = not part.again and ep == first_ep and (tp == 0 or part.job.link.split != COPY)  # of equal copies
        writer.write(_bytes(local, dtype, progress if first else _no_progress), dtype, tuple(local.shape))
    return digester.result()


def _bytes(tensor: Tensor, dtype: torch.dtype, progress: Callable[[int], None]) -> Iterator[memoryview]:
    for piece in pieces(tensor, dtype):
        yield byte_view(piece)
        progress(piece.nbytes)  # written: the next one is asked for


def _no_progress(num_bytes: int) -> None:
    """For a copy of what was counted already."""


def _extra_names(plan: Plan, stages: list[int], stage: int) -> list[str]:
    """Extra states of the language model's modules of one stage, under their local names; towers are loaded without."""
    first, found = sum(stages[:stage]), []
    for name, _ in extra_states(plan):
        match = _LAYER.match(name)
        if match and first <= int(match[2]) < first + stages[stage]:
            found.append(_LAYER.sub(rf"\g<1>{int(match[2]) - first}.", name))
        elif not match and stage == len(stages) - 1:
            found.append(name)
    return found
