"""Threads of compiled loops: torch's number, one for little work, the faster of one and all; the same bits by any number."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("numba")

from nemotron_h_hf.model import numba_compile, numba_loops, numba_run  # noqa: E402
from nemotron_h_hf.model.numba_compile import MOST_PATIENCE, SMALL_BYTES, Kernel, Seconds  # noqa: E402


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What a kernel was called as, with two threads in torch and in Numba."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(numba_compile.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(numba_compile, "set_num_threads", lambda number: None)
    yield []
    torch.set_num_threads(before)


def noting(calls: list[str]) -> Kernel:
    return Kernel(lambda part, parts: calls.append("one"), lambda parts: calls.append(f"all {parts}"))


@pytest.mark.parametrize("num_bytes, threads", [(2**30, 1), (SMALL_BYTES - 1, 2)])
def test_one_thread_where_torch_has_one_and_for_little_work(num_bytes, threads, calls):
    torch.set_num_threads(threads)
    kernel = noting(calls)
    for _ in range(8):
        kernel(num_bytes)
    assert calls == ["one"] * 8


def test_both_ways_are_compiled_then_measured(calls):
    kernel = noting(calls)
    for _ in range(4):
        kernel(SMALL_BYTES)
    assert calls == ["one", "one", "all 2", "all 2"]


def test_a_forked_child_has_one_thread(calls, monkeypatch):
    monkeypatch.setattr(numba_compile, "is_forked", lambda: True)
    kernel = noting(calls)
    for _ in range(4):
        kernel(2**30)
    assert calls == ["one"] * 4


def test_numba_has_the_threads_that_torch_has(tmp_path):
    """In a process of its own: Numba reads how many there are at most when it is imported."""
    lines = """
import numba, numpy as np, torch
from nemotron_h_hf.model.numba_compile import Kernel, compiled, compiled_for_threads
from nemotron_h_hf.model.numba_loops import pointer, prange

@compiled
def note(address, part, parts):
    numba.carray(pointer(address), parts, np.int64)[part] = numba.get_thread_id()

@compiled_for_threads
def who(address, parts):
    for part in prange(parts):
        note(address, part, parts)

for threads in (3, 2, 4):
    torch.set_num_threads(threads)
    seen = torch.zeros(threads, dtype=torch.int64)
    Kernel(None, who)._call_all(threads, (seen.data_ptr(),))
    print(len(set(seen.tolist())), torch.get_num_threads())
torch.set_num_threads(1)
numba.get_num_threads()
print(torch.get_num_threads())
"""
    script = tmp_path / "who.py"  # Numba wants a file
    script.write_text(lines)
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280, env=environment)
    assert done.stdout.split("\n")[:4] == ["3 3", "2 2", "4 4", "1"], done.stdout + done.stderr


def test_the_faster_way_is_taken_and_the_slower_one_tried_less_and_less():
    seconds, calls = Seconds(), [0, 0]
    for _ in range(4 * MOST_PATIENCE):
        choice = seconds.choose()
        calls[choice] += 1
        seconds.took(choice, (1.0, 3.0)[choice])
    assert calls[0] > 4 * MOST_PATIENCE - 16


def test_a_machine_that_becomes_busy_and_quiet_again():
    seconds = Seconds()

    def calls_of_all(took: tuple[float, float], count: int) -> int:
        number = 0
        for _ in range(count):
            choice = seconds.choose()
            number += choice
            seconds.took(choice, took[choice])
        return number

    assert calls_of_all((1.0, 0.6), 1000) > 980
    calls_of_all((1.0, 5.0), 50)
    assert calls_of_all((1.0, 5.0), 1000) < 20
    calls_of_all((1.0, 0.6), 2 * MOST_PATIENCE)
    assert calls_of_all((1.0, 0.6), 1000) > 980


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(rows, dtype):
    torch.manual_seed(rows)
    linear, x = nn.Linear(96, 203, dtype=dtype), torch.randn(rows, 96).to(dtype)
    inputs, outputs = x.float(), []
    for parts in (1, 2, 3, 7):
        y = torch.full((rows, 203), torch.nan)
        which, _, ints, reals = numba_run.product_of(inputs, numba_run.factor_of(linear.weight), y)
        for part in range(parts):
            numba_loops.part_of(which, np.array(ints, np.int64), np.array(reals), part, parts)
        outputs.append(y)
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    exact = x.double() @ linear.weight.double().T
    assert (outputs[0].double() - exact).abs().max() <= 1e-5


def test_copies_of_the_code_share_what_is_compiled(tmp_path, monkeypatch):
    """As checkpoints with code bring them: equal text, one folder; another text, another."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = Path(numba_compile.__file__).parent
    found = []
    for name in ("a", "b", "changed"):
        copied = tmp_path / name
        copied.mkdir()
        for file in folder.glob("numba_*.py"):
            shutil.copy(file, copied)
        if name == "changed":
            with open(copied / "numba_run.py", "a") as file:
                file.write("# more\n")
        monkeypatch.setattr(numba_compile, "__file__", str(copied / "numba_compile.py"))
        found.append(numba_compile._sources.__wrapped__())
    assert found[0] == found[1] != found[2]
    assert (found[0] / "numba_loops.py").read_bytes() == (folder / "numba_loops.py").read_bytes()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "a" / "numba_run.py"))  # no folder
    assert numba_compile._sources.__wrapped__() is None
    code = numba_loops.exponential.py_func.__code__
    assert Path(code.co_filename).parent == numba_compile._sources()
