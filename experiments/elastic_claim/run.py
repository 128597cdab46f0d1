"""One elastic run against separate distillation runs with the same tokens: cuts, runs, table and pictures.

    python experiments/elastic_claim/run.py prepare                     # text, and the embedded model as an ordered parent
    python experiments/elastic_claim/run.py search --arm elastic        # learning rates, short runs on other held-out text
    python experiments/elastic_claim/run.py search --arm separate
    python experiments/elastic_claim/run.py elastic --seed 0            # T tokens: the parent and two nested models
    python experiments/elastic_claim/run.py cut --seed 0                # the same cuts, out of the parent before training
    python experiments/elastic_claim/run.py separate --seed 0 --budget three_quarters      # T / 2 tokens
    python experiments/elastic_claim/run.py separate --seed 0 --budget half                # T / 2 tokens
    python experiments/elastic_claim/run.py report                      # losses of all, results.json, README's table, plots

Each line is one process; `all --seed 0` does the five of a seed one after another. A command that was stopped resumes when
it is repeated, one that is finished does nothing. The sizes are those that the router of the seed's elastic run ends with,
so `cut` and `separate` come after `elastic`. Every run is one `nemotron-h` command, which is printed first.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.blended_rows import one_round
from nemotron_h_hf.data.fine_tuning_records import encode_record
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.data.stdlib_text import corpus_digest, read_documents, split_documents
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.elastic.prepare.elasticize import elasticize
from nemotron_h_hf.scripts import distill, elastic_train
from nemotron_h_hf.tokenizer_files import save_tokenizer

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "elastic_claim"
LENGTH, ROWS_PER_STEP = 1024, 4
NESTED = {"three_quarters": 0.75, "half": 0.5}
BUDGETS = {"full": 1.0, **NESTED}
SEEDS = (0, 1, 2)
SEARCH_SEED, SEARCH_TOKENS = 100, 400_000
LEARNING_RATES = ("2.5e-4", "5e-4", "1e-3")
BOX = AutoConfig.from_pretrained(EMBEDDED_MODEL)
CHOICES = {
    "hidden_size": list(range(BOX.hidden_size, BOX.hidden_size // 2 - 1, -16)),
    "intermediate_size": list(range(BOX.intermediate_size, BOX.intermediate_size // 3 - 1, -96)),
    "mamba_num_heads": list(range(BOX.mamba_num_heads, 0, -2)),
    "mamba_head_dim": [64, 48, 32],
}
STAGES = [{"until": "60%"}, {"weights": {"full": 0.5, "three_quarters": 0.3, "half": 0.2}}]
NUM_CALIBRATION_DOCUMENTS, NUM_VALIDATION_DOCUMENTS = 16, 10
NUM_CALIBRATION_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "search", "elastic", "cut", "separate", "all", "report"))
    parser.add_argument("--seed", type=int, default=0, help="of a run (0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of report (0 1 2)")
    parser.add_argument("--budget", choices=tuple(NESTED), default="half", help="of separate (half)")
    parser.add_argument("--arm", choices=("elastic", "separate"), default="elastic", help="of search (elastic)")
    parser.add_argument("--tokens", type=int, default=3_400_000, help="T, of the elastic run and of both separate ones")
    parser.add_argument("--search-tokens", type=int, default=SEARCH_TOKENS, help="of an elastic run of search")
    parser.add_argument("--runs", type=Path, default=Path("runs/elastic_claim"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where report writes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {"prepare": prepare, "search": search, "elastic": train_elastic, "cut": cut, "separate": train_separate,
             "all": train_all, "report": report}  # fmt: skip
    steps[arguments.step](arguments)


# Text and parent


def prepare(arguments: argparse.Namespace) -> None:
    """Documents as the embedded model saw them, and itself with its weights in order of importance."""
    runs = arguments.runs
    runs.mkdir(parents=True, exist_ok=True)
    train, held_out = split_documents(read_documents())
    print(f"{len(train):,} and {len(held_out)} documents, fingerprint {corpus_digest(train)}", flush=True)
    parts = {"held_out": held_out, "validation": train[:: len(train) // NUM_VALIDATION_DOCUMENTS]}
    left_out = {document.name for document in parts["validation"]}
    parts["calibration"] = train[1 :: len(train) // NUM_CALIBRATION_DOCUMENTS]
    parts["train"] = [document for document in train if document.name not in left_out]
    for name, documents in parts.items():
        if not (path := runs / f"{name}.jsonl").is_file():
            lines = [json.dumps({"text": document.text}) + "\n" for document in documents]
            path.write_text("".join(lines), encoding="utf-8")
    if not (runs / "parent").is_dir():
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        model.config.elastic = None  # it is put in order again
        calibration = rows_of(runs / "calibration.jsonl")[:NUM_CALIBRATION_ROWS]
        validation = rows_of(runs / "validation.jsonl")[:16]
        elasticize(model, calibration, validation, choices=CHOICES, depth_rows=[], work=runs / "work")  # widths alone
        model.save_pretrained(runs / "parent")
        save_tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), runs / "parent")
    print(f"{runs / 'parent'} is ordered", flush=True)


def rows_of(path: Path) -> list[dict[str, torch.Tensor]]:
    """All rows of a file, documents split at their ends."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    source = Source("text", path=[str(path)], column=None, shuffle_window=0)
    return list(one_round(source, lambda record: encode_record(record, tokenizer), LENGTH, 1, split_documents=True))


