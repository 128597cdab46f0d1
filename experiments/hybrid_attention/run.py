"""Hybrid against pure attention, both with learning rates of their own: searches, three seeds, two contexts, speed and memory.

    python experiments/hybrid_attention/run.py rates                 # 5 rates each, short runs, judged on training text left out
    python experiments/hybrid_attention/run.py seeds --context 1024  # 3 seeds each at its best rate
    python experiments/hybrid_attention/run.py seeds --context 4096
    python experiments/hybrid_attention/run.py speed                 # decode speed and cache bytes by context
    python experiments/hybrid_attention/run.py report                # results.json, README's tables, pictures

Every run is one thread of the plain loop (experiments/tiny) and resumes when its command is repeated; `--only llama` takes one
side, so that two processes may share the work. Both sides have the same parameters, tokens, batches, warm-up and decay. A rate is
chosen by the loss on training documents that no run trains on; the 37 held-out files are read once, by the runs of `seeds`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast

from nemotron_h_hf.data.stdlib_text import Document, corpus_digest, read_documents, split_documents
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.whole_files import whole_file, write_json, write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))

from bits_per_byte import bits_per_byte  # noqa: E402
from plain_loop import LOG_FILE, LoopSettings, train  # noqa: E402
from tiny_models import TrainTinyArguments, build_model, count_parameters, get_tokenizer, token_stream  # noqa: E402

SIDES = {"nemotron-h": "hybrid", "llama": "attention"}
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RATE_TOKENS = 400_000
TOKENS = {1024: 1_600_000, 4096: 800_000}  # of a run of `seeds`, by context
SEEDS = (0, 1, 2)
CHOSEN_BY = slice(7, None, 100)  # documents of the training text that rates are chosen by
CHOOSING = "training documents left out"
STEPS, ROUNDS = 32, 5  # of decoding


class Text(NamedTuple):
    """Documents to train on, to choose rates by, and held out."""

    documents: list[Document]
    choosing: list[Document]
    held_out: list[Document]
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True)
class Run:
    """One training."""

    side: str
    rate: float
    seed: int
    context: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.side}-{self.rate:g}-{self.seed}-{self.context}-{self.tokens}"

    @property
    def arguments(self) -> TrainTinyArguments:
        """Shape and seed; a step has 4,096 tokens whatever the context."""
        return TrainTinyArguments(architecture=self.side, seed=self.seed, sequence_length=self.context)

    @property
    def settings(self) -> LoopSettings:
        batch = max(1, 4096 // self.context)
        return LoopSettings(self.tokens, self.context, batch, self.rate, warmup_steps=20, seed=self.seed, save_steps=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=("rates", "seeds", "speed", "report"))
    add("--context", type=int, choices=(1024, 4096), default=1024, help="tokens of a training row, with seeds (1024)")
    add("--only", choices=tuple(SIDES), nargs="+", default=list(SIDES), help="sides (both)")
    add(
        "--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens before decoding, with speed"
    )
    add("--scale", type=float, default=1.0, help="share of the tokens, for a look (1)")
    add("--limit", type=int, help="documents to measure on, for a look (all)")
    add("--runs", type=Path, default=Path("runs/hybrid_attention"))
    add("--output", type=Path, default=Path("docs/results/hybrid_attention"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    {"rates": rates, "seeds": seeds, "speed": speed, "report": report}[arguments.step](arguments)


# Training


def rates(arguments: argparse.Namespace) -> None:
    for side in arguments.only:
        for run in rate_runs(arguments, side):
            trained(run, arguments, CHOOSING)
        print(f"{SIDES[side]}: best rate {best_rate(arguments, side):g}")


def seeds(arguments: argparse.Namespace) -> None:
    for side in arguments.only:
        for run in seed_runs(arguments, side, arguments.context):
            trained(run, arguments, "held out")


def rate_runs(arguments: argparse.Namespace, side: str) -> list[Run]:
    return [Run(side, rate, 0, 1024, int(RATE_TOKENS * arguments.scale)) for rate in RATES]


def seed_runs(arguments: argparse.Namespace, side: str, context: int) -> list[Run]:
    tokens = int(TOKENS[context] * arguments.scale)
    return [Run(side, best_rate(arguments, side), seed, context, tokens) for seed in SEEDS]


def best_rate(arguments: argparse.Namespace, side: str) -> float:
    """The rate with the least loss on the documents for choosing."""
    figures = {run.rate: read(run, arguments.runs) for run in rate_runs(arguments, side)}
    return min(figures, key=lambda rate: figures[rate]["bits_per_byte"]["1024"])


def read(run: Run, runs: Path) -> dict:
    """The figures of a finished run.

    Raises:
        ValueError: where it is not finished.
    """
    path = runs / run.name / "result.json"
    if not path.is_file():
        raise ValueError(f"--runs={str(runs)!r}: {path} is missing, repeat `rates` or `seeds`")
    return json.loads(path.read_text(encoding="utf-8"))


def trained(run: Run, arguments: argparse.Namespace, measured_on: str) -> None:
    """Train, or go on, and write the figures; nothing for a finished run."""
    folder = arguments.runs / run.name
    if (folder / "result.json").is_file():
        return
    text = read_text(arguments.runs)
    model = build_model(run.arguments)
    print(f"{run.name}: {count_parameters(model):,} parameters, {run.settings.total_steps} steps", flush=True)
    train(model, stream(arguments.runs, run.seed), run.settings, folder)
    texts = (text.choosing if measured_on == CHOOSING else text.held_out)[: arguments.limit]
    found = {
        **asdict(run), "tokens": run.settings.total_steps * run.settings.tokens_per_step,
        "parameters": count_parameters(model), "training_text": corpus_digest(text.documents), "measured_on": measured_on,
        "bits_per_byte": {window: measure(model.eval(), text.tokenizer, texts, window) for window in {1024, run.context}},
    }  # fmt: skip
    write_json(folder / "result.json", found)
    print(json.dumps(found), flush=True)


@cache
def read_text(runs: Path) -> Text:
    """The library, with a tokenizer that is trained once for all runs."""
    documents, held_out = split_documents(read_documents())
    left_out = set(range(len(documents))[CHOSEN_BY])
    kept = [document for number, document in enumerate(documents) if number not in left_out]
    return Text(kept, documents[CHOSEN_BY], held_out, get_tokenizer(TrainTinyArguments(), kept, runs))


@cache
def stream(runs: Path, seed: int) -> Tensor:
    text = read_text(runs)
    return token_stream(text.tokenizer, text.documents, seed)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[Document], window: int) -> float:
    ids = tokenizer([text.text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    documents = [(tokens, len(text.text.encode())) for tokens, text in zip(ids, texts, strict=True)]
    return round(bits_per_byte(model, documents, tokenizer.eos_token_id, window, window // 2), 4)


# Speed and memory


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> None:
    """Tokens per second of decoding and bytes of the cache after each context, both sides in turns."""
    models = {side: build_model(TrainTinyArguments(architecture=side)).eval() for side in SIDES}
    found = []
    for context in arguments.contexts:
        rows = {side: {"side": side, "context": context, "seconds": []} for side in SIDES}
        caches = {side: prefilled(model, context) for side, model in models.items()}
        for round_ in range(ROUNDS + 1):
            for side, model in models.items():
                seconds = decode(model, caches[side])
                rows[side]["seconds"] += [seconds] if round_ else []  # the first one compiles
        for side, row in rows.items():
            row["tokens_per_second"] = round(STEPS / median(row["seconds"]), 1)
            row["cache_bytes"] = cache_bytes(caches[side])
            print(json.dumps(row), flush=True)
        found += rows.values()
    write_json(arguments.runs / "speed.json", {"rows": found, "machine": machine(), "threads": 1})


def prefilled(model: PreTrainedModel, context: int) -> Cache:
    """A cache after `context` random tokens, read in pieces."""
    ids = torch.randint(2, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = None
    for piece in ids.split(1024, dim=1):
        cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def decode(model: PreTrainedModel, cache: Cache) -> float:
    """Seconds for STEPS tokens, one by one."""
    token, started = torch.tensor([[5]]), time.perf_counter()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return time.perf_counter() - started


def cache_bytes(cache: Cache) -> int:
    return sum(value.nbytes for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor))


# Report


def report(arguments: argparse.Namespace) -> None:
    """Everything that is finished, as JSON, Markdown tables and pictures."""
    output, runs = arguments.output, arguments.runs
    searches = {side: [read(run, runs) for run in rate_runs(arguments, side)] for side in SIDES}
    finals = {
        (side, context): [read(run, runs) for run in seed_runs(arguments, side, context)]
        for context in (1024, 4096)
        if all(
            (runs / run.name / "result.json").is_file() for side in SIDES for run in seed_runs(arguments, side, context)
        )
        for side in SIDES
    }
    timed = json.loads((runs / "speed.json").read_text(encoding="utf-8"))
    content = {
        "command": "python experiments/hybrid_attention/run.py rates | seeds --context 1024 | seeds --context 4096 | speed | report",
        "scale": arguments.scale, "versions": versions(), "searches": searches,
        "seeds": [found for rows in finals.values() for found in rows], "speed": timed,
    }  # fmt: skip
    write_json(output / "results.json", content)
    write_text(output / "tables.md", tables(searches, finals, timed["rows"]))
    draw(arguments, finals, timed["rows"])
    print((output / "tables.md").read_text(encoding="utf-8"))


def tables(searches: dict, finals: dict, rows: list[dict]) -> str:
    """The three tables of README.md."""
    lines = [
        f"| bits per byte by rate | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        "|---" * (len(RATES) + 1) + "|",
    ]
    for side, found in searches.items():
        lines.append(f"| {SIDES[side]} | {' | '.join(str(one['bits_per_byte']['1024']) for one in found)} |")
    lines += ["", "| rows | tokens | read at | hybrid | attention | attention - hybrid |", "|---|---|---|---|---|---|"]
    for context in sorted({context for _, context in finals}):
        for window in sorted({1024, context}):
            hybrid, attention = (
                [found["bits_per_byte"][str(window)] for found in finals[side, context]] for side in SIDES
            )
            gaps = [a - h for a, h in zip(attention, hybrid, strict=True)]
            cells = [f"{mean(values):.4f} ± {stdev(values):.4f}" for values in (hybrid, attention, gaps)]
            tokens = finals["llama", context][0]["tokens"]
            lines.append(f"| {context:,} | {tokens:,} | {window:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "| context | hybrid, tokens/s | attention, tokens/s | hybrid, cache | attention, cache |",
        "|---|---|---|---|---|",
    ]
    by = {(row["side"], row["context"]): row for row in rows}
    for context in sorted({row["context"] for row in rows}):
        pair = [by[side, context] for side in SIDES]
        cells = [f"{row['tokens_per_second']:.0f}" for row in pair] + [
            f"{row['cache_bytes'] / 2**20:.2f} MiB" for row in pair
        ]
        lines.append(f"| {context:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(arguments: argparse.Namespace, finals: dict, rows: list[dict]) -> None:
    """loss.png: training loss against tokens, a line for each seed; context.png: speed and cache."""
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    contexts = sorted({context for _, context in finals}) or [1024]
    for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        for color, side in zip(("C0", "C1"), SIDES, strict=True):
            for run in seed_runs(arguments, side, context) if finals else ():
                lines = [json.loads(line) for line in (arguments.runs / run.name / LOG_FILE).read_text().splitlines()]
                xs, ys = ([line[name] for line in lines] for name in ("tokens", "loss"))
                axes.plot(
                    [x / 1e6 for x in xs], ys, color=color, alpha=0.7, label=SIDES[side] if run.seed == 0 else None
                )
        axes.set(
            xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=f"rows of {context:,} tokens"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(arguments.output / "loss.png") as part:
        figure.savefig(part, format="png")
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    pair = figure.subplots(1, 2)
    for side in SIDES:
        of_side = [row for row in rows if row["side"] == side]
        xs = [row["context"] for row in of_side]
        pair[0].plot(xs, [row["tokens_per_second"] for row in of_side], marker="o", label=SIDES[side])
        pair[1].plot(xs, [row["cache_bytes"] / 2**20 for row in of_side], marker="o", label=SIDES[side])
    for axes, name in zip(pair, ("tokens per second", "cache, MiB"), strict=True):
        axes.set(xlabel="tokens of context", ylabel=name, xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    pair[1].set_yscale("log")
    with whole_file(arguments.output / "context.png") as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    main()
