"""Products of few rows with a matrix on a CPU, fp32: torch's linear against the same in parts, one for each thread (linear.py).

    python experiments/few_rows/measure.py        # few_rows.json in docs/results/few_rows; about a minute

So many matrices take turns that none is in a cache. Milliseconds, medians of nine rounds.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.model.linear import product_in_parts

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "few_rows"

SIZES = ((4096, 1024), (1024, 4096), (32000, 1024))
ROWS = (1, 2, 4, 8, 16, 64, 128)
BYTES = 400 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    found = []
    for n, k in SIZES:
        weights = [torch.randn(n, k) for _ in range(max(2, BYTES // (4 * n * k)))]
        for rows in ROWS:
            x = torch.randn(rows, k)
            ways = {
                "linear": lambda weight, x=x: torch.nn.functional.linear(x, weight),
                "parts": lambda weight, x=x: product_in_parts(x, weight, None, threads),
            }
            times = milliseconds(ways, weights)
            found.append(
                {"n": n, "k": k, "rows": rows, **times, "speed_up": round(times["linear"] / times["parts"], 2)}
            )
            print(found[-1], flush=True)
    document = {"threads": threads, "machine": {**machine(), "architecture": platform.machine()}, "versions": versions(),
                "milliseconds": found}  # fmt: skip
    (RESULTS / "few_rows.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def milliseconds(ways: dict[str, Callable[[Tensor], Tensor]], weights: list[Tensor]) -> dict[str, float]:
    """The median of each way, interleaved."""
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(10):
        for way, product in ways.items():
            start = time.perf_counter()
            for weight in weights:
                product(weight)
            samples[way].append((time.perf_counter() - start) / len(weights))
    return {way: round(1e3 * median(times[1:]), 3) for way, times in samples.items()}


if __name__ == "__main__":
    main()
