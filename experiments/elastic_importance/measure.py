"""Does the order matter? Held-out loss of the embedded model cut to 3/4 of its widths, untrained, in several orders.

    nice -n 10 python experiments/elastic_importance/measure.py

Orders: by importance (compression/importance.py); by importance, but with one order of channels for all heads of a layer,
as NVIDIA's tool has it, rather than one for each head; the order of the released weights; five random ones, all inside their
groups. Every axis is cut alone, then all together. Text: this Python's standard library, scored on 64 rows of 512 tokens,
losses on 16 rows of held-out files. Writes docs/results/elastic_importance; about 70 seconds of one core.

scores/ holds the scores themselves and a plot for each axis, as the command writes them into a parent:

    nemotron-h elasticize src/nemotron_h_hf/assets/nemotron-h-tiny parent --rows 64 --held_out_rows 16 --sequence_length 512 \\
        --dtype float32
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.compression.importance import Importance, importance_of, importance_order
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.masks import attach_masks, child_masks
from nemotron_h_hf.elastic.prepare.measuring import mean_loss, measure_width
from nemotron_h_hf.elastic.prepare.permuting import permute_model
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.scripts.elasticize import make_rows
from nemotron_h_hf.slicing import Kept, everything

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "elastic_importance"
SIZES = {
    "hidden_size": 144,
    "intermediate_size": 432,
    "mamba_num_heads": 4,
    "mamba_head_dim": 48,
    "num_attention_heads": 2,
}
SEEDS = range(5)
TEXT = {"calibration": None, "rows": 64, "held_out_rows": 16, "sequence_length": 512, "seed": 0}


def main() -> None:
    """Measure every order, write the table and the plot."""
    torch.set_num_threads(1)
    started = time.process_time()
    rows, held_out = make_rows(argparse.Namespace(**TEXT), EMBEDDED_MODEL)
    model = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    importance = importance_of(model.config, measure_width(model, rows, 8, None, ""))
    orders = {"importance": importance_order(model.config, importance)}
    orders["one channel order for all heads"] = importance_order(model.config, with_shared_channels(importance))
    orders["as released"] = everything(model.config)
    orders |= {f"random {seed}": random_order(model, importance, seed) for seed in SEEDS}
    budgets = [Budget(name=field, **{field: size}) for field, size in SIZES.items()]
    budgets.append(Budget(name="all together", **SIZES))
    losses = {name: losses_in(model, order, budgets, held_out) for name, order in tqdm(orders.items(), unit="order")}
    result = {
        "text": TEXT, "sizes": SIZES, "parent": mean_loss(model, held_out, 8), "losses": losses,
        "cpu_seconds": round(time.process_time() - started), "torch": torch.__version__,
    }  # fmt: skip
    (FOLDER / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, FOLDER / "results.png")
    print(as_table(result))


def with_shared_channels(importance: Importance) -> Importance:
    """Every head ranks its channels by the L2 norm of their scores over the layer's heads."""
    shared = {index: values.norm(dim=0).expand_as(values) for index, values in importance.channels.items()}
    return Importance(**{**vars(importance), "channels": shared})


def random_order(model: NemotronHForCausalLM, importance: Importance, seed: int) -> Kept:
    """An order by random scores, inside the same groups."""
    generator = torch.Generator().manual_seed(seed)

    def some(values: Tensor) -> Tensor:
        return torch.rand(values.shape, generator=generator)

    scores = {
        name: {index: some(values) for index, values in found.items()} if isinstance(found, dict) else some(found)
        for name, found in vars(importance).items()
    }
    return importance_order(model.config, Importance(**scores))


def losses_in(model: NemotronHForCausalLM, order: Kept, budgets: list[Budget], held_out: list) -> dict[str, float]:
    """Held-out loss of each budget when the weights are in this order."""
    parent = copy.deepcopy(model)
    permute_model(parent, order)
    masked, losses = attach_masks(parent), {}
    for budget in budgets:
        masked.masks = child_masks(resolve(parent.config, budget))
        losses[budget.name] = round(mean_loss(parent, held_out, 8), 5)
    return losses


def as_table(result: dict) -> str:
    """Markdown: a line for each axis."""
    lines = [f"parent {result['parent']:.3f}", "", "| 3/4 of | importance | one channel order | as released | random: mean "
             "(least to largest) |", "|---|---|---|---|---|"]  # fmt: skip
    for axis in result["losses"]["importance"]:
        drawn = [losses[axis] for name, losses in result["losses"].items() if name.startswith("random")]
        named = [f"{result['losses'][name][axis]:.3f}" for name in result["losses"] if not name.startswith("random")]
        spread = f"{statistics.mean(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f})"
        lines.append(f"| {axis} | {' | '.join(named)} | {spread} |")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Loss of every order, axis by axis."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    markers = {"importance": ("o", "tab:green"), "one channel order for all heads": ("_", "tab:purple"),
               "as released": ("x", "tab:orange")}  # fmt: skip
    for name, losses in result["losses"].items():
        marker, colour = markers.get(name, (".", "0.6"))
        label = "random, five seeds" if name == "random 0" else None if name.startswith("random") else name
        axes.plot(list(losses), list(losses.values()), marker, color=colour, label=label, markersize=9)
    axes.axhline(result["parent"], color="0.3", linewidth=1, linestyle="--", label="the whole model")
    axes.set(ylabel="held-out loss (nats per token)", title="the embedded model at 3/4 of its widths, untrained")
    axes.tick_params(axis="x", labelsize="small", rotation=12)
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
