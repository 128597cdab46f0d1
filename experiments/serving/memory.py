"""Memory of three budgets that answer at once from one image, against three processes with one model each.

    python experiments/serving/memory.py

A parent of more than 1 GB with random weights is written to a temporary folder, and each budget is cut out of it. What counts
is the resident memory (RSS) of the processes beyond that of one which serves a tiny model, while rows of all budgets run:
libraries are in both, whoever else shares them. Writes docs/results/serving/memory.json. Linux.
"""

import argparse
import gc
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from nemotron_h_hf import NemotronHConfig, NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.environment import machine, status_bytes, versions
from nemotron_h_hf.serving.engine import Engine
from nemotron_h_hf.serving.requests import Request

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "serving"
BUDGETS = {
    "large": {"hidden_size": 1024, "mamba_num_heads": 32, "num_attention_heads": 16, "intermediate_size": 4096},
    "small": {"hidden_size": 768, "mamba_num_heads": 24, "num_attention_heads": 12, "intermediate_size": 3072},
}
PARENT = {
    "vocab_size": 24576, "hidden_size": 1280, "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-", "intermediate_size": 5120,
    "mamba_num_heads": 40, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 64, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": 64, "elastic": {"version": 1, "budgets": BUDGETS},
}  # fmt: skip
NAMES = (None, *BUDGETS)
ROWS, PROMPT, TOKENS = 2, 64, 16


def main() -> None:
    """Measure both and write the report."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        sizes = in_process(context, write, folder)
        baseline = in_process(context, rss_of_little)
        one = in_process(context, measure, folder, NAMES)
        apart = [in_process(context, measure, f"{folder}/{name or 'parent'}", (None,)) for name in NAMES]
    report = {
        "command": "python experiments/serving/memory.py", "machine": machine(), "versions": versions(),
        "rows_of_each_budget": ROWS, "prompt_tokens": PROMPT, "new_tokens": TOKENS, "weights_bytes": sizes,
        "process_with_a_tiny_model": baseline, "one_image": one, "three_processes": apart,
        "one_image_over_parent_weights_and_caches": ratio(one["rss"] - baseline, sizes["parent"] + one["cache_bytes"]),
        "image_and_extra_over_parent_weights": ratio(one["image_bytes"] + one["extra_bytes"], sizes["parent"]),
        "three_processes_over_one_image": ratio(sum(it["rss"] - baseline for it in apart), one["rss"] - baseline),
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def ratio(a: float, b: float) -> float:
    """Rounded."""
    return round(a / b, 4)


def in_process(context, function, *arguments):
    """Run in a process of its own, which then ends."""
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def write(folder: str) -> dict[str, int]:
    """The parent and its budgets cut out; bytes of weights of each."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**PARENT))
    sizes = {"parent": sum(t.nbytes for t in model.parameters())}
    model.save_pretrained(folder)
    (Path(folder) / "parent").symlink_to(folder, target_is_directory=True)
    for name in BUDGETS:
        small = NemotronHForCausalLM.from_pretrained(folder, budget=name)
        sizes[name] = sum(t.nbytes for t in small.parameters())
        small.save_pretrained(f"{folder}/{name}")
    return sizes


def rss_of_little() -> int:
    """A process that has imported everything and served a tiny model: what computing takes, whatever the model."""
    torch.set_num_threads(1)
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "mamba_num_heads": 8, "mamba_head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "elastic": None}  # fmt: skip
    engine = Engine(NemotronHForCausalLM(NemotronHConfig(**{**PARENT, **small})))
    engine.generate([Request(tokens=list(range(PROMPT)), max_tokens=TOKENS, ignore_eos=True) for _ in range(ROWS)])
    return status_bytes("VmRSS")


def measure(folder: str, names: tuple) -> dict[str, int]:
    """RSS while rows of these budgets run together."""
    torch.set_num_threads(1)
    kind = NemotronHElasticForCausalLM if len(names) > 1 else NemotronHForCausalLM
    engine = Engine(kind.from_pretrained(folder))
    started = time.monotonic()
    done = []
    for index, name in enumerate(names * ROWS):
        prompt = torch.randint(PARENT["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(index)).tolist()
        request = Request(tokens=prompt, budget=name, max_tokens=TOKENS, ignore_eos=True)
        engine.submit(request, lambda piece: done.append(piece))
    highest = {"rss": 0}
    while engine.turn():
        gc.collect()
        status = engine.status()
        if len(status["rows"]) == len(names) and (now := status_bytes("VmRSS")) > highest["rss"]:
            caches = status["cache_bytes"] + status["prefix_bytes"]
            extra = sum(status["extra_bytes"].values())
            highest = {"rss": now, "cache_bytes": caches, "image_bytes": status["image_bytes"], "extra_bytes": extra}
    assert len(done) == TOKENS * len(names) * ROWS
    return {**highest, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
