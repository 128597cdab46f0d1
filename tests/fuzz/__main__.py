"""Mutate, run, judge, count.

python -m fuzz --count 2500 --seed 0             # all areas; exit status 1 if anything was silent, bare or a hang
python -m fuzz --area headers --count 100
python -m fuzz --area headers --only 17          # one mutation again, with what it said
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .areas import AREAS, Area
from .judge import judge

SHARES = {"headers": 5, "index": 2, "config": 5, "manifest": 3, "megatron": 4, "caches": 3, "trainer": 2, "data": 4,
          "tokenizers": 2, "commands": 5}  # fmt: skip
FAULTS = ("silent", "bare", "hang")


def main() -> int:
    """Print the counts per area; 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2500, help="mutations in total (2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", choices=AREAS, action="append", help="only this one; may be given several times")
    parser.add_argument("--only", type=int, help="only the mutation of this number")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    wanted = arguments.area or list(AREAS)
    total = sum(SHARES[name] for name in wanted)
    faults = 0
    for name in wanted:
        count = round(arguments.count * SHARES[name] / total)
        numbers = range(count) if arguments.only is None else [arguments.only]
        counts, found = fuzz(name, arguments.seed, numbers)
        print(row(name, counts), flush=True)
        faults += len(found)
        print("".join(f"    {line}\n" for line in found), end="", flush=True)
    return 1 if faults else 0


def fuzz(name: str, seed: int, numbers) -> tuple[Counter, list[str]]:
    """Counts of the verdicts on these mutations of one area, and a line for each fault."""
    area: Area = AREAS[name]()
    counts, faults, begun = Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        area.prepare(whole)
        first = Path(temporary, "first")
        shutil.copytree(whole, first)
        result = area.read(first)
        for number in numbers:
            rng = random.Random(f"{seed} {name} {number}")
            folder = Path(temporary, f"m{number}")
            shutil.copytree(whole, folder)
            what = area.damage(rng, folder)
            verdict = judge(lambda: area.read(folder), area.expected(folder, result), area.names(folder, what))  # noqa: B023
            counts[verdict.kind] += 1
            if verdict.kind in FAULTS or len(numbers) == 1:
                faults.append(f"{name} {number} {verdict.kind}: {what}: {verdict.said:.400}")
            shutil.rmtree(folder)
    counts["seconds"] = round(time.monotonic() - begun)
    return counts, faults


def row(name: str, counts: Counter) -> str:
    """One line of the table."""
    kinds = ("clear", "right", *FAULTS, "seconds")
    return f"{name:<12}" + "".join(f"{kind} {counts[kind]:<7}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
