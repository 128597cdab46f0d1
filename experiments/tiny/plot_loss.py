"""Draw loss over tokens of the runs: `python experiments/tiny/plot_loss.py` writes loss.png next to the logs."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "tiny"
RUNS = {
    "pretrain_long": "Nemotron-H (M-M*-M-) by pretrain, the embedded model",
    "nemotron-h": "Nemotron-H by train-tiny, the first one",
    "llama": "Llama, same parameters, by train-tiny",
}
WINDOW = 5  # log lines averaged: a line is the mean of 10 steps of 2 windows, which is noisy


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    for name, label in RUNS.items():
        lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
        [line] = axes.plot(tokens, losses, alpha=0.2)
        axes.plot(tokens, running_mean(losses), color=line.get_color(), label=label)
    axes.set(xlabel="training tokens (millions)", ylabel="training loss (nats per token)")
    axes.set_ylim(top=6)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(FOLDER / "loss.png")


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and up to WINDOW - 1 before it."""
    pieces = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
    return [sum(piece) / len(piece) for piece in pieces]


if __name__ == "__main__":
    main()
