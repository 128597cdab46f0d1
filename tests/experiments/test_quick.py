"""`make evidence-quick`: its commands are there, and the two shortest experiments run."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(FOLDER))
import quick  # noqa: E402

sys.path.remove(str(FOLDER))


def test_every_script_is_there():
    scripts = {command.split()[0] for commands in quick.commands(Path("runs")).values() for command in commands}
    assert len(scripts) > 6 and all((FOLDER / script).is_file() for script in scripts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision", "speculation"])
def test_an_experiment_runs(name, tmp_path):
    command = [sys.executable, FOLDER / "quick.py", "--only", name, "--runs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{name}: ok" in done.stdout, (tmp_path / f"{name}.log").read_text()[-2000:]


def test_a_failure_is_told(tmp_path, capsys):
    assert not quick.run("no_such_script.py --at all", tmp_path / "log")
    assert "no_such_script.py" in (tmp_path / "log").read_text()
