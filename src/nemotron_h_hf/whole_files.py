"""Files that are there whole or not at all: written under another name in their folder, and moved when they are on the disk."""

import json
import os
from typing import Any

from .model.saving import whole_file

__all__ = ["whole_file", "write_json", "write_text"]


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text file in UTF-8."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """A JSON file; what JSON has no form for is written as text."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")
