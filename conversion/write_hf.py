"""Writes a planned conversion as an ordinary Hugging Face checkpoint, shard by shard; resumes one that was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from nemotron_h_hf.checkpoint import ShardWriter, plan_shards
from nemotron_h_hf.inputs import load_tokenizer
from nemotron_h_hf.model.configuration_nemotron_h_vl import NemotronHVLConfig
from nemotron_h_hf.model.processing_nemotron_h_vl import NemotronHVLProcessor
from nemotron_h_hf.model.weights import TensorSpec
from nemotron_h_hf.resumable import Journal, write_shards
from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES, copy_files, save_tokenizer
from nemotron_h_hf.whole_files import write_text

from .plan import Job, Plan, to_hf
from .read_ahead import ahead
from .write_megatron import Written


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

    def fill(writer: ShardWriter, specs: Sequence[TensorSpec]) -> None:
        jobs = [job_of[spec.name] for spec in specs if spec.name in job_of]
        for job, whole in ahead(jobs, lambda job: read(job.sources[0].name)):
            _write_job(writer, job, to_hf(job, whole), progress)
            del whole  # before the next but one is read

    digests, kept = write_shards(folder, shards, fill, journal, progress)
    return Written(digests, list(shards), kept)


def _write_job(writer: ShardWriter, job: Job, tensors: list[Tensor], progress: Callable[[int], None]) -> None:
    for spec, tensor in zip(job.targets, tensors, strict=True):
        writer.write(spec.name, tensor, progress)


def write_config(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    """config.json and, when given, the tokenizer's files, with a processor if the model sees.

    These come last, so a folder that has them is whole.
    """
    if tokenizer is not None:
        _write_tokenizer(plan, folder, tokenizer)
    write_text(folder / "config.json", plan.config.to_json_string(use_diff=False))


def add_tokenizer(plan: Plan, folder: Path, tokenizer: Path) -> bool:
    """Give a finished folder the tokenizer that it does not have yet; whether it got it."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    _write_tokenizer(plan, folder, tokenizer)
    return True


def _write_tokenizer(plan: Plan, folder: Path, tokenizer: Path) -> None:
    copy_files(TOKENIZER_FILES, tokenizer, folder)
    if isinstance(plan.config, NemotronHVLConfig):
        words = load_tokenizer(str(tokenizer))
        NemotronHVLProcessor.of_model(plan.config, words).save_pretrained(folder)
        save_tokenizer(words, folder)
