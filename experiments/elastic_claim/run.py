"""One elastic run against separate distillation runs with the same tokens: search of both sides, runs, table and pictures.

    git worktree add --detach runs/first 6799a51         # the parent: the first model of 0.1.0, pretrained as a whole alone
    python experiments/elastic_claim/run.py prepare --pretrained runs/first/src/nemotron_h_hf/assets/nemotron-h-tiny
                                                                        # text, the parent in order of importance, the cuts
    python experiments/elastic_claim/run.py search --arm elastic        # each of VARIANTS and rates, a short run on other held-out text
    python experiments/elastic_claim/run.py search --arm separate       # learning rates
    python experiments/elastic_claim/run.py elastic --seed 0            # T tokens: the parent and two nested models
    python experiments/elastic_claim/run.py separate --seed 0 --budget three_quarters      # T / 2 tokens
    python experiments/elastic_claim/run.py separate --seed 0 --budget half                # T / 2 tokens
    python experiments/elastic_claim/run.py separate --seed 0 --budget half --times 2      # T tokens: for the ratio
    python experiments/elastic_claim/run.py report                      # losses of all, results.json, tables, plots

Each line is one process. A command that was stopped resumes when it is repeated, one that is finished does nothing. The parent may be
any model with the embedded tokenizer; the sizes of both nested models are SIZES of it, the same in all runs. Every run is one
`nemotron-h` command, which is printed first.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.blended_rows import one_round
from nemotron_h_hf.data.fine_tuning_records import encode_record
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.data.stdlib_text import as_jsonl, corpus_digest, read_documents, split_documents
from nemotron_h_hf.elastic.budgets import Budget, read_elastic
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.elastic.prepare.elasticize import elasticize
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.scripts import distill, elastic_train
from nemotron_h_hf.tokenizer_files import save_tokenizer
from nemotron_h_hf.whole_files import whole_file, write_json, write_text

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "elastic_claim"
LENGTH, ROWS_PER_STEP = 1024, 4
SIZES = {  # shares of the parent's; they come to about three quarters and half of its parameters
    "three_quarters": {"hidden_size": 5 / 6, "intermediate_size": 2 / 3},
    "half": {"hidden_size": 2 / 3, "intermediate_size": 1 / 2, "mamba_head_dim": 3 / 4},
}
NESTED = tuple(SIZES)
BUDGETS = ("full", *NESTED)
SEEDS = (0, 1, 2)
SEARCH_SEED, SEARCH_TOKENS = 100, 400_000
RATES = {"adamw": ("5e-4", "1e-3", "2e-3"), "muon": ("1e-3", "2e-3", "4e-3")}
EVEN = [{"weights": {"full": 1, "three_quarters": 1, "half": 1}}]
PAPER = [{"until": "60%"}, {"weights": {"full": 0.5, "three_quarters": 0.3, "half": 0.2}}]
MIDDLE = [{"weights": {"full": 0.1, "three_quarters": 0.6, "half": 0.3}}]
SMALL = [{"weights": {"full": 0.1, "three_quarters": 0.4, "half": 0.5}}]
VARIANTS = {  # what differs from one elastic run to another
    "paper": ["--stages", json.dumps(PAPER)],
    "middle": ["--stages", json.dumps(MIDDLE)],
    "middle, then paper": ["--stages", json.dumps([{"until": "60%", **MIDDLE[0]}, PAPER[1]])],
    "small": ["--stages", json.dumps(SMALL)],
    "sandwich": ["--stages", json.dumps(EVEN), "--sandwich"],
    "live": ["--stages", json.dumps(SMALL), "--live_teacher"],
    "sandwich, live": ["--stages", json.dumps(EVEN), "--sandwich", "--live_teacher"],
}
NUM_CALIBRATION_DOCUMENTS, NUM_VALIDATION_DOCUMENTS = 16, 10
NUM_CALIBRATION_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=("prepare", "search", "elastic", "separate", "report"))
    add("--pretrained", type=Path, default=EMBEDDED_MODEL, help="the parent, for prepare")
    add("--seed", type=int, default=0, help="of a run (0)")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="of report (0 1 2)")
    add("--budget", choices=NESTED, default="half", help="of separate (half)")
    add("--times", type=float, default=1.0, help="of separate: so many times T / 2 tokens (1)")
    add("--arm", choices=("elastic", "separate"), default="elastic", help="of search (elastic)")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="of search --arm elastic (all)")
    add("--optimizers", nargs="+", choices=tuple(RATES), default=list(RATES), help="of search (both)")
    add("--rates", nargs="+", help="of search (those of RATES)")
    add("--tokens", type=int, default=800_000, help="T, of the elastic run and of both separate ones")
    add("--search-tokens", type=int, default=SEARCH_TOKENS, help="T of search")
    add("--runs", type=Path, default=Path("runs/elastic_claim"), help="where runs are kept")
    add("--output", type=Path, default=FOLDER, help="where report writes")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    steps = {
        "prepare": prepare,
        "search": search,
        "elastic": train_elastic,
        "separate": train_separate,
        "report": report,
    }
    steps[arguments.step](arguments)


# Text and parent


def prepare(arguments: argparse.Namespace) -> None:
    """Documents as the parent saw them, the parent with its weights in order of importance, and both cuts of it."""
    runs = arguments.runs
    runs.mkdir(parents=True, exist_ok=True)
    train, held_out = split_documents(read_documents())
    print(f"{len(train):,} and {len(held_out)} documents, fingerprint {corpus_digest(train)}", flush=True)
    parts = {"held_out": held_out, "validation": train[:: len(train) // NUM_VALIDATION_DOCUMENTS]}
    left_out = {document.name for document in parts["validation"]}
    parts["calibration"] = train[1 :: len(train) // NUM_CALIBRATION_DOCUMENTS]
    parts["train"] = [document for document in train if document.name not in left_out]
    for name, documents in parts.items():
        write_text(runs / f"{name}.jsonl", as_jsonl(documents))
    parent = AutoConfig.from_pretrained(arguments.pretrained)
    sizes = {name: Budget(name=name, **sizes_of(parent, SIZES.get(name, {}))) for name in BUDGETS}
    if not (runs / "parent").is_dir():
        model = AutoModelForCausalLM.from_pretrained(arguments.pretrained, dtype=torch.float32)
        model.config.elastic = None
        calibration = rows_of(runs / "calibration.jsonl")[:NUM_CALIBRATION_ROWS]
        validation = rows_of(runs / "validation.jsonl")[:16]
        choices = {field: sorted({getattr(parent, field)} | {getattr(one, field) or getattr(parent, field) for one in sizes.values()},
                                 reverse=True) for field in SIZES["half"]}  # fmt: skip
        elasticize(model, calibration, validation, choices=choices, depth_rows=[], work=runs / "work")  # widths alone
        model.config.elastic = replace(read_elastic(model.config), budgets=sizes).to_dict()
        model.save_pretrained(runs / "parent")
        save_tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), runs / "parent")
    for name in NESTED:
        if not (runs / f"cut-{name}" / "config.json").is_file():
            slice_checkpoint(runs / "parent", sizes[name], runs / f"cut-{name}")
    print(f"{runs / 'parent'} is ordered", flush=True)


def sizes_of(parent: PreTrainedConfig, shares: Mapping[str, float]) -> dict[str, int]:
    """Shares of the parent's sizes, each a multiple of eight."""
    return {field: 8 * round(getattr(parent, field) * share / 8) for field, share in shares.items()}


