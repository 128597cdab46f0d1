"""What a live budget costs: memory of a process beyond its parent, and speed compared with the same model cut out and loaded alone.

    python experiments/elastic_sharing/run.py --rounds 5 --threads 2 --tokens 20
    python experiments/elastic_sharing/run.py --rounds 2 --threads 2 --prompt 32 --tokens 8 --dtype bfloat16 --output bfloat16.json

A parent of more than 1 GB with random weights is written to a temporary folder. Memory: a separate process loads it, runs
it, and then takes one submodel after the other, all kept alive; what counts is how far the proportional set size (PSS) of
the process rises by each, after that submodel has run too. Speed: submodel and separate model take turns in one process,
at every prompt and every token, and the ratio is that of the medians: of CPU seconds, which other work on the machine
disturbs least, and of the clock's. Writes --output in docs/results/elastic_sharing. Linux.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters, weight_bytes
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.resolve import resolve

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "elastic_sharing"

PARENT = {
    "vocab_size": 24576, "hidden_size": 1280, "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-", "intermediate_size": 5120,
    "mamba_num_heads": 40, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 64, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
BUDGETS = {
    "width 80%": {"hidden_size": 1024, "mamba_num_heads": 32, "num_attention_heads": 16, "intermediate_size": 4096},
    "width 60%": {"hidden_size": 768, "mamba_num_heads": 24, "num_attention_heads": 12, "intermediate_size": 3072},
    "channels": {"hidden_size": 768, "mamba_num_heads": 24, "mamba_head_dim": 48, "intermediate_size": 2560},
    "depth": {"layers": [0, 1, 2, 3, 4, 5, 8, 10, 11, 14, 15, 16], "intermediate_size": 4096},
}


def main() -> None:
    """Measure both and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 8), ("threads", 1), ("prompt", 256), ("tokens", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", default="sharing.json")
    sizes = vars(parser.parse_args())
    command = "python experiments/elastic_sharing/run.py " + " ".join(f"--{k} {v}" for k, v in sizes.items())
    output, dtype = (
        RESULTS / sizes.pop("output"),
        sizes.pop("dtype"),
    )
    config = NemotronHConfig(**PARENT, elastic={"version": 1, "budgets": BUDGETS}, dtype=dtype)
    report = {
        "command": command,
        "what": "PSS of a process before and after each submodel; seconds of submodel and separate model, interleaved",
        "parent": PARENT, "parent_parameters": num_parameters(config), "parent_bytes": weight_bytes(config, dtype),
        "budgets": BUDGETS, **sizes, "torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        apart(write_parent, folder, config)
        report["memory"] = apart(measure_memory, folder, sizes["threads"])
        report["speed"] = {}
        for name in BUDGETS:
            report["speed"][name] = apart(measure_speed, folder, name, **sizes)
            print(name, json.dumps(report["speed"][name]), flush=True)
            output.write_text(json.dumps(report, indent=2) + "\n")


def apart(function, *args, **kwargs):
    """The result of a function in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def write_parent(folder: str, config: NemotronHConfig) -> None:
    """Fresh weights as an ordinary checkpoint."""
    torch.manual_seed(0)
    NemotronHForCausalLM(config).to(config.dtype).save_pretrained(folder)


def measure_memory(folder: str, threads: int) -> dict:
    """PSS of this process with the parent alone, then with each submodel more."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    parent = NemotronHElasticForCausalLM.from_pretrained(folder).eval()
    work(parent), work(parent)
    before = alone = pss_bytes()
    dtype = str(parent.dtype).removeprefix("torch.")
    whole = weight_bytes(parent.config, dtype)
    report, alive = {"process_with_parent_bytes": alone, "parent_weight_bytes": whole, "budgets": {}}, []
    for name, budget in read_elastic(parent.config).budgets.items():
        alive.append(parent.submodel(name))
        work(alive[-1])
        now = pss_bytes()
        child = weight_bytes(resolve(parent.config, budget).config, dtype)
        report["budgets"][name] = {
            "extra_bytes": now - before, "extra_share_of_parent_weights": round((now - before) / whole, 5),
            "own_weight_bytes": child, "extra_share_of_own_weights": round((now - before) / child, 5),
            "computed": alive[-1].shared_bytes(),
        }  # fmt: skip
        before = now
    report["all_budgets_share_of_parent_weights"] = round((before - alone) / whole, 5)
    print(json.dumps(report, indent=2), flush=True)
    return report


def measure_speed(folder: str, name: str, rounds: int, threads: int, prompt: int, tokens: int) -> dict:
    """Seconds of prefill and of decoding: the submodel, and the same model cut out, saved and loaded alone."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    parent = NemotronHElasticForCausalLM.from_pretrained(folder).eval()
    shared = parent.submodel(name)
    with tempfile.TemporaryDirectory() as cut:
        shared.save_pretrained(cut)
        separate = NemotronHForCausalLM.from_pretrained(cut).eval()
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    sides = {"shared": shared, "separate": separate}
    samples = {
        "prefill": in_turns(sides, lambda model: prefill(model, ids), rounds),
        "decode": {"shared": [], "separate": []},
    }
    for _ in range(3):
        caches = {side: prefill(model, ids) for side, model in sides.items()}
        token, both = ids[:, :1], {side: (model, caches[side]) for side, model in sides.items()}
        steps = in_turns(both, lambda pair: pair[0](token, cache=pair[1]), tokens)  # noqa: B023
        for side in sides:
            samples["decode"][side] += steps[side]
    difference = float((work(shared, ids) - work(separate, ids)).abs().max())
    medians = {
        job: {side: {kind: statistics.median(times[kind] for times in rows) for kind in ("cpu", "wall")}
              for side, rows in by.items()} for job, by in samples.items()
    }  # fmt: skip
    ratios = {
        job: {kind: round(by["shared"][kind] / by["separate"][kind], 4) for kind in ("cpu", "wall")}
        for job, by in medians.items()
    }
    return {"shared_to_separate": ratios, "max_logit_difference": difference, "median_seconds": medians,
            "samples": {job: len(by["shared"]) for job, by in samples.items()}}  # fmt: skip


@torch.no_grad()
def in_turns(sides: dict, job, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of a job on each side, one after the other, the first round left out; who begins changes."""
    samples = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side in sorted(sides, reverse=number % 2 == 1):
            wall, cpu = time.perf_counter(), time.process_time()
            job(sides[side])
            if number:
                samples[side].append({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})
    return samples


@torch.no_grad()
def prefill(model, ids: torch.Tensor):
    """The cache of a prompt."""
    cache = HybridCache(model.config)
    model(ids, cache=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def work(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """A forward pass; its logits."""
    return model(torch.arange(3, 67)[None] if ids is None else ids, use_cache=False).logits


def pss_bytes() -> int:
    """Proportional set size of this process: its own pages, and its share of those it shares with others."""
    gc.collect()
    return int(re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) * 1024


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
