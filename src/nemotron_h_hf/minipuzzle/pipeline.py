"""All stages in their order; each is handed what those before it found."""

from __future__ import annotations

from pathlib import Path

from ..errors import require
from ..output_folders import is_empty, resolve_target, writing
from .arguments import STAGES, MiniPuzzleArguments
from .benchmarks import benchmark, tasks_of
from .family import write_family
from .ranking import rank_candidates
from .report import write_report
from .run import Run
from .scoring import score
from .searching import check_grid, search
from .student import make_student
from .tournament import hold_tournament


def compress(arguments: MiniPuzzleArguments) -> Path:
    """Run the stages that are not done, up to `until`; the folder of the last report.

    Raises:
        ValueError: for arguments that do not fit the teacher, text that is too short, limits that nothing or the teacher
            itself fits, or a work folder of another teacher or other arguments.
        BlockingIOError: if another run is using the work folder.
    """
    last = STAGES.index(arguments.until) if arguments.until else len(STAGES) - 1
    last = last if arguments.output else min(last, STAGES.index("tournament"))
    with writing(arguments.work, arguments.teacher) as work:
        _refuse_others(work)
        for name in ("output", "family"):
            if (target := getattr(arguments, name)) is not None:
                resolve_target(target, arguments.teacher, work)
        run = Run(arguments, work)
        for name in STAGES[: last + 1]:  # what was made from something else is refused before anything runs
            known = run.stages[name].result()
            if name == "benchmarked" and known is None:
                tasks_of(run)
        if run.stages["candidates"].result() is None:
            check_grid(run)
        scores = score(run)
        if last >= 1:
            candidates = search(run, scores)
        if last >= 2:
            ranked = rank_candidates(run, candidates)
        if last >= 3:
            benchmarked = benchmark(run, ranked)
            if arguments.family is not None:
                write_family(run, scores, ranked, benchmarked)
        if last >= 4:
            tournament = hold_tournament(run, ranked, benchmarked)
        if last >= 5:
            make_student(run, ranked, tournament)
        write_report(work)
    return work


def _refuse_others(work: Path) -> None:
    """A folder with files and none of a stage is not ours."""
    ours = any((work / f"{name}.json").is_file() or (work / f".{name}.partial.json").is_file() for name in STAGES)
    ours = ours or (work / "widths.safetensors").is_file() or (work / "text").is_dir()
    require(is_empty(work) or ours, "work", str(work), "a new or empty folder, or that of this run")
