"""LoRA against full fine-tuning of the embedded model, on docstrings: search, runs, results.json and sft.png.

    python experiments/sft/make_data.py --output runs/docstrings
    python experiments/sft/compare.py search --threads 1     # a learning rate for each side, on the validation files
    python experiments/sft/compare.py train --threads 1      # the best one, three seeds, on the held-out files
    python experiments/sft/compare.py report                 # results.json and sft.png

Every run is one `nemotron-h sft` command, which is printed first. A run that is finished is not repeated, one that was
stopped resumes.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.scripts import sft

FOLDER, RUNS = Path(__file__).parents[2] / "docs" / "results" / "sft", Path("runs/docstrings")
SIDES = {"full": [], "lora": ["--lora_rank", "16", "--lora_alpha", "32"]}
LEARNING_RATES = {"full": ("3e-4", "1e-3", "3e-3"), "lora": ("1e-3", "3e-3", "1e-2")}
SEEDS = (0, 1, 2)
SEARCH = ["--total_tokens", "60K", "--eval_data", str(RUNS / "validation.jsonl")]
LONG = ["--total_tokens", "200K", "--eval_data", str(RUNS / "held_out.jsonl"),
         "--eval_strategy", "steps", "--eval_steps", "40"]  # fmt: skip
COMMON = ["--data", str(RUNS / "train.jsonl"), "--chat_template", str(FOLDER / "chat_template.jinja"),
          "--sequence_length", "512", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "64",
          "--save_steps", "50", "--save_total_limit", "1", "--logging_steps", "5", "--use_cpu"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("search", "train", "report"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run (1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of train and report (0 1 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {"search": search, "train": lambda: train(arguments.seeds), "report": lambda: report(arguments.seeds)}
    steps[arguments.step]()


def search() -> None:
    """Short runs with seed 0, each with its own warm-up and decay."""
    for side, rates in LEARNING_RATES.items():
        for rate in rates:
            run(f"search-{side}-{rate}", side, rate, 0, SEARCH)
        print(f"{side}: {best_rate(side)} of {', '.join(rates)}", flush=True)


def train(seeds: Sequence[int]) -> None:
    """200,000 tokens of rows (a pass is 336,223) with the learning rate found, for each seed; the sides take turns."""
    for seed in seeds:
        for side in SIDES:
            run(f"{side}-{seed}", side, best_rate(side), seed, LONG)


def run(name: str, side: str, rate: str, seed: int, more: Sequence[str]) -> None:
    """One command, unless it was finished before."""
    if "after" in held_out(name):
        return
    words = [*COMMON, *SIDES[side], "--learning_rate", rate, "--seed", str(seed), *more]
    words += ["--output_dir", str(RUNS / name)]
    print(f"nemotron-h sft {shlex.join(words)}", flush=True)
    sft.main(words)


def held_out(name: str) -> dict[str, float]:
    """Losses before and after, in nats per answer token, as far as the run has come."""
    path = RUNS / name / "held_out.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def best_rate(side: str) -> str:
    return min(LEARNING_RATES[side], key=lambda rate: held_out(f"search-{side}-{rate}")["after"])


def report(seeds: Sequence[int]) -> None:
    """results.json and the picture, from the runs."""
    results = {
        "task": json.loads((RUNS / "facts.json").read_text(encoding="utf-8")),
        "unit": "nats per token of the answers, their end included",
        "search": {
            side: {rate: held_out(f"search-{side}-{rate}")["after"] for rate in rates}
            for side, rates in LEARNING_RATES.items()
        },
        "sides": {side: summary(side, seeds) for side in SIDES},
        "known_from_pretraining": known_from_pretraining(seeds),
    }
    (FOLDER / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    draw(results)


def summary(side: str, seeds: Sequence[int]) -> dict:
    """Before and after of each seed, mean and standard deviation over the seeds, and the curve of each."""
    losses = [held_out(f"{side}-{seed}") for seed in seeds]
    after = [loss["after"] for loss in losses]
    return {
        "learning_rate": best_rate(side),
        "before": losses[0]["before"],
        "after": after,
        "after_mean": mean(after),
        "after_stdev": stdev(after) if len(after) > 1 else None,
        "seeds": list(seeds),
        "curves": [curve(f"{side}-{seed}") for seed in seeds],
    }


def curve(name: str) -> list[tuple[int, float]]:
    """(tokens of rows, held-out loss) during a run."""
    lines = (RUNS / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"] * 4 * 512, row["eval_loss"]) for row in rows if "eval_loss" in row]


def known_from_pretraining(seeds: Sequence[int]) -> dict[str, float]:
    """Loss of the answers' words alone, without their end: of the untrained model asked as its own training text would.

    There a docstring stands under its function, after three quotes. What fine-tuning gains beyond this is the task, the
    rest of the gain is the new format.
    """
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    lines = (RUNS / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    prompts = {
        "as source": lambda question: f'{question}\n{" " * (8 if question.startswith("class") else 4)}"""',
        "as chat": lambda question: f"# user\n{question}\n# assistant\n",
    }

    def words_loss(folder: Path | str, prompt: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        nats = tokens = 0
        for question, answer in pairs:
            given, words = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompts[prompt](question), answer)
            )
            with torch.no_grad():
                logits = model(torch.tensor([given + words])).logits[0, len(given) - 1 : -1]
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(words), reduction="sum").item()
            tokens += len(words)
        return nats / tokens

    found = {f"before, {name}": words_loss(EMBEDDED_MODEL, name) for name in prompts}
    return found | {f"after, full, seed {seed}": words_loss(RUNS / f"full-{seed}/model", "as chat") for seed in seeds}


def draw(results: dict) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colours = {"full": "tab:blue", "lora": "tab:orange"}
    for side, found in results["sides"].items():
        for number, points in enumerate(found["curves"]):
            tokens, losses = zip(*[(0, found["before"]), *points], strict=True)
            label = f"{side}, learning rate {found['learning_rate']}" if number == 0 else None
            axes.plot([count / 1e3 for count in tokens], losses, color=colours[side], alpha=0.7, label=label)
    axes.set(xlabel="training tokens (thousands)", ylabel="held-out loss (nats per answer token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "sft.png")


if __name__ == "__main__":
    main()