def rows_of(path: Path) -> list[dict[str, torch.Tensor]]:
    """All rows of a file, documents split at their ends."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    source = Source("text", path=[str(path)], column=None, shuffle_window=0)
    return list(one_round(source, lambda record: encode_record(record, tokenizer), LENGTH, 1, split_documents=True))


# Runs


def search(arguments: argparse.Namespace) -> None:
    """Mean validation loss of both nested models for each way and rate of an arm, into search-ARM.json."""
    path = arguments.runs / f"search-{arguments.arm}.json"
    ways = arguments.variants if arguments.arm == "elastic" else ["separate"]
    for way in ways:
        for optimizer in arguments.optimizers:
            for rate in arguments.rates or RATES[optimizer]:
                name = f"{way}/{optimizer}/{rate}"
                found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                if name not in found:
                    found[name] = searched(arguments, way, optimizer, rate)
                    write_json(path, found)
                print(f"{name}: {found[name]}", flush=True)


def searched(arguments: argparse.Namespace, way: str, optimizer: str, rate: str) -> dict[str, float]:
    """Budget -> validation loss after a short run."""
    folder = arguments.runs / f"search-{'-'.join((*way.split(', '), optimizer, rate))}"
    text, tokens = arguments.runs / "validation.jsonl", arguments.search_tokens
    if way != "separate":
        run_elastic(arguments, folder, way, optimizer, rate, SEARCH_SEED, tokens)
        return {name: round(held_out_loss(folder / "model", text, name), 4) for name in BUDGETS}
    found = {}
    for name in NESTED:
        own = folder.with_name(f"{folder.name}-{name}")
        run_separate(arguments, own, name, optimizer, rate, SEARCH_SEED, tokens // len(NESTED))
        found[name] = round(held_out_loss(own / "model", text), 4)
    return found


def best_separate(arguments: argparse.Namespace, budget: str) -> tuple[str, str, str]:
    """Way, optimizer and rate with the least loss of a nested model in the search of the separate arm."""
    found = searched_losses(arguments, "separate")
    return tuple(min(found, key=lambda name: found[name][budget]).split("/"))


def best_elastic(arguments: argparse.Namespace) -> tuple[str, str, str]:
    """Way, optimizer and rate that are the best beside the separate runs at the size where they do worst."""
    separate, found = searched_losses(arguments, "separate"), searched_losses(arguments, "elastic")
    goals = {budget: min(losses[budget] for losses in separate.values()) for budget in NESTED}
    return tuple(min(found, key=lambda name: max(found[name][budget] - goals[budget] for budget in NESTED)).split("/"))


def searched_losses(arguments: argparse.Namespace, arm: str) -> dict[str, dict[str, float]]:
    """Way, optimizer and rate -> budget -> loss, of `search`."""
    return json.loads((arguments.runs / f"search-{arm}.json").read_text(encoding="utf-8"))


def train_elastic(arguments: argparse.Namespace) -> None:
    """One run for the parent and both nested models, in the best way of the search."""
    folder = arguments.runs / f"elastic-{arguments.seed}"
    run_elastic(arguments, folder, *best_elastic(arguments), arguments.seed, arguments.tokens)


def train_separate(arguments: argparse.Namespace) -> None:
    """One nested model by itself, from the same cut, with the optimizer and rate that were the best for it."""
    name, seed = arguments.budget, arguments.seed
    tokens = round(arguments.times * arguments.tokens / len(NESTED))
    run_separate(arguments, separate_folder(arguments, name, seed, arguments.times), name,
                 *best_separate(arguments, name)[1:], seed, tokens)  # fmt: skip


def separate_folder(arguments: argparse.Namespace, budget: str, seed: int, times: float) -> Path:
    return arguments.runs / (f"separate-{budget}-{seed}" + (f"-x{times:g}" if times != 1 else ""))


def run_elastic(
    arguments: argparse.Namespace, folder: Path, way: str, optimizer: str, rate: str, seed: int, tokens: int
) -> None:
    if not (folder / "model" / "config.json").is_file():
        words = ["--model", str(arguments.runs / "parent"), "--keep_sizes", *VARIANTS[way],
                 *common(arguments, folder, optimizer, rate, seed, tokens)]  # fmt: skip
        print(f"nemotron-h elastic-train {shlex.join(words)}", flush=True)
        elastic_train.main(words)


def run_separate(
    arguments: argparse.Namespace, folder: Path, budget: str, optimizer: str, rate: str, seed: int, tokens: int
) -> None:
    if not (folder / "model" / "config.json").is_file():
        words = ["--model", str(arguments.runs / f"cut-{budget}"), "--teacher", str(arguments.runs / "parent"),
                 *common(arguments, folder, optimizer, rate, seed, tokens)]  # fmt: skip
        print(f"nemotron-h distill {shlex.join(words)}", flush=True)
        distill.main(words)


def common(arguments: argparse.Namespace, folder: Path, optimizer: str, rate: str, seed: int, tokens: int) -> list[str]:
    """What both arms share: text, rows, schedule."""
    return ["--data", str(arguments.runs / "train.jsonl"), "--sequence_length", str(LENGTH), "--optimizer", optimizer,
            "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(ROWS_PER_STEP),
            "--learning_rate", rate, "--warmup_tokens", "5%", "--decay_tokens", "60%",
            "--min_lr_ratio", "0.05", "--weight_decay", "0.1", "--total_tokens", str(tokens), "--seed", str(seed),
            "--logging_steps", "5", "--save_steps", "50", "--save_total_limit", "1", "--use_cpu", "--disable_tqdm", "true",
            "--report_to", "none", "--output_dir", str(folder)]  # fmt: skip


# Report


def report(arguments: argparse.Namespace) -> None:
    """Held-out loss of every model, into results.json; tables; a picture."""
    runs, seeds = arguments.runs, arguments.seeds
    needed = [f"elastic-{seed}" for seed in seeds] + [
        f"separate-{budget}-{seed}" for budget in NESTED for seed in seeds
    ]
    if unfinished := [name for name in needed if not (runs / name / "model" / "config.json").is_file()]:
        raise FileNotFoundError(f"{runs}: not finished: {', '.join(unfinished)}; --seeds takes those that are")
    losses_file = runs / "losses.json"
    losses = json.loads(losses_file.read_text(encoding="utf-8")) if losses_file.is_file() else {}

    def loss(name: str, budget: str | None = None, text: str = "held_out") -> float:
        key = " ".join((name, *([budget] if budget else []), *([text] if text != "held_out" else [])))
        if key not in losses:
            losses[key] = held_out_loss(runs / name, runs / f"{text}.jsonl", budget)
            write_json(losses_file, losses)
        return losses[key]

    rows = []
    for budget in BUDGETS:
        row = {"budget": budget, "elastic": [loss(f"elastic-{seed}/model", budget) for seed in seeds]}
        if budget == "full":
            row |= {"parameters": parameters_of(runs / "parent"), "cut": loss("parent"), "separate": {}}
        else:
            row |= {"parameters": parameters_of(runs / f"cut-{budget}"), "cut": loss(f"cut-{budget}"), "separate": {}}
            for folder in sorted(runs.glob(f"separate-{budget}-{seeds[0]}*")):
                times = folder.name.partition("-x")[2] or "1"
                found = [separate_folder(arguments, budget, seed, float(times)) for seed in seeds]
                finished = [one.name for one in found if (one / "model" / "config.json").is_file()]
                row["separate"][times] = [loss(f"{name}/model") for name in finished]
        row["ratio"] = ratio(row)
        rows.append(row)
    start = {"full": "parent"} | {name: f"cut-{name}" for name in NESTED}
    searches = {"start": {"not trained/–/–": {name: loss(model, text="validation") for name, model in start.items()}}}
    searches |= {arm: searched_losses(arguments, arm) for arm in ("elastic", "separate")}
    write_json(arguments.output / "results.json", {
        "command": "python experiments/elastic_claim/run.py prepare | search | elastic | separate | report",
        "tokens": arguments.tokens, "search_tokens": arguments.search_tokens, "seeds": list(seeds),
        "chosen": {"elastic": best_elastic(arguments)} | {name: best_separate(arguments, name) for name in NESTED},
        "searches": searches, "losses": rows,
        "machine": machine(), "versions": versions(),
    })  # fmt: skip
    written = f"{table(rows)}\n\n{search_table(searches)}\n"
    write_text(arguments.output / "tables.md", written)
    draw_losses(rows, arguments.output / "loss_by_tokens.png")
    print(written)


@torch.no_grad()
def held_out_loss(folder: Path, text: Path, budget: str | None = None) -> float:
    """Cross-entropy in nats per token of a checkpoint, or of one of its budgets, in fp32."""
    more = {} if budget is None else {"budget": budget}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    total = count = 0
    for row in rows_of(text):
        labels = row["labels"][None]
        items = int((labels[:, 1:] != -100).sum())
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
        total += float(model(**inputs, labels=labels, skip_logits=True).loss) * items
        count += items
    return total / count


def ratio(row: Mapping) -> float | None:
    """How many times T / 2 tokens separate runs need for the mean loss of the elastic ones: straight lines between the measured
    points over the logarithm of their tokens; None where it lies outside of them."""
    goal = mean(row["elastic"])
    points = sorted((float(times), mean(losses)) for times, losses in row["separate"].items())
    for (fewer, high), (more, low) in pairwise(points):
        if low <= goal <= high:
            return round(fewer * (more / fewer) ** ((high - goal) / (high - low)), 2)
    return None


def parameters_of(folder: Path) -> int:
    return num_parameters(AutoConfig.from_pretrained(folder))


def table(rows: Sequence[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds; then the differences within a seed."""

    def cell(values: Sequence[float]) -> str:
        return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    times = sorted({times for row in rows for times in row["separate"]}, key=float)
    heads = ["model", "parameters", "cut, not trained", *(f"separate, {float(t):g} x T/2 tokens each" for t in times),
             "one elastic run, T tokens", "elastic - separate", "separate as good at"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        separate = row["separate"].get("1")
        difference = cell([a - b for a, b in zip(row["elastic"], separate, strict=True)]) if separate else "–"
        cells = [f"{row['parameters']:,}", f"{row['cut']:.3f}"]
        cells += [cell(row["separate"][t]) if t in row["separate"] else "–" for t in times]
        reached = f"{row['ratio']} x T/2" if row["ratio"] else "–"
        lines.append(f"| {' | '.join((row['budget'], *cells, cell(row['elastic']), difference, reached))} |")
    return "\n".join(lines)


def search_table(searches: dict[str, dict]) -> str:
    """Markdown: what each short run came to."""
    lines = ["| way | optimizer | rate | full | three quarters | half |", "|---|---|---|---|---|---|"]
    for found in searches.values():
        for name, losses in found.items():
            cells = [f"{losses[budget]:.3f}" if budget in losses else "–" for budget in BUDGETS]
            lines.append(f"| {' | '.join(name.split('/'))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_losses(rows: Sequence[dict], path: Path) -> None:
    """Loss of the separate runs over their tokens beside the elastic run's: a panel for each nested model."""
    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    for row, axes in zip([row for row in rows if row["separate"]], figure.subplots(1, len(NESTED)), strict=True):
        times = sorted(row["separate"], key=float)
        axes.plot([float(t) for t in times], [mean(row["separate"][t]) for t in times], "o-", label="separate run")
        for t in times:
            axes.scatter([float(t)] * len(row["separate"][t]), row["separate"][t], color="tab:blue", s=10)
        axes.axhline(mean(row["elastic"]), color="tab:orange", label="one elastic run for all, T tokens")
        for value in row["elastic"]:
            axes.axhline(value, color="tab:orange", linewidth=0.5, alpha=0.5)
        axes.set(
            title=row["budget"].replace("_", " "),
            xlabel="tokens of the separate run, T/2",
            ylabel="held-out loss, nats per token",
        )
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    main()
