"""Questions whose answer is spread over the prompt: follow variables, count words, find facts about people.

After RULER's variable tracking, common words, frequent words and question answering, in other words. RULER asks
questions of SQuAD and HotpotQA, which would have to be downloaded and which models have read; the people here are
invented, so nothing but the prompt can answer.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Iterator

from .needles import Question, insert
from .texts import Prose

# Variable tracking
NUM_HOPS = 4
NOISE = "The road is dry. The river is wide. The lamp is lit. We walk on. Then we come back.".split()
TRACK_INTRO = "Variables are assigned in the text below. Follow the assignments from one to the next."
TRACK_QUESTION = "Which variables have the value {value} after the text above?"
TRACK_START = "The {count} variables with the value {value} are:"

# Common words
NUM_COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
COUNT_INTRO = "Some words in the numbered list below come more often than the others. Remember which."
COUNT_QUESTION = f"Which {NUM_COMMON} words come most often in the list above?"
COUNT_START = f"The {NUM_COMMON} words that come most often are:"

# Frequent words
ZETA_2 = math.pi**2 / 6
CODED_INTRO = "Count how often each coded word comes in the text below. Dots are not words."
CODED_QUESTION = "Which three coded words come most often in the text above?"
CODED_START = "The three coded words that come most often are:"

# Facts about people
PERSON = "{name} was born in {town} and learned the trade from {teacher}."
PERSON_WORDS = len(PERSON.split())
FACTS_INTRO = "Read the notes about people below. A question about one of them comes at the end."
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def variables(prose: Prose, key: str, size: int, depth: None) -> Question:
    """Five variables, each assigned from the one before, among `size` words of noise; with a worked example."""
    rng = random.Random(key)
    example = _variables(rng, 2 * len(NOISE), num_letters=3)
    question = _variables(rng, size, num_letters=5)
    return _after_example(example, question)


def _variables(rng: random.Random, size: int, num_letters: int) -> Question:
    value, names = str(rng.randrange(10**4, 10**5)), set()
    while len(names) <= NUM_HOPS:
        names.add("".join(rng.choices(string.ascii_uppercase, k=num_letters)))
    chain = sorted(names)
    rng.shuffle(chain)
    lines = [f"VAR {chain[0]} = {value}."] + [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
    depths = sorted(rng.random() for _ in lines)
    noise = Prose((tuple(NOISE),), ()).take(0, size)
    context = " ".join(insert(noise, lines, depths))
    prompt = f"{TRACK_INTRO}\n\n{context}\n\nQuestion: {TRACK_QUESTION.format(value=value)}\n"
    return Question(prompt, f"Answer: {TRACK_START.format(count=len(chain), value=value)}", tuple(chain))


def common_words(prose: Prose, key: str, size: int, depth: None) -> Question:
    """Ten words many times among others a few times, `size` list items in total; with a worked example.

    Thirty times against three, as in RULER, where the list is long enough for the ten to make up half of it; in a
    shorter one they come `size / 20` times and the others once.
    """
    rng, words = random.Random(key), prose.words(key)
    example = _common_words(rng, words, 3 * NUM_COMMON, common_times=2, rare_times=1)
    times = min(COMMON_TIMES, size // (2 * NUM_COMMON))
    question = _common_words(rng, words, size, times, RARE_TIMES if times > 3 * RARE_TIMES else 1)
    return _after_example(example, question)


def _common_words(rng: random.Random, words: Iterator[str], size: int, common_times: int, rare_times: int) -> Question:
    common = list(itertools.islice(words, NUM_COMMON))
    num_rare = size - NUM_COMMON * common_times
    others = (word for word in words if not any(c in word for c in common))  # "list" must not be found in "listing"
    rare = list(itertools.islice(others, math.ceil(num_rare / rare_times)))
    items = common * common_times + (rare * rare_times)[:num_rare]
    rng.shuffle(items)
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(items, 1))
    prompt = f"{COUNT_INTRO}\n\n{listed}\n\nQuestion: {COUNT_QUESTION}\n"
    return Question(prompt, f"Answer: {COUNT_START}", tuple(common))


def frequent_words(prose: Prose, key: str, size: int, depth: None) -> Question:
    """`size` coded words of six letters; the k-th most frequent takes a share of 1 / (k^2 zeta(2)), the first is dots."""
    rng = random.Random(key)
    counts = [count for rank in range(1, size) if (count := int(size / (rank**2 * ZETA_2)))]
    coded: dict[str, None] = {}
    while len(coded) < len(counts) - 1:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    names = ["...", *coded]
    words = [name for name, count in zip(names, counts) for _ in range(count)]
    words += ["..."] * (size - len(words))
    rng.shuffle(words)
    prompt = f"{CODED_INTRO}\n\n{' '.join(words)}\n\nQuestion: {CODED_QUESTION}\n"
    return Question(prompt, f"Answer: {CODED_START}", tuple(names[1:4]))


def facts(prose: Prose, key: str, size: int, depth: None, num_hops: int = 1) -> Question:
    """Where somebody was born, or (two hops) where their teacher was; `size` words of notes, the odd ones prose."""
    num_people, num_odd = divmod(size, PERSON_WORDS)
    rng = random.Random(key)
    names = list(itertools.islice(_invented(f"{key}/names", num_parts=2, num_syllables=3), num_people))
    towns = list(itertools.islice(_invented(f"{key}/towns", num_parts=1, num_syllables=4), num_people))
    ring = list(range(num_people))
    rng.shuffle(ring)
    teacher = dict(zip(ring, ring[1:] + ring[:1]))  # one ring: no one teaches themselves
    notes = [PERSON.format(name=names[i], town=towns[i], teacher=names[teacher[i]]) for i in range(num_people)]
    asked = rng.randrange(num_people)
    answer = towns[asked if num_hops == 1 else teacher[asked]]
    who = names[asked] if num_hops == 1 else f"the person who taught {names[asked]}"
    context = " ".join([*prose.take(0, num_odd), *notes])
    prompt = f"{FACTS_INTRO}\n\n{context}\n\nQuestion: Where was {who} born?\n"
    return Question(prompt, f"Answer: {who[0].upper()}{who[1:]} was born in", (answer,))


def _invented(key: str, num_parts: int, num_syllables: int) -> Iterator[str]:
    """Invented names of `num_parts` words, no word ever twice, in an order that `key` decides."""
    rng, seen = random.Random(key), set()
    while True:
        parts = ["".join(rng.choices(SYLLABLES, k=num_syllables)).capitalize() for _ in range(num_parts)]
        if seen.isdisjoint(parts) and len(set(parts)) == num_parts:
            seen.update(parts)
            yield " ".join(parts)


def _after_example(example: Question, question: Question) -> Question:
    solved = f"{example.prompt}{example.answer_start} {', '.join(example.expected)}\n\n"
    return Question(solved + question.prompt, question.answer_start, question.expected)
