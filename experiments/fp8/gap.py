"""How much loss FP8 costs: train the embedded model's shape in BF16 and in FP8 from the same seeds, and draw the gap.

    python experiments/fp8/gap.py train --precision bf16 --seeds 0 1 2 --threads 1    # stops and resumes at any moment
    python experiments/fp8/gap.py train --precision fp8 --seeds 0 1 2 --threads 1
    python experiments/fp8/gap.py plot            # gap.png and gap.json from the logs in docs/results/fp8
    python experiments/fp8/gap.py speed           # speed.json: tokens per second of each way to compute

Text, tokenizer, shape and settings are those of `nemotron-h train-tiny`. A seed decides initial weights and batches, so
that two runs of one seed differ in arithmetic alone.

On a GPU (`--device cuda`) bf16 is autocast and FP8 is real. A CPU without BF16 instructions takes seven times as long
under autocast, so there both are emulated by rounding: every Linear, lm_head included, takes its input, weight and
incoming gradient rounded to bfloat16, multiplies in fp32 and rounds what it gives, which is what BF16 hardware does; in
the fp8 runs the converted ones (training/fp8.py) continue from those rounded values as they would under autocast. Between the
Linear layers all is fp32.

Four GEMMs at either end are 8 of this model's 14, where the 56B keeps 8 of 236: fp8 puts too little in FP8 to stand for
a large model. Precision fp8_all converts all 14, harsher than the paper. Precision fp32 rounds nothing, a control: how far
does another rounding alone move the loss.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.data.stdlib_text import read_documents, split_documents
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.training.fp8 import convert_to_fp8, converted_modules, print_fp8_modules
from nemotron_h_hf.whole_files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))

from plain_loop import LOG_FILE, LoopSettings, make_optimizers, train, train_step  # noqa: E402
from tiny_models import TrainTinyArguments, build_model, loop_settings, save_checkpoint, token_stream  # noqa: E402

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "fp8"
PRECISIONS = ("bf16", "fp8", "fp8_all", "fp32")
MAX_TOKENS = 2442 * 2048  # the first whole number of steps past 5 million
SMOOTH_LINES = 20  # log lines averaged, each the mean of 10 steps
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("--precision", choices=PRECISIONS, required=True)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--runs", type=Path, default=Path("runs/fp8"), help="folder of states and checkpoints")
    one.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    one.add_argument("--time-limit-minutes", type=float, default=float("inf"), help="of each run; resumable")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    speed = commands.add_parser("speed")
    speed.add_argument("--steps", type=int, default=20)
    for command in (one, commands.add_parser("plot"), speed):
        command.add_argument("--logs", type=Path, default=FOLDER, help="folder of the finished runs' logs")
    for command in (one, speed):
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    {"train": train_seeds, "plot": plot, "speed": measure_speeds}[options.command](options)
    return 0


def train_seeds(options: argparse.Namespace) -> None:
    """One run per seed, one after the other; a finished one is left alone, an unfinished one resumes."""
    prepare(options.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED_MODEL)
    documents, _ = split_documents(read_documents())
    for seed in options.seeds:
        name = f"{options.precision}-{seed}"
        log = options.logs / f"{name}.jsonl"
        if log.is_file():
            print(f"{log} is there; nothing to do")
            continue
        arguments = TrainTinyArguments(
            max_tokens=options.max_tokens, seed=seed, time_limit_minutes=options.time_limit_minutes
        )
        stream = token_stream(tokenizer, documents, seed)
        model = make_model(arguments, options.precision, options.device)
        if train(model, stream, loop_settings(arguments), options.runs / name):
            finish(model, tokenizer, options.runs / name, log)


def prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def make_model(arguments: TrainTinyArguments, precision: str, device: str = "cpu") -> PreTrainedModel:
    """The model of this seed, on `device`, computing in `precision`."""
    model = build_model(arguments).to(device)
    if precision in ("fp8", "fp8_all"):
        convert_to_fp8(model, **({} if precision == "fp8" else {"skip_first": 0, "skip_last": 0}))
        print_fp8_modules(model)
    if device == "cpu" and precision != "fp32":
        round_linears(model)
    return model


def finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, log: Path) -> None:
    """A checkpoint next to the state, and the log where the plot looks for it."""
    save_checkpoint(model, tokenizer, folder / "checkpoint")
    log.parent.mkdir(parents=True, exist_ok=True)
    temporary = log.with_name(log.name + ".tmp")
    shutil.copyfile(folder / LOG_FILE, temporary)
    os.replace(temporary, log)


# BF16 on a machine that has none


class Rounded(torch.autograd.Function):
    """x rounded to bfloat16 and kept as fp32, and its gradient too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return to_bfloat16_and_back(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return to_bfloat16_and_back(grad)


def to_bfloat16_and_back(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def round_linears(model: nn.Module) -> None:
    """Have every Linear of `model` (fp32, no biases) compute as BF16 hardware does, or FP8 hardware with BF16 around it."""
    in_fp8 = set(converted_modules(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module.bias is not None:
                raise ValueError(f"{name}: has a bias, allowed are Linear modules without")
            module.forward = rounded_fp8(module) if name in in_fp8 else partial(rounded_linear, module)


def rounded_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return Rounded.apply(nn.functional.linear(Rounded.apply(x), Rounded.apply(module.weight)))


def rounded_fp8(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The converted module's forward with BF16 input and output; its weight is cast to FP8 from the fp32 master."""
    forward = module.forward
    module.weight.register_hook(to_bfloat16_and_back)
    return lambda x: Rounded.apply(forward(Rounded.apply(x)))


# The plot


def plot(options: argparse.Namespace) -> None:
    """Relative gap to bf16 over tokens, smoothed: each seed, their mean, and a 95 % t-interval of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {precision: read_logs(options.logs, precision) for precision in PRECISIONS}
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    axes.axhline(0, color="0.5", linewidth=0.8)
    summary = {}
    for precision, colour in (("fp8", "tab:green"), ("fp8_all", "tab:orange"), ("fp32", "0.5")):
        seeds = sorted(logs[precision].keys() & logs["bf16"].keys())
        if not seeds:
            continue
        tokens, gaps = relative_gaps([logs["bf16"][s] for s in seeds], [logs[precision][s] for s in seeds])
        smooth = [smoothed(gap) for gap in gaps]
        centre, half = interval(smooth)
        millions = [t / 1e6 for t in tokens]
        for gap in smooth:
            axes.plot(millions, [100 * g for g in gap], color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(
            millions,
            [100 * c for c in centre],
            color=colour,
            label=f"{precision}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        )
        if half:
            low, high = ([100 * (c + sign * h) for c, h in zip(centre, half)] for sign in (-1, 1))
            axes.fill_between(
                millions, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval of the mean"
            )
        summary[precision] = summarise(seeds, tokens, centre, half)
    if not summary:
        raise ValueError(f"logs: {options.logs} has no bf16-SEED.jsonl with an fp8-SEED.jsonl of the same seed")
    axes.set(xlabel="training tokens (millions)", ylabel="(loss - loss in bf16) / loss in bf16, %",
             title="mean over seeds with its 95 % t-interval; thin: each seed")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.logs / "gap.png")
    text = json.dumps(summary, indent=2)
    (options.logs / "gap.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_logs(folder: Path, precision: str) -> dict[int, list[dict]]:
    """Rows of the log of each seed."""
    return {
        int(path.stem.split("-")[1]): [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob(f"{precision}-*.jsonl")
    }


def relative_gaps(reference: list[list[dict]], other: list[list[dict]]) -> tuple[list[int], list[list[float]]]:
    """Tokens of the log lines that all runs have, and per seed (loss - reference loss) / reference loss at each."""
    shared = set.intersection(*({row["tokens"] for row in run} for run in [*reference, *other]))
    tokens = sorted(shared)
    losses = [[{row["tokens"]: row["loss"] for row in run} for run in side] for side in (reference, other)]
    return tokens, [[(b[t] - a[t]) / a[t] for t in tokens] for a, b in zip(*losses)]


def smoothed(values: list[float], lines: int = SMOOTH_LINES) -> list[float]:
    """The mean of each value and up to lines - 1 before it."""
    return [mean(values[max(0, i - lines + 1) : i + 1]) for i in range(len(values))]


def interval(curves: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean over the curves at each point, and half the width of its 95 % t-interval (empty for one curve)."""
    points = list(zip(*curves))
    centre = [mean(point) for point in points]
    if len(curves) == 1:
        return centre, []
    return centre, [STUDENT_T[len(curves) - 2] * stdev(point) / len(curves) ** 0.5 for point in points]


def summarise(seeds: list[int], tokens: list[int], centre: list[float], half: list[float]) -> dict:
    """The end of the curve, where it stood at each fifth of the run, and the seeds."""
    fifths = [round(len(tokens) * part / 5) - 1 for part in range(1, 6)]
    return {
        "seeds": seeds, "tokens": tokens[-1], "gap_percent": round(100 * centre[-1], 4),
        "half_width_of_95_percent_interval": round(100 * half[-1], 4) if half else None,
        "gap_percent_at_tokens": {tokens[i]: round(100 * centre[i], 4) for i in fifths if i >= 0},
    }  # fmt: skip


# The speed


def measure_speeds(options: argparse.Namespace) -> None:
    """Tokens per second of CPU time of each way, interleaved step by step: median, slowest and fastest step but the first."""
    prepare(options.threads)
    settings = LoopSettings(max_tokens=options.steps * 2048, sequence_length=1024, batch_size=2)
    ways = dict(ways_to_compute())
    optimizers = {name: make_optimizers(model, settings) for name, model in ways.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    generator = torch.Generator().manual_seed(0)
    for step in trange(options.steps, unit="step"):
        batch = torch.randint(3, 2048, (settings.batch_size, settings.sequence_length), generator=generator)
        for name, model in ways.items():
            start = time.process_time()
            train_step(model.train(), optimizers[name], batch, settings, step)
            speeds[name].append(settings.tokens_per_step * options.threads / (time.process_time() - start))
    summary = {
        "machine": machine(), "versions": versions(), "threads": options.threads, "steps": options.steps,
        "tokens_per_second": {
            name: {"median": round(median(measured[1:])), "lowest": round(min(measured[1:])),
                   "highest": round(max(measured[1:]))}
            for name, measured in speeds.items()
        },
    }  # fmt: skip
    write_json(options.logs / "speed.json", summary)
    print(json.dumps(summary, indent=2))


def ways_to_compute() -> Iterator[tuple[str, PreTrainedModel]]:
    arguments = TrainTinyArguments()
    for precision in PRECISIONS:
        yield precision + (", rounded" if precision != "fp32" else ""), make_model(arguments, precision)
    autocast = make_model(arguments, "fp32")
    autocast.forward = torch.autocast("cpu", torch.bfloat16)(autocast.forward)
    yield "bf16, autocast", autocast


if __name__ == "__main__":
    raise SystemExit(main())
