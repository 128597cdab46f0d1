"""llama.cpp on the same weights, through llama-cpp-python, where it is installed and GGUF files are given.

`experiments/int8/write_gguf.py` writes such files. Keys and values are held in the type that llama.cpp chooses.
"""

import time
from importlib.util import find_spec
from pathlib import Path

import torch

from .gate import random_ids
from .jobs import WARM_STEPS
from .models import Side
from .records import Measurement
from .turns import Bench, Job

SIDE = "llama.cpp"


def check(paths: list[Path]) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: without llama-cpp-python, and for paths that are no files.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--gguf {path}: allowed are GGUF files; experiments/int8/write_gguf.py writes them")
    if paths and find_spec("llama_cpp") is None:
        raise ValueError("--gguf: needs llama-cpp-python (pip install llama-cpp-python)")


def decode(bench: Bench, side: Side, path: Path, context: int, steps: int) -> Job:
    """As `jobs.decode` of one row of `side`."""
    found, held = Measurement("decode", SIDE, path.stem, 1, context), []

    def prepare() -> float:
        start = time.perf_counter()
        held.append(_load(path, 1 << 17))
        held[0].eval(random_ids(side.model, 1, context)[0].tolist())
        return time.perf_counter() - start

    def sample() -> list[float]:
        """Each round goes on where the last one ended."""
        seconds = [_eval(held[0], [3]) for _ in range(steps + WARM_STEPS)]
        return seconds[WARM_STEPS:]

    return Job(found, sample, prepare, lambda found: {"tokens_per_second": 1 / found.median})


def prompt(bench: Bench, side: Side, path: Path, length: int) -> Job:
    """As `jobs.prefill_prompts` of one row."""
    found, held = Measurement("prefill", SIDE, path.stem, 1, length), []
    ids = random_ids(side.model, 1, length)[0].tolist()

    def read() -> float:
        held[0].reset()
        return _eval(held[0], ids)

    def prepare() -> float:
        held.append(_load(path, length + 8))
        return read()

    return Job(found, lambda: [read()], prepare, lambda found: {"tokens_per_second": length / found.median})


def _load(path: Path, room: int) -> object:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    return Llama(str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False)


def _eval(model: object, ids: list[int]) -> float:
    start = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - start
