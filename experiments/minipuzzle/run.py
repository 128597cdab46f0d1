"""MiniPuzzle in miniature: what importance is worth next to other choices, before and after a short distillation.

    OMP_NUM_THREADS=1 python experiments/minipuzzle/run.py runs/minipuzzle          # goes on where it was
    OMP_NUM_THREADS=1 python experiments/minipuzzle/run.py runs/minipuzzle --seeds 0 --teacher FOLDER --recipe FILE

For each seed the whole command with the recipe: other documents are scored, held out and trained on. Its finalists and its
controls are distilled on the same rows for as many tokens. Then docs/results/minipuzzle gets results.json and results.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from nemotron_h_cli import run as command
from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.environment import machine, versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "minipuzzle"
RECIPE = ROOT / "examples" / "recipes" / "minipuzzle_tiny.yaml"
SHORT = "importance, the best"
KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "MoE"}


def main() -> None:
    """Run, collect, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default=EMBEDDED_MODEL)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        words = ["minipuzzle", arguments.teacher, str(arguments.folder / f"seed-{seed}"), "--seed", str(seed)]
        words += ["--config", str(arguments.recipe), "--distill_controls"]
        command([*words, "--output", str(arguments.folder / f"student-{seed}")])
    found = collect([arguments.folder / f"seed-{seed}" for seed in arguments.seeds])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(arguments.output / "results.png", found)
    print(table(found))


def collect(folders: list[Path]) -> dict:
    """Losses of every choice above the teacher's on the same text, by seed; scores by kind, finalists, students."""
    runs = [
        {name: read(folder, name) for name in ("scores", "candidates", "ranked", "tournament", "student")}
        for folder in folders
    ]
    choices: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, before, after in losses(run):
            entry = choices.setdefault(name, {"before": [], "after": []})
            entry["before"].append(before - run["ranked"]["parent"]["loss"])
            entry["after"].append(after - run["ranked"]["parent"]["loss"])
    first = runs[0]
    return {
        "teacher": {name: first["student"]["teacher"][name] for name in ("parameters", "pattern")},
        "teacher_loss": [run["ranked"]["parent"]["loss"] for run in runs],
        "limits": first["candidates"]["limits"], "num_candidates": [len(run["ranked"]["ranked"]) for run in runs],
        "tokens": first["tournament"]["tokens"], "loss_above_the_teacher": choices,
        "ranks_by_kind": by_kind(runs), "finalists": [order(run) for run in runs],
        "students": [student(run) for run in runs],
        "ranking": [run["ranked"]["measured"] for run in runs], "machine": machine(), "versions": versions(),
    }  # fmt: skip


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def losses(run: dict) -> list[tuple[str, float, float]]:
    """(choice, held-out loss before distillation, after it)."""
    trained, ranked = run["tournament"]["rounds"][0], run["ranked"]
    homogeneous = next(one for one in ranked["ranked"] if one["name"] in trained and one["name"] != "mixed")
    found = [(SHORT, homogeneous["loss"], trained[homogeneous["name"]]["loss"])]
    for one in ranked["ranked"]:
        if one["name"] == "mixed" and "mixed" in trained:
            found.append(("a width for each layer", one["loss"], trained["mixed"]["loss"]))
    for one in ranked["controls"]:
        if f"control {one['rule']}" in trained:
            found.append((one["rule"], one["loss"], trained[f"control {one['rule']}"]["loss"]))
    return found


def student(run: dict) -> dict:
    """What the long distillation made; its speed is left to a machine that does nothing else."""
    found = run["student"]
    kept = {
        side: {key: found[side][key] for key in ("parameters", "pattern", "accuracy", "loss")}
        for side in ("teacher", "student")
    }
    return {"name": found["name"], "sizes": found["sizes"], "trained_tokens": found["trained_tokens"], **kept,
            "before_distillation": found["before_distillation"]}  # fmt: skip


def by_kind(runs: list[dict]) -> dict[str, list[float]]:
    """Kind of layer -> mean rank over its layers, for each seed; 0 is the least important."""
    found: dict[str, list[float]] = {}
    for run in runs:
        pattern, ranks = run["scores"]["pattern"], run["scores"]["importance"]["hidden"]["rank"]
        for letter in dict.fromkeys(pattern):
            values = [ranks[str(layer)] for layer, kind in enumerate(pattern) if kind == letter]
            found.setdefault(KINDS[letter], []).append(statistics.fmean(values))
    return found


def order(run: dict) -> dict[str, list[str]]:
    """The finalists by held-out loss before and after distillation."""
    trained = {name: one for name, one in run["tournament"]["rounds"][0].items() if not name.startswith("control ")}
    before = {one["name"]: one["loss"] for one in run["ranked"]["ranked"]}
    after = {name: one["loss"] for name, one in trained.items()}
    return {"before": sorted(trained, key=before.get), "after": sorted(trained, key=after.get)}


def table(found: dict) -> str:
    """Markdown: mean and range over the seeds."""
    lines = ["| choice | before | after |", "|---|---|---|"]
    for name, entry in found["loss_above_the_teacher"].items():
        cells = [f"{statistics.fmean(part):.3f} ({min(part):.3f} to {max(part):.3f})" for part in entry.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, found: dict) -> None:
    """A pair of points for each choice, a line over the seeds."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(found["loss_above_the_teacher"].values()):
        for offset, (when, colour) in enumerate((("before", "#8d99ae"), ("after", "#2a9d8f"))):
            values, place = entry[when], row + 0.2 * offset - 0.1
            axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2)
            axes.scatter(
                values, [place] * len(values), color=colour, s=18, label=None if row else f"{when} distillation"
            )
    if (
        min(value for entry in found["loss_above_the_teacher"].values() for part in entry.values() for value in part)
        > 0
    ):
        axes.set_xscale("log")
    else:
        axes.axvline(0, color="black", label="teacher")
    axes.set_yticks(range(len(found["loss_above_the_teacher"])), found["loss_above_the_teacher"])
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss above the teacher's (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
