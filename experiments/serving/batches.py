"""Decoding in the engine's batches: with the compiled token and op by op, ordinary models and budgets of a parent in memory.

    python experiments/serving/batches.py

Tokens per processor second of the engine's thread, greedy, after prompts of 40 tokens and more (each row 3 longer than the
one before: padded on the left), fp32, one thread. All cases take turns in one process; medians of three. Writes
docs/results/serving/batches.json. Needs the `dev` extra.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from load import RESULTS, parent_of_the_box
from transformers import AutoModelForCausalLM

from nemotron_h_hf import NemotronHElasticForCausalLM
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.serving.engine import Engine
from nemotron_h_hf.serving.requests import Request

ROWS, STEPS = (1, 8), 12


def main() -> None:
    """Measure, and write the report."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place, budgets = parent_of_the_box(Path(folder) / "parent")
        parent = NemotronHElasticForCausalLM.from_pretrained(place, dtype=torch.float32)
        ordinary = {
            name: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, budget=name) for name in budgets
        }
    held = [parent.submodel(name) for name in budgets]  # a parent forgets those that nobody holds
    cases = {}
    for name in (budgets[0], budgets[-1]):
        cases[f"{name}, a model alone, auto"] = (ordinary[name], [None], "auto")
        for words in ("auto", "torch"):
            cases[f"{name}, in the parent, {words}"] = (parent, [name], words)
    cases |= {f"all budgets at once, {words}": (parent, budgets, words) for words in ("auto", "torch")}
    speeds = {name: {str(rows): [] for rows in ROWS} for name in cases}
    for _ in range(4):
        for name, case in cases.items():
            for rows in ROWS:
                speeds[name][str(rows)].append(speed(*case, rows))
    medians = {
        name: {rows: [round(f(it[1:])) for f in (statistics.median, min, max)] for rows, it in of.items()}
        for name, of in speeds.items()
    }
    assert len(held) == len(budgets)
    report = {
        "command": "python experiments/serving/batches.py", "machine": machine(), "versions": versions(),
        "load_average": os.getloadavg(), "tokens_per_processor_second: rows of each budget -> median, least, most": medians,
    }  # fmt: skip
    for name, it in medians.items():
        print(name, it)
    (RESULTS / "batches.json").write_text(json.dumps(report, indent=1) + "\n")


def speed(model, budgets, words, rows) -> float:
    """Of so many rows of each budget."""
    for one in [model, *(model.submodel(name) for name in budgets if name is not None)]:
        one.set_mamba_implementation(words)
    engine, generator = Engine(model, max_batch=64), torch.Generator().manual_seed(0)
    for i in range(rows * len(budgets)):
        tokens = torch.randint(5, 2000, (40 + 3 * (i // len(budgets)),), generator=generator).tolist()
        budget = budgets[i % len(budgets)]
        request = Request(tokens=tokens, budget=budget, max_tokens=300, temperature=0, ignore_eos=True)
        engine.submit(request, lambda piece: None)
    while engine.reading or engine.waiting:
        engine.turn()
    started = time.thread_time()
    for _ in range(STEPS * len(budgets)):
        engine.turn()
    took = time.thread_time() - started
    for job in engine.running:
        job.cancel()
    engine.turn()
    return rows * len(budgets) * STEPS / took


if __name__ == "__main__":
    main()
