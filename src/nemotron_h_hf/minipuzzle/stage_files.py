"""The files of the stages: each says what it was made from, is written whole, and is not made twice.

A stage that is under way keeps what it has in .NAME.partial.json. `made_from` holds the arguments that the result depends on
and a digest of the stage before; a file made from something else is refused, never replaced.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..inputs import read_json
from ..output_folders import fingerprint
from ..whole_files import write_json

SAVE_SECONDS = 20.0


@dataclass
class Stage:
    """One of them, in the folder `work`."""

    work: Path
    name: str
    made_from: dict[str, Any]
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.made_from = json.loads(json.dumps(self.made_from, default=str))

    @property
    def path(self) -> Path:
        """The result."""
        return self.work / f"{self.name}.json"

    @property
    def partial_path(self) -> Path:
        """What there is so far."""
        return self.work / f".{self.name}.partial.json"

    @property
    def digest(self) -> str:
        """For the stage after this one."""
        return fingerprint(self.made_from)[:16]

    def result(self) -> dict[str, Any] | None:
        """What the stage found, if it is done.

        Raises:
            ValueError: if its file was made from something else: which argument, and both values.
        """
        return self._read(self.path)

    def partial(self) -> dict[str, Any]:
        """What an interrupted run kept; {} if nothing."""
        return self._read(self.partial_path) or {}

    def keep(self, now: bool = False, **content: Any) -> None:
        """Write what there is so far, unless that was done some seconds ago."""
        if now or time.monotonic() - self._saved > SAVE_SECONDS:
            write_json(self.partial_path, {"made_from": self.made_from, **content})
            self._saved = time.monotonic()

    def finish(self, **content: Any) -> dict[str, Any]:
        """Write the result; what was kept on the way is not needed any more."""
        write_json(self.path, {"made_from": self.made_from, **content})
        self.partial_path.unlink(missing_ok=True)
        return json.loads(json.dumps(content, default=str))

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        found = read_json(path)
        before = found.pop("made_from", None)
        if not isinstance(before, dict):
            raise ValueError(f"{path} is not a file of this command; give another work folder")
        for name in dict.fromkeys([*self.made_from, *before]):
            if before.get(name) != self.made_from.get(name):
                what = "what the stages before it found" if name == "after" else name
                now, then = told(self.made_from.get(name), before.get(name))
                raise ValueError(f"{what}={now}: allowed is {then}, which {path} was made with, or another work folder")
        return found


def told(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ, for people; of files with sizes and times the first that the other lacks."""

    def first(value: Any, others: Any) -> Any:
        stamps = isinstance(value, list) and all(isinstance(entry, list) for entry in value)
        return next((entry for entry in value if entry not in (others or [])), value) if stamps else value

    return repr(first(one, other)), repr(first(other, one))
