"""Text that every Python has: the standard library's sources and its language reference, split for training.

A document is one `*.py` file of the standard library, or one topic of `pydoc_data/topics.py` (the reference text
that `help("while")` prints). Left out: installed packages, the generated code tables of `encodings/`, files that are
not UTF-8 and exact copies. The split hashes each document's name, so it depends on neither order nor machine, and a
held-out document that repeats much of the training text is dropped from the measurement.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "ensurepip", "encodings", "pydoc_data", "__pycache__"}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_LINE_CHARS = 24  # shorter lines ("return None") say nothing about copying


@dataclass(frozen=True)
class Document:
    """One text with the name (a path relative to the library's folder) that decides its side of the split."""

    name: str
    text: str


def read_documents(root: Path | None = None) -> list[Document]:
    """All documents under `root` (default: this Python's standard library), sorted by name, copies removed."""
    root = root or Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise ValueError(f"root: {root} is not a folder; give the standard library's folder")
    seen: set[str] = set()
    documents = []
    for document in sorted([*_source_files(root), *_reference_topics(root)], key=lambda d: d.name):
        if document.text.strip() and document.text not in seen:
            seen.add(document.text)
            documents.append(document)
    return documents


def split_documents(documents: list[Document], held_out_share: float = 0.03) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents; the name's hash decides, so adding a document moves no other."""
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share={held_out_share}: allowed is a number between 0 and 1")
    train, held_out = [], []
    for document in documents:
        (held_out if _name_hash(document.name) < held_out_share else train).append(document)
    return train, drop_leaks(train, held_out)


def drop_leaks(train: list[Document], held_out: list[Document], max_shared: float = 0.25) -> list[Document]:
    """The held-out documents with at most `max_shared` of their (long enough) lines anywhere in the training text."""
    known = {line for document in train for line in _long_lines(document.text)}
    return [d for d in held_out if _shared_share(list(_long_lines(d.text)), known) <= max_shared]


def corpus_digest(documents: list[Document]) -> str:
    """A short fingerprint of names and texts: two machines with the same digest train on the same bytes."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def as_jsonl(documents: list[Document]) -> str:
    """One document per line, `{"text": ...}`, as the training commands read it."""
    return "".join(json.dumps({"text": document.text}) + "\n" for document in documents)


def _source_files(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                yield Document(relative.as_posix(), path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue  # a few test files are in other encodings on purpose


def _reference_topics(root: Path) -> Iterator[Document]:
    path = root / TOPICS_FILE
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(f"{TOPICS_FILE}#{topic}", text)


def _name_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _long_lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if len(line.strip()) >= MIN_LINE_CHARS)


def _shared_share(lines: list[str], known: set[str]) -> float:
    return sum(line in known for line in lines) / max(len(lines), 1)
