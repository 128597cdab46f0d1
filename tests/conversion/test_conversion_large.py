"""A generated 4 GB checkpoint: memory stays with the largest tensor, not with the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).parents[2] / "experiments" / "conversion" / "measure.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_of_four_gigabytes(tmp_path):
    """Each step in its own process; its speed is in docs/results, since a test's machine may be busy."""
    command = [sys.executable, MEASURE, "--gigabytes", "4", "--rounds", "1", "--folder", tmp_path]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["bytes"] > 3.5e9 and result["largest_tensor_bytes"] < 3e8
    for step in ("megatron_to_hf", "hf_to_megatron"):
        assert result["peak_over_largest_tensor"][step] < 3
