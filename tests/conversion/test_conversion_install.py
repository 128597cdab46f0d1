"""conversion/ is next to src and becomes nemotron_h_hf.conversion once installed, from a wheel and in place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--editable"]], ids=["wheel", "editable"])
def test_installed_package_has_conversion(how, tmp_path):
    """In a fresh environment that sees this one's libraries, but not this one's installation of the package."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "conversion"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (folder,) = environment.glob("lib/python*/site-packages")
    (folder / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", *how, source], check=True, capture_output=True, timeout=120)
    code = "import nemotron_h_hf.conversion as c; print(c.__file__); print(c.convert.__module__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    file, module = done.stdout.split()
    expected = source / "conversion" if how else folder / "nemotron_h_hf" / "conversion"
    assert Path(file).parent == expected and module == "nemotron_h_hf.conversion.convert"
