"""Questions on long prompts, made offline at exact lengths, answered by a model and scored as in RULER.

A length counts the whole window: the prompt in tokens of the model's own tokenizer, and the room left for the answer.
The filling takes all the space that is left, to within one unit of it (a word, a list item). The
score is the share of the expected strings that occur in the answer, letter case aside.

    task -> `samples` (seeded, fitted to the length) -> answers for the prompts -> `score` -> one record per sample
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from . import gathering, needles
from .needles import Kind, Question
from .sample_records import Records
from .texts import Prose

Encode = Callable[[str, str], list[int]]  # (prompt, how the answer begins) -> token ids
Answer = Callable[[list[list[int]], int], list[str]]  # (prompts, most tokens to write) -> what was written after each


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Args:
        make: (prose, key, size, depth) -> question; a larger size gives a longer prompt.
        answer_tokens: room for the answer as in RULER; a tokenizer that needs more for the expected answer gets it.
        smallest: the least size that makes a question.
        by_depth: one sample per depth asked for, instead of one at random depths.
    """

    name: str
    about: str
    make: Callable[[Prose, str, int, float | None], Question]
    answer_tokens: int
    smallest: int
    by_depth: bool = False


def _hidden(**kind: int) -> Callable[[Prose, str, int, float | None], Question]:
    return functools.partial(needles.in_prose, kind=Kind(**kind))


TASKS = (
    Task("needle", "one number hidden in prose, at every depth asked for", _hidden(), 128, 20, by_depth=True),
    Task("multikey", "four names with a number each, one asked", _hidden(num_names=4), 128, 20),
    Task("multikey_dense", "the whole text is names with numbers, one asked", needles.in_needles, 128, 16),
    Task("multivalue", "one name with four numbers, all asked", _hidden(num_numbers=4), 128, 20),
    Task("multiquery", "four names with a number each, all asked", _hidden(num_names=4, num_asked=4), 128, 20),
    Task("variables", "which five variables got a value, over four assignments", gathering.variables, 30, 20),
    Task("common_words", "the ten words that come most often in a list", gathering.common_words, 120, 40),
    Task("frequent_words", "the three most frequent of many coded words", gathering.frequent_words, 50, 100),
    Task("facts", "where an invented person was born, among many", gathering.facts, 32, 22),
    Task("facts_two_hops", "where that person's teacher was born", functools.partial(gathering.facts, num_hops=2), 32, 22),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A question made to length; `depth` is a share, None where the task draws its own."""

    task: str
    length: int
    index: int
    depth: float | None
    ids: list[int]
    expected: tuple[str, ...]
    max_new_tokens: int

    @property
    def key(self) -> str:
        """The name of its record."""
        depth = "" if self.depth is None else f"/{self.depth:g}"
        return f"{self.task}/{self.length}/{self.index}{depth}"


def sample(task: Task, length: int, index: int, depth: float | None, seed: int, prose: Prose, encode: Encode) -> Sample:
    """Sample number `index` of a task at a length.

    Raises:
        ValueError: if the length has no room for the smallest question.
    """
    make = functools.partial(task.make, prose, f"{seed}/{task.name}/{length}/{index}", depth=depth)
    smallest = make(size=task.smallest)
    answer_ids = encode("", " ".join(smallest.expected))
    max_new_tokens = max(task.answer_tokens, 2 * len(answer_ids))

    def ids_of(size: int) -> list[int]:
        question = make(size=size)
        return encode(question.prompt, question.answer_start)

    size = largest_size(lambda size: len(ids_of(size)), length - max_new_tokens, task.smallest)
    if size is None:
        needed = len(ids_of(task.smallest)) + max_new_tokens
        raise ValueError(f"lengths: {length} is too short for {task.name}, which needs {needed} tokens or more")
    return Sample(task.name, length, index, depth, ids_of(size), make(size=size).expected, max_new_tokens)


def largest_size(num_tokens: Callable[[int], int], budget: int, smallest: int) -> int | None:
    """The size from `smallest` on whose prompt fills a budget of tokens, one more unit of which would not fit.

    Tokens grow nearly in proportion to the size, so each guess follows from the last ones: about five prompts are made.
    """
    low, low_tokens = smallest, num_tokens(smallest)
    if low_tokens > budget:
        return None
    high, per_unit = None, low_tokens / smallest
    while low_tokens < budget and (high is None or high - low > 1):
        guess = low + max(1, int((budget - low_tokens) / per_unit))
        guess = guess if high is None else min(guess, high - 1)
        tokens = num_tokens(guess)
        per_unit = max((tokens - low_tokens) / (guess - low), 0.1)
        if tokens <= budget:
            low, low_tokens = guess, tokens
        else:
            high = guess
    return low


def score(expected: Sequence[str], answer: str) -> float:
    """The share of the expected strings in the answer, letter case aside."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


@dataclass(frozen=True)
class LongContextPlan:
    """What is asked: tasks by name, lengths in tokens, depths as shares, samples per task, length (and depth)."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_samples: int
    seed: int


def evaluate(plan: LongContextPlan, prose: Prose, encode: Encode, answer: Answer, records: Records) -> list[dict]:
    """Ask everything that has no record yet; returns the records of the plan. Short prompts come first."""
    tasks = [task for task in TASKS if task.name in plan.tasks]
    rounds = [
        (length, task, index) for length in sorted(plan.lengths) for task in tasks for index in range(plan.num_samples)
    ]
    for task in tasks:  # a length that is too short shows before the first answer
        sample(task, min(plan.lengths), 0, plan.depths[0] if task.by_depth else None, plan.seed, prose, encode)
    found = []
    with tqdm(rounds, unit="question", disable=not rounds) as bar:
        for length, task, index in bar:
            bar.set_description(f"{task.name} {length:,}")
            found += _ask_at_depths(task, length, index, plan, prose, encode, answer, records)
    return found


def _ask_at_depths(
    task: Task,
    length: int,
    index: int,
    plan: LongContextPlan,
    prose: Prose,
    encode: Encode,
    answer: Answer,
    records: Records,
) -> list[dict]:
    """The samples of one key together, for the answerer to share what their prompts have in common."""
    depths = plan.depths if task.by_depth else (None,)
    samples = [sample(task, length, index, depth, plan.seed, prose, encode) for depth in depths]
    missing = [one for one in samples if one.key not in records]
    if missing:
        answers = answer([one.ids for one in missing], max(one.max_new_tokens for one in missing))
        for one, text in zip(missing, answers, strict=True):
            records.add(one.key, record(one, text))
    return [records[one.key] for one in samples]


def record(one: Sample, text: str) -> dict:
    """What is kept of a sample."""
    return {
        "task": one.task, "length": one.length, "index": one.index, "depth": one.depth, "prompt_tokens": len(one.ids),
        "max_new_tokens": one.max_new_tokens, "expected": list(one.expected), "answer": text,
        "score": score(one.expected, text),
    }  # fmt: skip


def summarise(found: Iterable[dict]) -> list[dict]:
    """Mean score with its standard error by task and length, and by depth where the samples have one."""
    groups: dict[tuple, list[float]] = {}
    for row in found:
        groups.setdefault((row["task"], row["length"], None), []).append(row["score"])
        if row["depth"] is not None:
            groups.setdefault((row["task"], row["length"], row["depth"]), []).append(row["score"])
    return [
        {
            "task": task, "length": length, "depth": depth, "score": statistics.fmean(scores),
            "stderr": statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
            "num_samples": len(scores),
        }
        for (task, length, depth), scores in groups.items()
    ]  # fmt: skip
