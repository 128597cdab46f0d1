"""Writes a planned conversion as a distributed Megatron checkpoint, which Megatron loads under any parallelism.

A `.distcp` file is torch.save zips one after another, one per chunk; `.metadata`, written last, says where each is.
Besides the weights Megatron requires an (empty) extra state per Transformer Engine module.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip

from nemotron_h_hf.checkpoint import Digest, Digester, pieces, plan_shards
from nemotron_h_hf.model.weights import byte_view
from nemotron_h_hf.resumable import Journal
from nemotron_h_hf.whole_files import whole_file, write_text

from . import torchzip, vision
from .layouts import split_parts
from .names import PARTS
from .plan import Job, Plan, to_megatron
from .read_ahead import ahead
from .torchzip import Later
from .write_megatron import FOLDER, Layout, Read, Written, extra_states, namespace


def write_distributed(
    plan: Plan,
    read: Read,
    folder: Path,
    journal: Journal,
    max_bytes: int,
    layout: Layout,
    progress: Callable[[int], None],
) -> Written:
    """Write all files, each about `max_bytes` large; those that `journal` names and that are whole are kept."""
    groups = plan_shards((job.targets for job in plan.jobs), max_bytes)
    job_of = {job.targets[0].name: job for job in plan.jobs}
    records, kept, files = [], [], []
    for number, specs in enumerate(groups.values()):
        file = f"__0_{number}.distcp"
        files.append(file)
        record = journal.done.get(file)
        if record is None or not _is_whole(folder / file, record):
            record = _write_distcp(plan, [job_of[spec.name] for spec in specs], read, folder / file, progress)
            journal.add(file, record)
        else:
            kept.append(file)
            progress(sum(spec.num_bytes for spec in specs))
        records.append((file, record))
    files.append(f"__0_{len(files)}.distcp")
    objects = _write_objects(plan, folder / files[-1])
    _write_metadata(plan, folder, records, files[-1], objects)
    stages = [plan.text.num_hidden_layers]
    _save(folder / "common.pt", {"args": namespace(plan, layout, stages), "checkpoint_version": 3.0, "iteration": 0})
    write_text(folder / "metadata.json", '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
               '"common_backend": "torch", "common_backend_version": 1}')  # fmt: skip
    digests = {name: Digest(*values) for _, record in records for name, values in record["digests"].items()}
    return Written(digests, [f"{FOLDER}/{file}" for file in files], [f"{FOLDER}/{file}" for file in kept])


def _write_distcp(
    plan: Plan, jobs: list[Job], read: Read, path: Path, progress: Callable[[int], None]
) -> dict[str, Any]:
    """One `.distcp` file; the record says where each chunk is."""
    record: dict[str, Any] = {"chunks": [], "digests": {}}
    with whole_file(path, only_writer=True) as part, ThreadPoolExecutor(1) as pool, open(part, "w+b") as file:
        for job, whole in ahead(jobs, lambda job: to_megatron(job, read)):
            spec = job.targets[0]
            digester = Digester(pool)
            record["chunks"] += _write_chunks(file, chunks_of(job, whole), spec.dtype, digester, progress)
            record["digests"][spec.name] = digester.result()
            del whole  # before the next but one is read
        record["size"] = file.tell()
    return record


def _write_chunks(
    file: IO[bytes], chunks: list, dtype: torch.dtype, digester: Digester, progress: Callable[[int], None]
) -> list[list]:
    """Append the chunks to a file; key, corner, box, offset and length of each."""
    found = []
    for key, corner, tensor in chunks:
        found.append([key, corner, list(tensor.shape), *write_zip(file, tensor, dtype, digester, progress)])
    return found


def chunks_of(job: Job, whole: Tensor) -> list[tuple[str, list[int], Tensor]]:
    """(key, corner, tensor) of the chunks that a whole tensor is stored as."""
    name, link = job.targets[0].name, job.link
    if link.expert is not None:
        stack, _, matrix = name.partition(".mlp.experts.")
        key = f"{stack}.mlp.experts.experts.{matrix.removesuffix(str(link.expert))}"
        return [(key, [link.expert] + [0] * whole.dim(), whole.unsqueeze(0))]
    corner = [0] * whole.dim()
    if link.stack is not None:
        layer, _ = link.stack
        return [(name.replace(f".layers.{layer}.", ".layers.", 1), [layer, *corner], whole.unsqueeze(0))]
    if link.layout != PARTS:
        return [(name, corner, whole)]
    parts = split_parts(whole, [size for _, size in link.parts])
    return [(f"{name}.{part}", corner, tensor) for (part, _), tensor in zip(link.parts, parts, strict=True)]


def write_zip(
    file: IO[bytes], tensor: Tensor, dtype: torch.dtype, digester: Digester, progress: Callable[[int], None]
) -> tuple[int, int]:
    """Append a tensor as a torch.save zip; (offset, length)."""
    writer = torchzip.Writer(file, Later(dtype, tuple(tensor.shape)))
    writer.write(_bytes(tensor, dtype, digester, progress), dtype, tuple(tensor.shape))
    return writer.start, writer.close()


def _bytes(
    tensor: Tensor, dtype: torch.dtype, digester: Digester, progress: Callable[[int], None]
) -> Iterator[memoryview]:
    for piece in pieces(tensor, dtype):
        digester.add(piece)
        yield byte_view(piece)
        progress(piece.nbytes)  # written: the next one is asked for


def _is_whole(path: Path, record: dict[str, Any]) -> bool:
    """Whether a finished file still is what was written, by its size and the checksums in its zips."""
    if not path.is_file() or path.stat().st_size != record["size"]:
        return False
    return all(torchzip.is_whole(path, offset, length) for *_, offset, length in record["chunks"])


def _write_objects(plan: Plan, path: Path) -> list[tuple[str, int, int]]:
    """All extra states, empty, in one file; (key, offset, length) of each."""
    buffer = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
    payload, objects = buffer.getvalue(), []
    with whole_file(path, only_writer=True) as part, open(part, "wb") as file:
        for name, count in (*extra_states(plan), *vision.extra_states(plan.config)):
            name = name.replace(".mlp.experts.", ".mlp.experts.experts.")
            for number in range(count):
                objects.append((f"{name}/shard_{number}_{count}", file.tell(), len(payload)))
                file.write(payload)
    return objects


def _write_metadata(plan: Plan, folder: Path, records: list, object_file: str, objects: list) -> None:
    dtypes = {job.targets[0].name: job.targets[0].dtype for job in plan.jobs}
    dtype_of = {}
    for job in plan.jobs:
        for key, _, _ in chunks_of(job, torch.empty(job.targets[0].shape, device="meta")):
            dtype_of[key] = dtypes[job.targets[0].name]
    boxes: dict[str, list[ChunkStorageMetadata]] = {}
    storage = {}
    for file, record in records:
        for key, corner, box, offset, length in record["chunks"]:
            found = boxes.setdefault(key, [])
            storage[MetadataIndex(key, torch.Size(corner), len(found))] = _StorageInfo(file, offset, length)
            found.append(ChunkStorageMetadata(torch.Size(corner), torch.Size(box)))
    entries: dict[str, Any] = {}
    for key, found in boxes.items():
        size = [max(c.offsets[axis] + c.sizes[axis] for c in found) for axis in range(len(found[0].sizes))]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype_of[key]), torch.Size(size), found)
    for key, offset, length in objects:
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(object_file, offset, length)
    with whole_file(folder / ".metadata", only_writer=True) as part, open(part, "wb") as file:
        pickle.dump(Metadata(entries, None, storage), file)


def _save(path: Path, value: Any) -> None:
    # A path's name would become part of the archive
    with (
        whole_file(path, only_writer=True) as part,
        open(part, "wb") as file,
    ):
        torch.save(value, file)
