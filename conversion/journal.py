"""Which output files are finished, so that a conversion that was killed goes on where it stopped.

A line of JSON per finished file, written after the file has its final name. A file that the journal names is checked
against its checksums before it is kept; a file that it does not name is written again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAME = "conversion_journal.jsonl"


class Journal:
    """Finished files of one conversion in one folder.

    Raises ValueError when the folder holds something else than this very conversion, unfinished.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / NAME
        self.done: dict[str, Any] = {}
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            self._append({"fingerprint": fingerprint})
            return
        if not self.path.is_file():
            raise ValueError(f"{folder} is not empty; choose a new folder (nothing in it was touched)")
        header, *lines = self._lines()
        if header.get("fingerprint") != fingerprint:
            raise ValueError(f"{folder} holds another conversion, unfinished; remove it or choose a new folder")
        self.done = {line["file"]: line["record"] for line in lines}

    def add(self, file: str, record: Any) -> None:
        """Note a file that is finished."""
        self._append({"file": file, "record": record})
        self.done[file] = record

    def finish(self) -> None:
        """The conversion is complete: nothing is left to resume."""
        self.path.unlink()

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict]:
        """All whole lines; a last one that was cut off by a crash does not count and is removed."""
        text = self.path.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if not lines:
            return [{}]
        if not text.endswith("\n"):
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines
