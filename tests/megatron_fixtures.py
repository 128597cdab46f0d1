"""Real Megatron checkpoints for tests: a handful in tests/fixtures, all where the shared folder is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from nemotron_h_hf.model.weights import Checkpoint

ROOT = Path(__file__).parent.parent
OWN = ROOT / "tests" / "fixtures" / "megatron"
SHARED = ROOT.parent / "shared" / "fixtures" / "megatron"


class Fixture(NamedTuple):
    """One checkpoint, and what it must become."""

    name: str
    root: Path
    row: dict

    @property
    def path(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def config(self) -> dict:
        return json.loads((self.root / self.row["config"]).read_text())

    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / self.row["expected"])


def _all() -> dict[str, Fixture]:
    found = {}
    for root in (OWN, SHARED):
        manifest = root / "MANIFEST.json"
        for row in json.loads(manifest.read_text()) if manifest.is_file() else ():
            found.setdefault(row["name"], Fixture(row["name"], root, row))
    return found


FIXTURES = _all()


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoint in a folder has exactly these tensors: names, dtypes, and every bit."""
    written = Checkpoint(folder)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
