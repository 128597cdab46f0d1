"""Reads JSON files; every error names the file."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The content of a JSON file, which has to be an object (or another `kind`).

    Raises:
        ValueError: naming the file, if it is no JSON, no UTF-8, too deep to read or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{path} holds {type(content).__name__} as JSON: allowed is {names.get(kind, kind.__name__)}")
    return content
