"""The folder of an evaluation: what was asked for, and a line for every finished sample; a run can resume.

claim(folder, "arguments.json", {...})      # writes it, or refuses a folder of another evaluation
records = Records(folder / "samples.jsonl") # finished samples; a line cut short by a crash is dropped
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..inputs import read_json
from ..output_folders import is_empty
from ..whole_files import write_json, write_text


def claim(folder: Path, name: str, content: dict) -> None:
    """Keep `content` in a file, or check that the file there says the same.

    Raises:
        ValueError: naming what differs, or that the folder holds something else.
    """
    path = folder / name
    content = json.loads(json.dumps(content))
    if path.is_file():
        before = read_json(path)
        for field in dict.fromkeys([*before, *content]):
            if before.get(field) != content.get(field):
                raise ValueError(
                    f"{field}={content.get(field)!r}: allowed is {before.get(field)!r}, which the evaluation in {folder} "
                    "was begun with, or another --output"
                )
        return
    write_json(path, content)


def check_folder(folder: Path, marker: str) -> None:
    """Refuse a folder with files that no evaluation wrote."""
    if folder.is_dir() and not is_empty(folder) and not (folder / marker).is_file():
        raise ValueError(f"output: {folder} is not empty and holds no evaluation; give another folder")


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    """An object per line; what JSON has no form for is written as text."""
    write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


class Records:
    """Records by key, kept in a JSONL file that only grows; each is on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, dict] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                self.by_key[row["key"]] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path} line {number} is damaged; remove the line to have it done again"
                ) from None

    def add(self, key: str, record: dict) -> None:
        """Keep a record under a new key."""
        row = json.loads(json.dumps({"key": key, **record}, default=str))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.by_key[key] = row

    def __contains__(self, key: str) -> bool:
        return key in self.by_key

    def __getitem__(self, key: str) -> dict:
        return self.by_key[key]
