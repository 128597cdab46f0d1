"""A generated parent of 0.7 GB: memory stays with the largest tensor when cutting, with the small model when loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).parents[2] / "experiments" / "elastic_cut" / "measure.py"
ROOM_BYTES = 64 * 2**20  # pieces, threads and the allocator's leftovers


@pytest.mark.slow
def test_peak_memory_and_bytes_read(tmp_path):
    command = [sys.executable, MEASURE, "--gigabytes", "0.7", "--folder", tmp_path]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    steps, small, parent = result["steps"], result["small_bytes"], result["parent_bytes"]
    assert parent > 3e8 and small < parent / 2
    assert steps["slice"]["peak_bytes"] < result["largest_tensor_bytes"] + ROOM_BYTES
    assert steps["load_budget"]["peak_bytes"] < 1.1 * small + ROOM_BYTES
    assert steps["load_parent"]["peak_bytes"] > parent  # what is measured is the memory of weights
    for step in ("slice", "load_budget"):
        assert small < steps[step]["bytes_read"] < 0.8 * parent
        assert steps[step]["read_by_process"] < steps[step]["bytes_read"] + 2 * 8192 * 200 + 2**23
