"""Text from files for the evaluation, and the prose that long prompts are filled with."""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_SENTENCES, MIN_VOCABULARY = 20, 50
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PLAIN_WORD = re.compile(r"[a-z]{4,9}")


def read_texts(patterns: Sequence[str], column: str = "text") -> Iterator[tuple[str, str]]:
    """(name, text) of every document: a line of a `.jsonl` file (its `column`), or any other file as a whole.

    A file that several patterns match is read once.

    Raises:
        ValueError: naming the pattern without files, or file and line that hold no text.
    """
    seen: set[Path] = set()
    for pattern in patterns:
        paths = sorted(Path(found) for found in glob.glob(pattern, recursive=True) if Path(found).is_file())
        if not paths:
            raise ValueError(f"text: {pattern!r} matches no file")
        for path in paths:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            yield from (_json_lines(path, column) if path.suffix == ".jsonl" else [(str(path), _decode(path))])


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 at byte {error.start}") from None


def _json_lines(path: Path, column: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_decode(path).split("\n"), 1):  # not splitlines: JSON may hold other line breaks
        if line.strip():
            yield f"{path}:{number}", _json_text(path, number, line, column)


def _json_text(path: Path, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        raise ValueError(f"text: {path} line {number} is not JSON: {error}") from None
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"column: {path} line {number} has no text in {column!r}; it has {there}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"text: {path} line {number} has half a character, {half} alone") from None
    return text


def digest(texts: Iterable[str]) -> str:
    """A short fingerprint of texts in their order."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\0")
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Prose:
    """Sentences to hide things in, each a tuple of words, and the plain words that occur in them, sorted."""

    sentences: tuple[tuple[str, ...], ...]
    vocabulary: tuple[str, ...]

    def take(self, start: int, num_words: int) -> list[str]:
        """Sentences from number `start` on, around the end if need be, cut off after `num_words` words."""
        taken = []
        for sentence in itertools.islice(itertools.cycle(self.sentences), start, None):
            if num_words <= 0:
                return taken
            cut = sentence[:num_words]
            taken.append(" ".join(cut) if len(cut) == len(sentence) else " ".join(cut).rstrip(".,;:") + ".")
            num_words -= len(cut)
        raise AssertionError("a cycle does not end")

    def words(self, key: str) -> Iterator[str]:
        """Different words in an order that `key` decides: the vocabulary, then pairs of its words."""
        order = list(self.vocabulary)
        random.Random(key).shuffle(order)
        yield from order
        for shift in range(1, len(order)):
            yield from (f"{word}-{order[index - shift]}" for index, word in enumerate(order))

    def num_words(self) -> int:
        """Words before the text repeats."""
        return sum(map(len, self.sentences))


def prose_of(texts: Iterable[str]) -> Prose:
    """The plain sentences of `texts`: code, tables, headings and copies are left out.

    Raises:
        ValueError: if too little is left to make questions of.
    """
    sentences: dict[tuple[str, ...], None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                if _is_plain(sentence):
                    sentences[tuple(sentence.split())] = None
    vocabulary = sorted({word for s in sentences for word in s if PLAIN_WORD.fullmatch(word)})
    if len(sentences) < MIN_SENTENCES or len(vocabulary) < MIN_VOCABULARY:
        raise ValueError(
            f"haystack: {len(sentences)} plain sentences with {len(vocabulary)} different words; "
            f"at least {MIN_SENTENCES} with {MIN_VOCABULARY} are needed"
        )
    return Prose(tuple(sentences), tuple(vocabulary))


def _is_plain(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        sentence[:1].isupper()
        and sentence[-1] in ".!?"
        and 5 <= sentence.count(" ") + 1 <= 60
        and letters >= 0.9 * len(sentence)
    )
