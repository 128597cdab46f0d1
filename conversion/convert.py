"""One call for both directions: recognise, plan, write, verify, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import Checkpoint
from nemotron_h_hf.output_folders import stamps, writing
from nemotron_h_hf.resumable import Journal, check_room
from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES
from nemotron_h_hf.units import parse_bytes
from nemotron_h_hf.whole_files import write_text

from . import config as configs
from . import formats, verify
from .plan import Plan, plan_to_hf, plan_to_megatron
from .report import JSON_NAME, TABLE_NAME, Report, add_plan, add_written, finished_before, parse_dtype
from .source_checkpoint import SourceCheckpoint
from .write_hf import write_config, write_hf
from .write_legacy import write_ranks
from .write_megatron import FOLDER, Layout, Written, check_cuts
from .write_torch_dist import write_distributed

Allowed = tuple[Sequence[str], Sequence[str]]  # patterns of names: left over, missing
FORMATS = {"torch_dist": write_distributed, "torch": write_ranks}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    format: str | None = None,
    tp: int = 1,
    pp: int | Sequence[int] = 1,
    ep: int = 1,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    tokenizer: str | Path | None = None,
    vocab_divisible_by: int = 128,
    core: str = "auto",
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    dry_run: bool = False,
    verify_output: bool = False,
    verify_logits: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Convert a checkpoint between Megatron and Hugging Face.

    source        a run, iteration or weights folder of Megatron, or a Hugging Face folder
    to            "hf" or "megatron"; the opposite of what the source is, if not given
    format        of a Megatron target: "torch_dist" (which loads under any parallelism) or "torch"
    tp, pp, ep    tensor, pipeline, expert parallel sizes of a "torch" target; `pp` may be the layers of each stage
    dtype         of the written floating-point tensors; each tensor's own if not given
    config        a preset's name or a config.json that completes what a Megatron checkpoint does not say
    tokenizer     a folder whose tokenizer files are copied to a Hugging Face target
    vocab_divisible_by   a Megatron target's vocabulary is padded to a multiple of this times `tp`
    core          megatron-core release whose local names a "torch" target has: "auto", "0.16", "0.19"
    allow_unused, allow_missing   patterns of names (as in a shell) whose tensors may be left over or absent
    verify_logits a Hugging Face checkpoint; a probe through the result must give the same logits

    Raises:
        ValueError: naming the tensor, file or field, for anything that does not fit; the target is then unfinished.
            For a target that is the source, holds it or is inside it.
        BlockingIOError: when another run is writing to the target.
    """
    started = time.monotonic()
    found = formats.find(source)
    to = _direction(to, found)
    format = _format(to, format, verify_logits)
    tokenizer = _tokenizer(tokenizer)
    say(f"{source} is a {found.format} checkpoint in {found.folder}; converting to {format}")
    report = Report(str(source), found.format, str(target), format, dry_run=dry_run)
    wanted, max_bytes = parse_dtype(dtype), parse_bytes(max_shard_size, "max_shard_size")
    layout = Layout(format, tp, pp, ep, vocab_divisible_by, core)
    allowed = (allow_unused, allow_missing)
    if to == "hf":
        checkpoint, plan = _plan_hf(source, config, wanted, allowed, report)
    else:
        checkpoint, plan = _plan_megatron(found.folder, config, wanted, allowed, layout)
    add_plan(report, plan)
    if dry_run:
        return report
    with writing(target, source, found.folder) as folder:
        work = Work(found.folder, folder, to, checkpoint, plan, max_bytes, layout)
        report.fingerprint = plan.fingerprint(stamps(found.folder, apart_from=folder), to, max_bytes, layout)
        _carry_out(work, report, tokenizer, verify_output, verify_logits, progress, started)
    return report


class Work(NamedTuple):
    """A planned conversion: from where, to where, and in which shape."""

    folder: Path
    target: Path
    to: str
    checkpoint: Checkpoint | SourceCheckpoint
    plan: Plan
    max_bytes: int
    layout: Layout


