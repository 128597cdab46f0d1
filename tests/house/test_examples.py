"""Every example runs, in its own process, without reaching for a download."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))

QUICK = ("generate", "share_a_prompt")  # the others are slow tests
MARKED = [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in EXAMPLES]


@pytest.mark.parametrize("example", MARKED, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example leaves files behind"
