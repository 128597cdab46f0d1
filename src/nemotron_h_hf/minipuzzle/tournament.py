"""Stage tournament.json: the finalists are distilled for a short while; after each round the better half stays.

Order before distillation need not be order after it, which is why several are tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .distilling import cache_teacher, distill, held_out_figures, load_student, remove_checkpoints
from .run import Run

FOLDER = "tournament"


def hold_tournament(run: Run, ranked: Mapping[str, Any], benchmarked: Mapping[str, Any]) -> dict[str, Any]:
    """Hold it, or go on: a training that is done is not repeated, one under way goes on from its last checkpoint."""
    stage, arguments = run.stages["tournament"], run.arguments
    if (known := stage.result()) is not None:
        return known
    left = list(benchmarked["finalists"])
    controls = _controls(run, ranked)
    rounds: list[dict[str, Any]] = stage.partial().get("rounds", [])
    if not rounds:
        _write_starts(run, ranked, left, controls)
    for number in range(arguments.rounds):
        rounds += [{}] if number == len(rounds) else []
        cache = run.work / FOLDER / f"teacher-{number}" if arguments.top_k else None
        for name in [*left, *(controls if number == 0 else ())]:
            if name not in rounds[number]:
                rounds[number][name] = _train(run, name, number, cache)
                stage.keep(now=True, rounds=rounds)
            remove_checkpoints(run.work / _folder(name, number))
        if cache is not None:
            shutil.rmtree(cache, ignore_errors=True)
        left.sort(key=lambda name: rounds[number][name]["after"])
        left = left[: (len(left) + 1) // 2] if number + 1 < arguments.rounds else left[:1]
    last = str(_folder(left[0], arguments.rounds - 1) / "model")
    return stage.finish(winner=left[0], model=last, rounds=rounds, tokens=arguments.short_tokens)


def _train(run: Run, name: str, number: int, cache: Path | None) -> dict[str, float]:
    """One training; seeds differ by round, which sees other rows."""
    tokens, seed = run.arguments.short_tokens, run.arguments.seed + number
    start = run.work / (_folder(name, number - 1) / "model" if number else _start(name))
    if cache is not None:
        cache_teacher(run, cache, tokens, seed)
    output = run.work / _folder(name, number)
    losses = distill(run, start, output, tokens, seed, cache)
    return {**losses, **held_out_figures(run, load_student(run, output / "model"))}


def _write_starts(run: Run, ranked: Mapping[str, Any], names: list[str], controls: Mapping[str, Mapping]) -> None:
    """Each one as a checkpoint, out of the memory image."""
    sizes = {one["name"]: one["sizes"] for one in ranked["ranked"]}
    for name in names:
        _write_start(run, name, "importance", sizes[name])
    for name, control in controls.items():
        _write_start(run, name, control["order"], control["sizes"])


def _write_start(run: Run, name: str, order: str, sizes: Mapping[str, Any]) -> None:
    folder = run.work / _start(name)
    if not (folder / "config.json").is_file():
        run.image(order).save(sizes, folder)


def _controls(run: Run, ranked: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> the control, those that have a model."""
    chosen = ranked["controls"] if run.arguments.distill_controls else ()
    return {f"control {one['rule']}": one for one in chosen if one["sizes"] is not None}


def _start(name: str) -> Path:
    return Path(FOLDER, name.replace(" ", "_"), "start")


def _folder(name: str, number: int) -> Path:
    return Path(FOLDER, name.replace(" ", "_"), f"round-{number}")
