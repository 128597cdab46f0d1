"""Questions and answers out of the standard library: a function's signature, and the first line of its docstring.

    python experiments/sft/make_data.py --output runs/docstrings

writes train.jsonl, validation.jsonl (for choosing a learning rate) and held_out.jsonl, one conversation per line, and
facts.json. The split is by file. held_out are the files that the embedded model has never seen: those of
data/stdlib_text.py, so the same as for its bits per byte; validation is a share of the others, by the hash of their names.
The same Python version gives the same bytes.
"""

import argparse
import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemotron_h_hf.data.stdlib_text import Document, corpus_digest, read_documents, split_documents

VALIDATION_SHARE = 0.04
ANSWER_CHARS = range(10, 121)
QUESTION_CHARS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    folder = parser.parse_args().output
    train, held_out = split_documents(read_documents())
    train, validation = without_share(train, VALIDATION_SHARE)
    parts = {"train": list(records(train))}
    known = set(parts["train"])
    for name, documents in (("validation", validation), ("held_out", held_out)):
        parts[name] = [record for record in records(documents) if record not in known]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(map(as_line, found)), encoding="utf-8")
    facts = {
        "python": platform.python_version(),
        "training_text_digest": corpus_digest(train + validation),
        "records": {name: len(found) for name, found in parts.items()},
        "files": {"train": len(train), "validation": len(validation), "held_out": len(held_out)},
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts))


def without_share(documents: Iterable[Document], share: float) -> tuple[list[Document], list[Document]]:
    """The documents, and a share of them apart, drawn by the hash of the name."""
    kept, apart = [], []
    for document in documents:
        digest = hashlib.sha256(f"validation {document.name}".encode()).digest()
        (apart if int.from_bytes(digest[:8], "big") / 2**64 < share else kept).append(document)
    return kept, apart


def records(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """(signature, first line of the docstring) of all functions with one, each pair once."""
    seen = set()
    for document in documents:
        for record in functions_of(document):
            if record not in seen:
                seen.add(record)
                yield record


def functions_of(document: Document) -> Iterator[tuple[str, str]]:
    """The pairs of one file, in its order; nothing of a file that is no Python of this version."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    owners = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            question, answer = signature(node, owners.get(node)), docstring.strip().partition("\n")[0].strip()
            if len(answer) in ANSWER_CHARS and len(question) <= QUESTION_CHARS and ">>>" not in answer:
                yield question, answer


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str | None) -> str:
    """`def name(arguments):`, under `class Owner:` for a method, as the file would have it but for line breaks."""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"
    return f"class {owner}:\n    {line}" if owner else line


def as_line(record: tuple[str, str]) -> str:
    question, answer = record
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


if __name__ == "__main__":
    main()
