"""Questions about numbers hidden in a text: one needle at a chosen depth, or several, with keys that look alike.

The kinds are those of RULER (arXiv 2404.06654, section 3); wording, numbers and text are our own: compare scores
with each other here and not with published ones. Every draw comes from `key`: a prompt made again with another
size differs in its filling only, and two depths of one key share everything before the needle.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .texts import Prose

NEEDLE = "The secret number of {name} is {number}."
NEEDLE_WORDS = len(NEEDLE.split())
INTRO = "Secret numbers are hidden in the text below. Remember them, a question about them comes at the end."
ONE = "What is the secret number of {names} in the text above?"
ONE_START = "The secret number of {names} in the text above is"
SEVERAL = "What are all the secret numbers of {names} in the text above?"
SEVERAL_START = "The secret numbers of {names} in the text above are"


@dataclass(frozen=True)
class Question:
    """A prompt, how its answer begins, and the strings that the answer must contain."""

    prompt: str
    answer_start: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Names in the text, numbers for each, and how many of the names are asked for."""

    num_names: int = 1
    num_numbers: int = 1
    num_asked: int = 1


def in_prose(prose: Prose, key: str, size: int, depth: float | None, kind: Kind) -> Question:
    """Needles between the sentences of `size` words of prose.

    Args:
        depth: share of the sentences before the needle, 0 to 1; None draws one for each needle.
    """
    rng = random.Random(key)
    needles = draw_needles(prose, key, kind.num_names, kind.num_numbers)
    asked = list(needles)[: kind.num_asked]
    start = rng.randrange(len(prose.sentences))
    hidden = [NEEDLE.format(name=name, number=number) for name, numbers in needles.items() for number in numbers]
    rng.shuffle(hidden)
    depths = [rng.random() if depth is None else depth for _ in hidden]
    return ask(" ".join(insert(prose.take(start, size), hidden, depths)), asked, needles)


def in_needles(prose: Prose, key: str, size: int, depth: float | None) -> Question:
    """One needle among needles with other names; `size` counts words, the odd ones are prose before them."""
    num_others, num_odd = divmod(size, NEEDLE_WORDS)
    needles = draw_needles(prose, key, num_others + 1, 1)
    asked = next(iter(needles))
    lines = [NEEDLE.format(name=name, number=numbers[0]) for name, numbers in needles.items() if name != asked]
    hidden = [NEEDLE.format(name=asked, number=needles[asked][0])]
    depths = [random.Random(key).random() if depth is None else depth]
    return ask(" ".join([*prose.take(0, num_odd), *insert(lines, hidden, depths)]), [asked], needles)


def draw_needles(prose: Prose, key: str, num_names: int, numbers_each: int) -> dict[str, list[str]]:
    """Different names, each with different numbers of seven digits; the first few do not depend on how many follow."""
    rng = random.Random(f"{key}/needles")
    needles: dict[str, list[str]] = {}
    used: set[str] = set()
    while len(needles) < num_names:
        name = "-".join(rng.sample(prose.vocabulary, 2))
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in range(numbers_each)]
        if name not in needles and len(used | set(numbers)) == len(used) + numbers_each:
            used.update(numbers)
            needles[name] = numbers
    return needles


def insert(sentences: Sequence[str], extra: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`sentences` with each of `extra` put where its share of the sentences has passed."""
    result = list(sentences)
    for depth, sentence in sorted(zip(depths, extra), reverse=True):
        result.insert(round(depth * len(sentences)), sentence)
    return result


def ask(context: str, asked: Sequence[str], needles: dict[str, list[str]]) -> Question:
    """The prompt around a context."""
    expected = tuple(number for name in asked for number in needles[name])
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
    question, start = (ONE, ONE_START) if len(expected) == 1 else (SEVERAL, SEVERAL_START)
    prompt = f"{INTRO}\n\n{context}\n\nQuestion: {question.format(names=names)}\n"
    return Question(prompt, "Answer: " + start.format(names=names), expected)
