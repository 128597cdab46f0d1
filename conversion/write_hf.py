"""Writes a planned conversion as an ordinary Hugging Face checkpoint, shard by shard, and goes on where one stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nemotron_h_hf.checkpoint import (
    Checkpoint,
    Digest,
    ShardWriter,
    TensorSpec,
    byte_view,
    pieces,
    plan_shards,
    write_index,
    write_text,
)  # fmt: skip

from .journal import Journal
from .plan import Job, Plan, to_hf
from .stream import ahead
from .write_megatron import Written

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def write_hf(
    plan: Plan,
    read: Callable[[str], Tensor],
    folder: Path,
    journal: Journal,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> Written:
    """Write all shards; those that `journal` names are kept if they still are what was written."""
    shards = plan_shards((job.targets for job in plan.jobs), max_shard_bytes)
    job_of = {job.targets[0].name: job for job in plan.jobs}
    digests: dict[str, Digest] = {}
    kept = []
    for file, specs in shards.items():
        seen = _finished(folder / file, specs, journal.done.get(file))
        if seen is None:
            jobs = [job_of[spec.name] for spec in specs if spec.name in job_of]
            seen = _write_shard(plan, jobs, read, folder / file, specs, progress)
            journal.add(file, seen)
        else:
            kept.append(file)
            progress(sum(spec.num_bytes for spec in specs))
        digests |= seen
    write_index(folder, shards)
    return Written(digests, list(shards), kept)


def _write_shard(
    plan: Plan, jobs: list[Job], read: Callable[[str], Tensor], path: Path, specs: list[TensorSpec], progress: Callable
) -> dict[str, Digest]:
    with ShardWriter(path, specs) as writer:
        for job, whole in ahead(jobs, lambda job: read(job.sources[0].name)):
            _write_job(writer, job, to_hf(job, whole, plan.config), progress)
            del whole  # before the next but one is read
    return writer.digests


def _write_job(writer: ShardWriter, job: Job, tensors: list[Tensor], progress: Callable[[int], None]) -> None:
    for spec, tensor in zip(job.targets, tensors, strict=True):
        writer.write(spec.name, tensor, progress)


def _finished(path: Path, specs: list[TensorSpec], record: dict | None) -> dict[str, Digest] | None:
    """What the journal noted of a file, if the file is there and still is what was noted."""
    if record is None or not path.is_file():
        return None
    noted = {name: Digest(*values) for name, values in record.items()}
    try:
        written = Checkpoint(path)
    except ValueError:  # cut short since then
        return None
    return noted if list(noted) == [spec.name for spec in specs] and matches(written, noted) else None


def matches(checkpoint: Checkpoint, noted: dict[str, Digest]) -> bool:
    """Whether the tensors of a written checkpoint still have the checksums that were noted."""
    return all(name in checkpoint and checksum(checkpoint[name]) == digest.sha256 for name, digest in noted.items())


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row after row."""
    digest = hashlib.sha256()
    for piece in pieces(tensor, tensor.dtype):
        digest.update(byte_view(piece))
    return digest.hexdigest()


def write_config(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    """config.json and, when given, the tokenizer's files; these come last, so a folder that has them is whole."""
    for name in TOKENIZER_FILES if tokenizer is not None else ():
        if (tokenizer / name).is_file():
            part = folder / f"{name}.part"
            shutil.copyfile(tokenizer / name, part)
            part.replace(folder / name)
    write_text(folder / "config.json", plan.config.to_json_string(use_diff=False))
