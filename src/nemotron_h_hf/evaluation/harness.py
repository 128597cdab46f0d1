"""Tasks of lm-evaluation-harness by name, on a model that is loaded already; a finished task is not run again.

The benchmarks that the Nemotron-H papers report are groups of such tasks. Where a paper's number of examples is not
known for certain, the task's own default or the usual number is taken; the results say
which. LiveCodeBench, which the tables also have, is not part of the harness.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .sample_records import Records, write_lines

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

RUNS_CODE = ("humaneval", "mbpp")  # their scores come from running what the model wrote


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag of the harness; `num_fewshot` None takes its own default."""

    name: str
    num_fewshot: int | None = None

    @property
    def runs_code(self) -> bool:
        return self.name.startswith(RUNS_CODE)


BASE_TABLE = (
    HarnessTask("mmlu", 5),
    HarnessTask("mmlu_pro", 5),
    HarnessTask("gsm8k_cot", 8),
    HarnessTask("minerva_math", 4),
    HarnessTask("humaneval", 0),
)
REASONING_TABLE = (
    HarnessTask("minerva_math500"),
    HarnessTask("aime24"),
    HarnessTask("aime25"),
    HarnessTask("gpqa_diamond_cot_zeroshot"),
    HarnessTask("mmlu_pro"),
)
COMMONSENSE = tuple(HarnessTask(name) for name in ("arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande"))
# Names that stand for several tasks.
GROUPS = {
    "paper-base": (BASE_TABLE, "MMLU, MMLU-Pro, GSM8K, MATH and HumanEval, as in the table of the base models"),
    "paper-reasoning": (REASONING_TABLE, "MATH-500, AIME 2024 and 2025, GPQA diamond, MMLU-Pro: the reasoning models'"),
    "commonsense": (COMMONSENSE, "ARC challenge, HellaSwag, OpenBookQA, PIQA, WinoGrande"),
}


@dataclass(frozen=True)
class HarnessOptions:
    """How tasks are run; `max_length` None is the model's own, `limit` None is all questions."""

    limit: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0


def task_manager(include_path: str | None) -> TaskManager:
    """The index of all tasks: the harness's own and those of a folder with YAML files. Takes some seconds.

    Raises:
        ValueError: if the harness is not installed or the folder is not there.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path: {include_path} is not a folder; give one with tasks in YAML files")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks: {error.name} is not installed; pip install 'nemotron-h-hf[eval]' for tasks of lm-evaluation-harness"
        ) from None
    return TaskManager(include_path=include_path)


def check_tasks(tasks: Sequence[HarnessTask], manager: TaskManager, own: Sequence[str], allow_code: bool) -> None:
    """Refuse unknown names, and tasks that run code without permission.

    Raises:
        ValueError: with the nearest names, `own` names among them.
    """
    known = set(manager.all_tasks)
    for task in tasks:
        if task.name not in known:
            near = difflib.get_close_matches(task.name, [*own, *known], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(own)} and harness tasks"
            raise ValueError(f"tasks: {task.name!r} is not known; {hint}")
        if task.runs_code and not allow_code:
            raise ValueError(f"tasks: {task.name} runs code that the model wrote; --allow-code agrees to that")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[HarnessTask],
    manager: TaskManager,
    options: HarnessOptions,
    records: Records,
    say: Callable[[str], None],
) -> list[dict]:
    """Run the tasks that have no record yet, one after the other; returns the records.

    Questions and answers go to `harness_TASK.jsonl` next to the records.
    """
    missing = [task for task in tasks if record_key(task, options.limit) not in records]
    if missing:
        wrapped = _wrap(model, tokenizer, options)
    for task in missing:
        say(f"lm-evaluation-harness: {task.name}")
        with plain_generation(model):
            results = _run(wrapped, task, manager, options)
        path = records.path.with_name(f"harness_{task.name}.jsonl")
        write_lines(path, [row for rows in results["samples"].values() for row in rows])
        records.add(record_key(task, options.limit), record(task, results))
    return [records[record_key(task, options.limit)] for task in tasks]


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: HarnessOptions) -> LM:
    """The harness's own wrapper: of a model that sees, the one that hands it pictures (its processor is read from its folder)."""
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    sizes = {"batch_size": options.batch_size, "max_length": options.max_length}
    if getattr(model.config, "vision_config", None) is not None:
        return HFMultimodalLM(pretrained=model, convert_img_format=True, **sizes)
    return HFLM(pretrained=model, tokenizer=tokenizer, **sizes)


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """No generation defaults of the checkpoint but its tokens: a `max_new_tokens` there would win over the task's limit."""
    before = model.generation_config
    tokens = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        model.generation_config = before


def _run(wrapped: LM, task: HarnessTask, manager: TaskManager, options: HarnessOptions) -> dict:
    from lm_eval import simple_evaluate

    if options.allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the package `evaluate`, which runs the code
    try:
        return simple_evaluate(
            wrapped,
            tasks=[task.name],
            num_fewshot=task.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            confirm_run_unsafe_code=options.allow_code,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except ImportError as error:  # some tasks need further packages
        raise ValueError(f"tasks: {task.name} cannot run: {error}") from error


def record_key(task: HarnessTask, limit: int | None) -> str:
    """The name of a task's record: more examples in the prompt or more questions make another one."""
    shots = "own" if task.num_fewshot is None else task.num_fewshot
    return f"harness/{task.name}/{shots}/{limit or 'all'}"


def record(task: HarnessTask, results: dict) -> dict:
    """What is kept of the harness's answer: figures, examples in the prompt, questions, versions."""
    return {
        "task": task.name, "results": results["results"], "num_fewshot": results["n-shot"],
        "num_questions": results["n-samples"], "versions": results["versions"],
    }  # fmt: skip


def figures(row: dict) -> list[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of a record: of the group asked for alone, where it has figures."""
    asked = row["results"].get(row["task"], {})
    chosen = {row["task"]: asked} if _metrics(asked) else row["results"]
    return [
        (name, metric.removesuffix(",none"), values[metric], _number(values.get(metric.replace(",", "_stderr,", 1))))
        for name, values in chosen.items()
        for metric in _metrics(values)
    ]


def _metrics(values: dict) -> list[str]:
    return [
        name for name, value in values.items() if "," in name and "_stderr," not in name and _number(value) is not None
    ]


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None
