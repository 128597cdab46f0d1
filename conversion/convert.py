"""One call for both directions: recognise, plan, write, verify, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import Checkpoint
from nemotron_h_hf.output_folders import refuse_changed, stamps, writing
from nemotron_h_hf.resumable import Journal, check_room
from nemotron_h_hf.units import parse_bytes
from nemotron_h_hf.whole_files import write_text

from . import config as configs
from . import formats, verify, vision, vision_config
from .options import FORMATS, Options
from .plan import Plan, plan_to_hf, plan_to_megatron
from .report import JSON_NAME, TABLE_NAME, Report, add_plan, add_written, finished_before
from .source_checkpoint import SourceCheckpoint
from .write_hf import add_tokenizer, write_config, write_hf
from .write_megatron import FOLDER, Written, check_cuts


def convert(
    source: str | Path,
    target: str | Path,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Report:
    """Convert a checkpoint between Megatron and Hugging Face.

    source        a run, iteration or weights folder of Megatron, or a Hugging Face folder
    progress      show a bar
    say           called with what was recognised
    options       those of `Options`: convert("model/", "run/", format="torch", tp=2)

    Raises:
        ValueError: naming the tensor, file or field, for anything that does not fit; the target is then unfinished.
            For a target that is the source, holds it or is inside it.
        BlockingIOError: when another run is writing to the target.
    """
    started = time.monotonic()
    found = formats.find(source)
    seen = stamps(found.folder, apart_from=Path(target).resolve())
    asked = Options(**options).settled(found)
    say(f"{source} is a {found.format} checkpoint in {found.folder}; converting to {asked.format}")
    report = Report(str(source), found.format, str(target), asked.format, dry_run=asked.dry_run)
    max_bytes = parse_bytes(asked.max_shard_size, "max_shard_size")
    checkpoint, plan = (_plan_hf if asked.to == "hf" else _plan_megatron)(found, asked, report)
    add_plan(report, plan)
    if asked.dry_run:
        return report
    with writing(target, source, found.folder) as folder:
        work = Work(found.folder, folder, asked, checkpoint, plan, max_bytes, seen)
        report.fingerprint = plan.fingerprint(seen, asked.to, max_bytes, asked.layout)
        _carry_out(work, report, progress, started)
    return report


class Work(NamedTuple):
    """A planned conversion: from where, to where, and in which shape."""

    folder: Path
    target: Path
    asked: Options
    checkpoint: Checkpoint | SourceCheckpoint
    plan: Plan
    max_bytes: int
    seen: list


def _carry_out(work: Work, report: Report, progress: bool, started: float) -> None:
    """Write, verify and finish the target; one that is there already is verified."""
    written = finished_before(work.target, report.fingerprint)
    if written is not None and _looks_finished(work):
        report.already_there = True
        add_written(report, written)
        _verify(work, written, report, read_again=True)
        if work.asked.tokenizer is not None:
            report.tokenizer_added = add_tokenizer(work.plan, work.target, work.asked.tokenizer)
        return
    if work.asked.verify_output:
        verify.check_source(work.folder, work.checkpoint)
    check_room(work.target, work.plan.num_bytes)
    journal = Journal(work.target, report.fingerprint)
    with _bar(work.plan, progress) as advance:
        written = _write(work, journal, advance)
    add_written(report, written)
    report.bytes_read = work.checkpoint.bytes_read
    _verify(work, written, report, work.asked.verify_output)
    refuse_changed(work.seen)
    _finish(work)
    report.seconds = time.monotonic() - started
    write_text(work.target / TABLE_NAME, report.table())
    write_text(work.target / JSON_NAME, report.to_json())
    journal.finish()


def _write(work: Work, journal: Journal, advance: Callable[[int], None]) -> Written:
    """The weights."""
    read = work.checkpoint.__getitem__
    if work.asked.to == "hf":
        return write_hf(work.plan, read, work.target, journal, work.max_bytes, advance)
    folder, write = work.target / FOLDER, FORMATS[work.asked.format]
    folder.mkdir(exist_ok=True)
    return write(work.plan, read, folder, journal, work.max_bytes, work.asked.layout, advance)


def _verify(work: Work, written: Written, report: Report, read_again: bool) -> None:
    """The checks that were asked for, before the target is made to look finished."""
    if read_again:
        verify.check_output(work.target, work.asked.to, written.digests, work.plan, work.checkpoint)
        report.verified = True
    if work.asked.verify_logits is not None:
        report.logits = verify.compare_logits(work.target, work.asked.verify_logits, work.plan.config)


def _finish(work: Work) -> None:
    """What makes a target look finished."""
    if work.asked.to == "hf":
        write_config(work.plan, work.target, work.asked.tokenizer)
    else:
        write_text(work.target / formats.TRACKER, FOLDER)


def _looks_finished(work: Work) -> bool:
    return (work.target / ("config.json" if work.asked.to == "hf" else formats.TRACKER)).is_file()


def _plan_hf(found: formats.Found, asked: Options, report: Report) -> tuple[SourceCheckpoint, Plan]:
    checkpoint = formats.open_megatron(found)
    if vision.is_multimodal(checkpoint):
        model, remarks = vision_config.derive(checkpoint, asked.config, asked.tokenizer)
    else:
        model, remarks = configs.derive(checkpoint, asked.config)
    if asked.dtype is not None:
        model.dtype = str(asked.dtype).removeprefix("torch.")
    plan = plan_to_hf(checkpoint, model, asked.dtype, asked.allow_unused, asked.allow_missing)
    report.stand_ins = checkpoint.stand_ins
    report.notes += [*checkpoint.notes, *remarks]
    return checkpoint, plan


def _plan_megatron(found: formats.Found, asked: Options, report: Report) -> tuple[Checkpoint, Plan]:
    checkpoint, model, layout = Checkpoint(found.folder), read_config(found.folder, asked.config), asked.layout
    layout.check(vision.language(model))
    vision.check_ranks(model, layout.tp)
    plan = plan_to_megatron(
        checkpoint, model, layout.vocab_multiple, asked.dtype, asked.allow_unused, asked.allow_missing
    )
    check_cuts(plan, layout)
    report.notes += vision.remarks(model)
    return checkpoint, plan


def read_config(folder: Path, extra: str | Path | None) -> vision.Config:
    """The configuration of a Hugging Face checkpoint, or the one given instead."""
    base = folder if folder.is_dir() else folder.parent
    if extra is None and not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json; give one by --config")
    given = base if extra is None else extra
    sees = vision_config.read_given(given)
    return sees.config if sees is not None else NemotronHConfig(**configs.read_extra(given))


@contextmanager
def _bar(plan: Plan, visible: bool):
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, disable=not visible, desc="convert") as bar:
        yield bar.update


def write_megatron(source: str | Path, target: str | Path, **options: Any) -> Report:
    """Write a Hugging Face checkpoint as a Megatron one: `convert` with `to="megatron"` and the same options."""
    return convert(source, target, to="megatron", **options)