def _carry_out(
    work: Work,
    report: Report,
    tokenizer: Path | None,
    verify_output: bool,
    verify_logits: str | Path | None,
    progress: bool,
    started: float,
) -> None:
    """Write, verify and finish the target; one that is there already is verified."""
    written = finished_before(work.target, report.fingerprint)
    if written is not None and _looks_finished(work):
        report.already_there = True
        add_written(report, written)
        _verify(work, written, True, verify_logits, report)
        return
    if verify_output:
        verify.check_source(work.folder, work.checkpoint)
    check_room(work.target, work.plan.num_bytes)
    journal = Journal(work.target, report.fingerprint)
    with _bar(work.plan, progress) as advance:
        written = _write(work, journal, advance)
    add_written(report, written)
    report.bytes_read = work.checkpoint.bytes_read
    _verify(work, written, verify_output, verify_logits, report)
    _finish(work, tokenizer)
    report.seconds = time.monotonic() - started
    write_text(work.target / TABLE_NAME, report.table())
    write_text(work.target / JSON_NAME, report.to_json())
    journal.finish()


def _write(work: Work, journal: Journal, advance: Callable[[int], None]) -> Written:
    """The weights."""
    read = work.checkpoint.__getitem__
    if work.to == "hf":
        return write_hf(work.plan, read, work.target, journal, work.max_bytes, advance)
    folder = work.target / FOLDER
    folder.mkdir(exist_ok=True)
    return FORMATS[work.layout.format](work.plan, read, folder, journal, work.max_bytes, work.layout, advance)


def _verify(
    work: Work, written: Written, verify_output: bool, verify_logits: str | Path | None, report: Report
) -> None:
    """The checks that were asked for, before the target is made to look finished."""
    if verify_output:
        verify.check_output(work.target, work.to, written.digests, work.plan, work.checkpoint)
        report.verified = True
    if verify_logits is not None:
        report.logits = verify.compare_logits(work.target, verify_logits, work.plan.config)


def _finish(work: Work, tokenizer: Path | None) -> None:
    """What makes a target look finished."""
    if work.to == "hf":
        write_config(work.plan, work.target, tokenizer)
    else:
        write_text(work.target / formats.TRACKER, FOLDER)


def _looks_finished(work: Work) -> bool:
    return (work.target / ("config.json" if work.to == "hf" else formats.TRACKER)).is_file()


def _direction(to: str | None, found: formats.Found) -> str:
    """What the source is not."""
    other = "megatron" if found.format == "hf" else "hf"
    if to not in (None, other):
        raise ValueError(f"to={to!r}: {found.folder} is a {found.format} checkpoint, so {other!r} is allowed")
    return other


def _format(to: str, format: str | None, verify_logits: str | Path | None) -> str:
    """The target's format."""
    if to == "hf":
        return "hf"
    format = format or "torch_dist"
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: allowed are {', '.join(FORMATS)}")
    if verify_logits is not None:
        raise ValueError("verify_logits needs a Hugging Face target; a Megatron one is checked by verify_output")
    return format


def _tokenizer(folder: str | Path | None) -> Path | None:
    if folder is not None and not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"tokenizer={folder}: a folder with {', '.join(TOKENIZER_FILES[:2])}, ... is allowed")
    return None if folder is None else Path(folder)


def _plan_hf(
    source: str | Path, extra: str | Path | None, dtype: torch.dtype | None, allowed: Allowed, report: Report
) -> tuple[SourceCheckpoint, Plan]:
    checkpoint = formats.read_megatron(source)
    model, remarks = configs.derive(checkpoint, extra)
    if dtype is not None:
        model.dtype = str(dtype).removeprefix("torch.")
    plan = plan_to_hf(checkpoint, model, dtype, *allowed)
    report.stand_ins = checkpoint.stand_ins
    report.notes += [*checkpoint.notes, *remarks]
    return checkpoint, plan


def _plan_megatron(
    folder: Path, extra: str | Path | None, dtype: torch.dtype | None, allowed: Allowed, layout: Layout
) -> tuple[Checkpoint, Plan]:
    checkpoint, model = Checkpoint(folder), read_config(folder, extra)
    layout.check(model)
    plan = plan_to_megatron(checkpoint, model, layout.vocab_multiple, dtype, *allowed)
    check_cuts(plan, layout)
    return checkpoint, plan


def read_config(folder: Path, extra: str | Path | None) -> NemotronHConfig:
    """The configuration of a Hugging Face checkpoint, or the one given instead."""
    base = folder if folder.is_dir() else folder.parent
    if extra is None and not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json; give one by --config")
    return NemotronHConfig(**configs.read_extra(base if extra is None else extra))


@contextmanager
def _bar(plan: Plan, visible: bool):
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, disable=not visible, desc="convert") as bar:
        yield bar.update


def write_megatron(source: str | Path, target: str | Path, **options: Any) -> Report:
    """Write a Hugging Face checkpoint as a Megatron one: `convert` with `to="megatron"` and the same options."""
    return convert(source, target, to="megatron", **options)