# Runs


def search(arguments: argparse.Namespace) -> None:
    """The best of LEARNING_RATES for an arm, by the mean validation loss of both nested models, into search-ARM.json.

    The separate arm is given the cuts of the elastic arm's best run.
    """
    runs, found = arguments.runs, {}
    for rate in LEARNING_RATES:
        if arguments.arm == "elastic":
            folder = runs / f"search-elastic-{rate}"
            run_elastic(arguments, folder, rate, SEARCH_SEED, arguments.search_tokens)
            budgets = read_elastic(AutoConfig.from_pretrained(folder / "model")).budgets
            found[rate] = mean(budgets[name].loss for name in NESTED)
        else:
            model = runs / f"search-elastic-{best_rate(arguments, 'elastic')}" / "model"
            losses = []
            for name in NESTED:
                cut_one(arguments, model, name, runs / f"search-cut-{name}")
                folder = runs / f"search-separate-{name}-{rate}"
                run_separate(
                    arguments, folder, runs / f"search-cut-{name}", rate, SEARCH_SEED, arguments.search_tokens // 2
                )
                losses.append(held_out_loss(folder / "model", runs / "validation.jsonl"))
            found[rate] = mean(losses)
        print(f"{arguments.arm}, learning rate {rate}: {found[rate]:.4f}", flush=True)
    (runs / f"search-{arguments.arm}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def best_rate(arguments: argparse.Namespace, arm: str) -> str:
    """What `search` found, or 1e-3 if there was none."""
    path = arguments.runs / f"search-{arm}.json"
    if not path.is_file():
        return "1e-3"
    found = json.loads(path.read_text(encoding="utf-8"))
    return min(found, key=found.get)


def train_all(arguments: argparse.Namespace) -> None:
    """Everything of one seed."""
    train_elastic(arguments)
    cut(arguments)
    for name in NESTED:
        train_separate(argparse.Namespace(**{**vars(arguments), "budget": name}))


def train_elastic(arguments: argparse.Namespace) -> None:
    """One run for the parent and both nested models."""
    folder = arguments.runs / f"elastic-{arguments.seed}"
    run_elastic(arguments, folder, best_rate(arguments, "elastic"), arguments.seed, arguments.tokens)


def train_separate(arguments: argparse.Namespace) -> None:
    """One nested model by itself, from the same cut, on half of the tokens."""
    name, seed = arguments.budget, arguments.seed
    folder, start = arguments.runs / f"separate-{name}-{seed}", arguments.runs / f"cut-{name}-{seed}"
    rate = best_rate(arguments, "separate")
    run_separate(arguments, folder, start, rate, seed, arguments.tokens // len(NESTED))


def cut(arguments: argparse.Namespace) -> None:
    """The sizes that the elastic run found, cut out of the parent before it was trained."""
    for name in NESTED:
        model = arguments.runs / f"elastic-{arguments.seed}" / "model"
        cut_one(arguments, model, name, arguments.runs / f"cut-{name}-{arguments.seed}")


def cut_one(arguments: argparse.Namespace, trained: Path, name: str, output: Path) -> None:
    if not (output / "config.json").is_file():
        found = read_elastic(AutoConfig.from_pretrained(trained)).budgets[name]
        slice_checkpoint(arguments.runs / "parent", replace(found, trained=False, loss=None), output)


def run_elastic(arguments: argparse.Namespace, folder: Path, rate: str, seed: int, tokens: int) -> None:
    if not (folder / "model" / "config.json").is_file():
        words = ["--model", str(arguments.runs / "parent"), "--budgets", json.dumps(BUDGETS), "--choices",
                 json.dumps(CHOICES), "--per_layer", "intermediate_size", "--stages", json.dumps(STAGES),
                 *common(arguments, folder, rate, seed, tokens), "--calibrate", "false",
                 "--eval_data", str(arguments.runs / "validation.jsonl")]  # fmt: skip
        print(f"nemotron-h elastic-train {shlex.join(words)}", flush=True)
        elastic_train.main(words)


def run_separate(arguments: argparse.Namespace, folder: Path, start: Path, rate: str, seed: int, tokens: int) -> None:
    if not (folder / "model" / "config.json").is_file():
        words = ["--model", str(start), "--teacher", str(arguments.runs / "parent"),
                 *common(arguments, folder, rate, seed, tokens)]  # fmt: skip
        print(f"nemotron-h distill {shlex.join(words)}", flush=True)
        distill.main(words)


def common(arguments: argparse.Namespace, folder: Path, rate: str, seed: int, tokens: int) -> list[str]:
    """What both arms share: text, rows, optimizer, schedule."""
    return ["--data", str(arguments.runs / "train.jsonl"), "--sequence_length", str(LENGTH),
            "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(ROWS_PER_STEP),
            "--per_device_eval_batch_size", "4", "--learning_rate", rate, "--warmup_tokens", "5%", "--decay_tokens", "40%",
            "--min_lr_ratio", "0.1", "--weight_decay", "0.1", "--total_tokens", str(tokens), "--seed", str(seed),
            "--logging_steps", "5", "--save_steps", "50", "--save_total_limit", "1", "--use_cpu", "--disable_tqdm", "true",
            "--output_dir", str(folder)]  # fmt: skip


# Report


def report(arguments: argparse.Namespace) -> None:
    """Held-out loss of every model, into results.json; the table on standard output; pictures."""
    runs, seeds = arguments.runs, arguments.seeds
    needed = [f"elastic-{seed}/model" for seed in seeds]
    needed += [name for b in NESTED for seed in seeds for name in (f"cut-{b}-{seed}", f"separate-{b}-{seed}/model")]
    if unfinished := [name for name in needed if not (runs / name / "config.json").is_file()]:
        raise FileNotFoundError(f"{runs}: not finished: {', '.join(unfinished)}; --seeds takes those that are")
    losses_file = runs / "losses.json"
    losses = json.loads(losses_file.read_text(encoding="utf-8")) if losses_file.is_file() else {}

    def loss(name: str, budget: str | None = None) -> float:
        key = name if budget is None else f"{name} {budget}"
        if key not in losses:
            losses[key] = held_out_loss(runs / name, runs / "held_out.jsonl", budget)
            losses_file.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
        return losses[key]

    rows = []
    for budget in BUDGETS:
        row = {"budget": budget, "elastic": [loss(f"elastic-{seed}/model", budget) for seed in seeds]}
        if budget == "full":
            row |= {"parameters": [parameters_of(runs / "parent")] * len(seeds), "cut": [loss("parent")] * len(seeds),
                    "separate": None}  # fmt: skip
        else:
            row["parameters"] = [parameters_of(runs / f"cut-{budget}-{seed}") for seed in seeds]
            row["cut"] = [loss(f"cut-{budget}-{seed}") for seed in seeds]
            row["separate"] = [loss(f"separate-{budget}-{seed}/model") for seed in seeds]
        rows.append(row)
    logs = {seed: read_log(runs / f"elastic-{seed}" / "metrics.jsonl") for seed in seeds}
    rates = {arm: best_rate(arguments, arm) for arm in ("elastic", "separate")}
    searches = {arm: json.loads((runs / f"search-{arm}.json").read_text(encoding="utf-8")) for arm in rates}
    results = {"tokens": arguments.tokens, "seeds": list(seeds), "learning_rates": rates, "searches": searches,
               "losses": rows}  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    draw_losses(rows, arguments.output / "loss_by_size.png")
    draw_choices(logs, arguments.output / "choices.png")


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


def parameters_of(folder: Path) -> int:
    return num_parameters(AutoConfig.from_pretrained(folder))


def read_log(path: Path) -> list[dict[str, float]]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in lines if "loss" in row]


def table(rows: Sequence[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds; a seed's elastic and separate models have the same sizes, and
    the last column holds the differences within a seed."""

    def cell(values: Sequence[float] | None, digits: int = 3) -> str:
        if values is None:
            return "–"
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and len(set(values)) > 1 else ""
        return f"{mean(values):,.{digits}f}{spread}"

    heads = ("model", "parameters", "cut, not trained", "separate runs", "one elastic run", "elastic - separate")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        difference = row["separate"] and [a - b for a, b in zip(row["elastic"], row["separate"], strict=True)]
        losses = (row["cut"], row["separate"], row["elastic"], difference)
        cells = [row["budget"], cell(row["parameters"], 0), *map(cell, losses)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_losses(rows: Sequence[dict], path: Path) -> None:
    """Loss over size: a point for each seed, a line through the means."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    labels = {
        "cut": "cut, not trained",
        "separate": "separate runs, T/2 tokens each",
        "elastic": "one elastic run, T tokens",
    }
    for (arm, label), colour in zip(labels.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        there = [row for row in rows if row[arm] is not None]
        axes.plot(
            [mean(row["parameters"]) / 1e6 for row in there],
            [mean(row[arm]) for row in there],
            color=colour,
            label=label,
        )
        for row in there:
            axes.scatter([count / 1e6 for count in row["parameters"]], row[arm], color=colour, s=14)
    axes.set(xlabel="parameters (millions)", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def draw_choices(logs: dict[int, list[dict[str, float]]], path: Path) -> None:
    """The most likely size of every axis over the steps (mean over layers), and the expected size next to its target."""
    fields = ["size", *(f"choice_{field}" for field in CHOICES)]
    figure = Figure(figsize=(7, 2.2 * len(fields)), dpi=120, layout="constrained")
    for field, axes in zip(fields, figure.subplots(len(fields), 1, sharex=True), strict=True):
        for budget, colour in zip(BUDGETS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
            key = f"size_{budget}" if field == "size" else field.replace("choice_", f"choice_{budget}_", 1)
            for number, log in enumerate(logs.values()):
                xs, ys = [row["step"] for row in log], [row[key] for row in log]
                axes.plot(xs, ys, color=colour, alpha=0.7, linewidth=1, label=None if number else budget)
                if field == "size" and not number:
                    axes.axhline(log[0][f"target_{budget}"], color=colour, linestyle=":", linewidth=1)
        name = field.removeprefix("choice_").replace("_", " ")
        axes.set_ylabel("expected share of the parameters" if field == "size" else name, fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.axes[0].legend(fontsize=8, ncols=3, loc=(0.5, 0.68))
    figure.savefig(path)


if __name__ == "__main__":
    main()
