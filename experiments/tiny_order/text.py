"""The text that the published figures of docs/results/tiny are of, in one file that travels: the library of Python 3.11.7.

python experiments/tiny_order/text.py --output .carry/stdlib.jsonl.xz      # under that Python
"""

import argparse
import json
import lzma
from pathlib import Path

from nemotron_h_hf.data.stdlib_text import Document, corpus_digest, read_documents, split_documents
from nemotron_h_hf.whole_files import whole_file

FINGERPRINT = "dea04122fc419182"  # of the 1,645 training documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".carry/stdlib.jsonl.xz"))
    output = parser.parse_args().output
    train, held_out = split_documents(read_documents())
    rows = [{"part": "train", **vars(document)} for document in train]
    rows += [{"part": "held_out", **vars(document)} for document in held_out]
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as part:
        Path(part).write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    print(f"{output}: {len(train):,} and {len(held_out)} documents, fingerprint {corpus_digest(train)}")


def load(path: Path) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    Raises:
        ValueError: for the text of another Python.
    """
    parts: dict[str, list[Document]] = {"train": [], "held_out": []}
    for line in lzma.decompress(path.read_bytes()).splitlines():
        row = json.loads(line)
        parts[row["part"]].append(Document(row["name"], row["text"]))
    if (found := corpus_digest(parts["train"])) != FINGERPRINT:
        raise ValueError(f"text: {path} has the fingerprint {found}, allowed is {FINGERPRINT}")
    return parts["train"], parts["held_out"]


if __name__ == "__main__":
    main()
