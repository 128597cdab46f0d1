"""Peak memory of a training step against the length of its row: `activations.json` and `activations.png` under docs/results.

    python experiments/activations/measure.py [--lengths 1024 2048 4096 8192 16384 32768] [--limit-gb 8]

The model is small (M-M-M*-M-, hidden size 256, vocabulary 8192, fp32, one row, the PyTorch path on a CPU):
memory is that of activations. Ours and transformers' own nemotron_h have the same weights. Each point runs in its own
process: weights are made, a short step loads what is loaded on first use, then one forward and backward with labels.
What counts is how far the kernel's peak of resident memory (VmHWM) rises above what was resident just before; gradients are
part of it in all cases. Resident memory counts what glibc keeps of freed blocks, too, and the formula does not: with
MALLOC_MMAP_THRESHOLD_=1048576 in the environment our model without its attention layer takes 0.56 instead of 1.30 GB at
16,384 tokens, with checkpointing. A step that wants more than the limit is no point, nor are longer ones. `formula` is
experiments/scaling/formulas.py's activations, working memory and gradients. Finished points are kept: the same command
resumes.
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nemotron_h_hf.benchmark.cpu_suite import WARM_UP_TOKENS, train_step
from nemotron_h_hf.benchmark.memory import footprint
from nemotron_h_hf.benchmark.models import build_native, build_ours
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.ssd import KEPT_TOKENS

sys.path.insert(0, str(Path(__file__).parents[1] / "scaling"))
from formulas import Plan, activation_bytes, working_bytes  # noqa: E402

REPORT = Path(__file__).parents[2] / "docs" / "results" / "activations" / "activations.json"
SHAPE = {
    "hybrid_override_pattern": "M-M-M*-M-", "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64,
    "n_groups": 2, "chunk_size": 64, "vocab_size": 8192,
}  # fmt: skip
# name -> (side, gradient checkpointing)
CASES = {
    "ours": ("ours", False),
    "ours, checkpointing": ("ours", True),
    "transformers' own": ("native", False),
    "transformers' own, checkpointing": ("native", True),
}


def main() -> None:
    """Measure what is missing, write the table after every point, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--limit-gb", type=float, default=8.0, help="what a step may take beyond the weights (8)")
    arguments = parser.parse_args()
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.is_file() else {"peak_extra_bytes": {}}
    found = report["peak_extra_bytes"]
    for length in sorted(arguments.lengths):
        for case, (side, checkpointing) in CASES.items():
            points = found.setdefault(case, {})
            if str(length) in points or None in points.values():
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(measure, side, checkpointing, length, int(arguments.limit_gb * 1e9))
                points[str(length)] = job.result()
            print(f"{length:6,} {case}: {points[str(length)] or 'more than the limit'}", flush=True)
            write(report, arguments.limit_gb)
    write(report, arguments.limit_gb)
    draw(report)


def measure(side: str, checkpointing: bool, length: int, limit_bytes: int) -> int | None:
    """Extra bytes at the peak of one step, None if it wanted more than the limit; in the process there for it alone."""
    torch.set_num_threads(1)
    ours = build_ours(NemotronHConfig(**SHAPE), torch.float32, torch.device("cpu"))
    model = ours.model if side == "ours" else build_native(ours).model
    del ours
    if checkpointing:
        model.gradient_checkpointing_enable()
    train_step(model, WARM_UP_TOKENS)
    model.zero_grad(set_to_none=True)
    return footprint(lambda: train_step(model, length), limit_bytes).extra_bytes


def write(report: dict, limit_gb: float) -> None:
    """The table, whole or not at all."""
    lengths = sorted({int(length) for points in report["peak_extra_bytes"].values() for length in points})
    config = NemotronHConfig(**SHAPE)
    report |= {
        "command": "python experiments/activations/measure.py",
        "what": "peak resident memory of one training step beyond weights, gradients included, float32, bytes",
        "shape": SHAPE, "parameters": num_parameters(config), "limit_gb": limit_gb,
        "formula": {
            name: {str(length): formula(config, length, checkpointing) for length in lengths if length > KEPT_TOKENS}
            for name, (side, checkpointing) in CASES.items() if side == "ours"
        },
        "bytes_per_token": {case: slope(points) for case, points in report["peak_extra_bytes"].items()},
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    temporary = REPORT.with_name(REPORT.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, REPORT)


def formula(config: NemotronHConfig, length: int, checkpointing: bool) -> int:
    """What experiments/scaling/formulas.py expects: activations, working memory, gradients."""
    plan = Plan(tokens_per_pass=length, checkpointing=checkpointing, element_bytes=4, fused_norm=False)
    return activation_bytes(config, plan) + working_bytes(config, plan) + 4 * num_parameters(config)


def slope(points: dict[str, int | None]) -> int | None:
    """Bytes per token between the two longest rows that fitted."""
    fitted = sorted((int(length), size) for length, size in points.items() if size is not None)[-2:]
    if len(fitted) < 2:
        return None
    (short, less), (long, more) = fitted
    return round((more - less) / (long - short))


def draw(report: dict) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(CASES, ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
    for case, points in report["peak_extra_bytes"].items():
        fitted = sorted((int(length), size / 1e9) for length, size in points.items() if size is not None)
        axes.plot(*zip(*fitted, strict=True), "o-", color=colours[case], label=case)
    for case, points in report["formula"].items():
        curve = sorted((int(length), size / 1e9) for length, size in points.items())
        axes.plot(*zip(*curve, strict=True), "--", color=colours[case], alpha=0.6, label=f"{case}: formula")
    axes.axhline(report["limit_gb"], color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens in the row", ylabel="peak of a training step beyond the weights (GB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).parents[2] / "docs" / "results" / "activations" / "activations.png")


if __name__ == "__main__":
    main()
