"""What a wheel holds: the embedded model, the model card's template, the flat model folder, and conversion/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "nemotron_h_hf"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the sources, with no network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "src").mkdir()
    shutil.copy(ROOT / "src" / "nemotron_h_cli.py", source / "src")
    shutil.copytree(PACKAGE, source / "src" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conversion", source / "conversion", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True, capture_output=True, timeout=120)
    (wheel,) = target.glob("nemotron_h_hf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_asset(wheel_names):
    assets = {
        f"nemotron_h_hf/{p.relative_to(PACKAGE).as_posix()}" for p in (PACKAGE / "assets").rglob("*") if p.is_file()
    }
    assert "nemotron_h_hf/assets/nemotron-h-tiny/model.safetensors" in assets
    assert "nemotron_h_hf/assets/model_card_template.md" in assets
    assert assets <= wheel_names


def test_wheel_holds_every_module(wheel_names):
    modules = {f"nemotron_h_hf/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py")}
    modules |= {f"nemotron_h_hf/conversion/{p.name}" for p in (ROOT / "conversion").glob("*.py")}
    assert {"nemotron_h_hf/model/modeling_nemotron_h.py", "nemotron_h_hf/conversion/convert.py"} <= modules
    assert {*modules, "nemotron_h_cli.py"} <= wheel_names


def test_wheel_holds_nothing_else(wheel_names):
    others = {
        name for name in wheel_names if not name.startswith(("nemotron_h_hf/", "nemotron_h_hf-", "nemotron_h_cli.py"))
    }
    assert others == set()
