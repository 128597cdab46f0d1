"""Our Triton kernels compiled for an H200 without one: they fit the chip, and no length needs its own variant.

What the compiler says is no measurement of speed. Run by `make test-kernels`; see triton_on_paper.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor, for one block
SPILLED_BYTES = 64  # of a thread's registers; a chunk of twice the tokens spills 700 to 900 in the backward pass
MATRIX_KERNELS = {"prepare", "pass_states", "outputs", "input_gradients", "projection_gradients"}
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs Triton and time: `make test-kernels`",
    ),
]


def on_paper(tmp_path: Path, *arguments: str) -> list[dict]:
    """The JSON lines of triton_on_paper.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(TESTS / "triton_on_paper.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_lengths_share_kernels(tmp_path):
    one_length, many_lengths = on_paper(tmp_path, "variants")
    print(many_lengths)
    assert len(one_length) == 10 and many_lengths == one_length


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["8b", "56b"])
def test_kernels_fit_an_h200(tmp_path, shape):
    for kernel in on_paper(tmp_path, "compile", shape):
        print(kernel)
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["stack_bytes"] <= SPILLED_BYTES, kernel
        assert (kernel["tensor_cores"] > 0) == (kernel["kernel"] in MATRIX_KERNELS), kernel
