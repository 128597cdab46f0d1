"""Stage benchmarked.json: the best of the ranking on tasks, and the few that go on, which differ from each other."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.stdlib_text import TOPICS_FILE, read_documents
from ..errors import require
from ..evaluation import harness, long_context
from ..evaluation.asking import answerer, encoder
from ..evaluation.sample_records import Records
from ..evaluation.texts import prose_of
from .run import Run

LONG = tuple(task.name for task in long_context.TASKS)
Score = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], float]
"""(model, tokenizer, folder for its records) -> the higher the better."""


def benchmark(run: Run, ranked: Mapping[str, Any]) -> dict[str, Any]:
    """Benchmark, or go on with it: what a candidate answered is kept."""
    stage, arguments = run.stages["benchmarked"], run.arguments
    if (known := stage.result()) is not None:
        return known
    tasks = tasks_of(run)
    scores: dict[str, dict[str, float]] = stage.partial().get("scores", {})
    chosen = {one["name"]: one["sizes"] for one in ranked["ranked"][: arguments.top]}
    models = {"the teacher": {}, **chosen} if tasks else {}
    for name, sizes in tqdm(models.items(), unit="candidate", desc="benchmarks"):
        if name not in scores:
            model = run.image().parent if not sizes else run.image().parent.submodel(sizes)
            folder = run.work / "benchmarks" / name.replace(" ", "_")
            scores[name] = {task: score(model, run.text.tokenizer, folder) for task, score in tasks.items()}
            stage.keep(now=True, scores=scores)
    mean = {name: sum(found.values()) / len(found) for name, found in scores.items()}
    order = sorted(chosen, key=lambda name: -mean[name]) if tasks else list(chosen)
    finalists = differing(order, chosen, arguments.finalists, arguments.min_distance)
    return stage.finish(
        teacher=scores.get("the teacher"), order=order, finalists=finalists,
        scores={name: {**scores.get(name, {}), "mean": mean.get(name)} for name in order},
        distances={name: distance(chosen[name], chosen[finalists[0]]) for name in finalists},
    )  # fmt: skip


def differing(order: Sequence[str], sizes: Mapping[str, Mapping[str, Any]], count: int, least: int) -> list[str]:
    """The first ones that are at least so far from those before; where too few are, the first of the rest."""
    found: list[str] = []
    for name in order:
        if len(found) < count and all(distance(sizes[name], sizes[other]) >= least for other in found):
            found.append(name)
    rest = [name for name in order if name not in found]
    return [*found, *rest[: count - len(found)]]


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Layers that one of them has alone, and sizes that differ (Hamming)."""
    layers = set(one["layers"]) ^ set(other["layers"])
    return len(layers) + sum(one.get(name) != other.get(name) for name in {*one, *other} - {"layers"})


def tasks_of(run: Run) -> dict[str, Score]:
    """Those that were asked for, by name.

    Raises:
        ValueError: for a name that is no task.
    """
    return {name: task_of(name, run) for name in run.arguments.tasks}


def task_of(name: str, run: Run) -> Score:
    """A long-context question made here, a function of the user's, or a task of lm-evaluation-harness.

    Raises:
        ValueError: for a name that is none of them.
    """
    if name in LONG:
        return lambda model, tokenizer, folder: ask(name, run, model, tokenizer, folder)
    if ":" in name:
        own = imported(name)
        return lambda model, tokenizer, folder: float(own(model, tokenizer))
    task, manager = harness.HarnessTask(name), harness.task_manager(run.arguments.task_path)
    harness.check_tasks([task], manager, LONG, allow_code=False)
    options = harness.HarnessOptions(limit=run.arguments.task_limit, seed=run.arguments.seed)

    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
        records = Records(folder / "samples.jsonl")
        (record,) = harness.evaluate(model, tokenizer, [task], manager, options, records, lambda line: None)
        values = [value for _, _, value, _ in harness.figures(record)]
        require(bool(values), "tasks", name, "tasks with a figure")
        return values[0]

    return score


def ask(name: str, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Mean score of long-context questions."""
    arguments = run.arguments
    prose = prose_of(document.text for document in read_documents() if document.name.startswith(TOPICS_FILE))
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    plan = long_context.LongContextPlan(
        (name,), (arguments.task_length,), depths, arguments.task_limit or 10, arguments.seed
    )
    records = Records(folder / "samples.jsonl")
    found = long_context.evaluate(plan, prose, encoder(tokenizer), answerer(model, tokenizer), records)
    return sum(row["score"] for row in found) / len(found)


def imported(name: str) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]:
    """module:function."""
    module, _, function = name.partition(":")
    try:
        return vars(importlib.import_module(module))[function]
    except (ImportError, KeyError) as error:
        raise ValueError(f"tasks={name!r}: allowed is module:function that Python imports ({error})") from None
