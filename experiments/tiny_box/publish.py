"""What `run.py train` and `run.py measure` made, into the package: weights, cards, docs/results/tiny_box.

    python experiments/tiny_box/publish.py --output runs/box

It copies OUTPUT/parent over the embedded model, shortens the logs, draws loss.png, and writes the tables between the marks
`<!-- figures -->` of three documents and the facts of MODEL_CARD.md. The same input gives the same files.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch

from nemotron_h_hf import EMBEDDED_MODEL, hub
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.whole_files import write_json, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "tiny_box"
DOCUMENTS = (Path(EMBEDDED_MODEL) / "README.md", ROOT / "MODEL_CARD.md", RESULTS / "README.md")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja")  # fmt: skip
XZ = {"all held-out files as one stream": 1.586, "file by file": 1.878}  # of docs/results/tiny, of the same text
LOGGED = ("step", "tokens", "loss", "tokens_per_second")
BETWEEN = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
FACTS = re.compile(r"(?<=## Facts\n).*?(?=## Use\n)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/box"), help="of run.py")
    output = parser.parse_args().output
    card = json.loads((output / "card.json").read_text(encoding="utf-8"))
    for name in FILES:
        shutil.copyfile(output / "parent" / name, Path(EMBEDDED_MODEL) / name)
    logs = {stage: read_log(output / folder) for stage, folder in (("pretrain", "pretrained"), ("elastic", "elastic"))}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for stage, rows in logs.items():
        write_text(RESULTS / f"{stage}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tokens = {stage: rows[-1]["tokens"] for stage, rows in logs.items()}
    write_json(RESULTS / "card.json", {"sizes": card, "tokens": tokens, "machine": machine(), "versions": versions()})
    draw(logs)
    for document in DOCUMENTS:
        replace(document, BETWEEN, table(card, tokens))
    replace(ROOT / "MODEL_CARD.md", FACTS, FACTS.search(hub.model_card(EMBEDDED_MODEL, "owner/name"))[0])
    return 0


def read_log(folder: Path) -> list[dict]:
    """The rows of a run, with the loss and the cross-entropy of each size."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {name: round(value, 4) for name, value in row.items() if name in LOGGED or name.startswith("cross_entropy_")}
        for row in rows
        if "loss" in row
    ]


def table(card: Mapping[str, Mapping], tokens: Mapping[str, int]) -> str:
    """A row for each size, the largest first, and what `xz` makes of the held-out files."""
    whole = max(figures["parameters"] for figures in card.values())
    parent = next(figures for figures in card.values() if figures["parameters"] == whole)["bits_per_byte_1024"]
    lines = [
        "| budget | parameters | bytes | bits per byte, window 1024, stride 512 | above the whole | window 2048, stride 1024 "
        "| docstring loss | functions that parse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(card.items(), key=lambda item: -item[1]["parameters"]):
        above = "" if row["parameters"] == whole else f"{row['bits_per_byte_1024'] / parent - 1:.1%}"
        lines.append(
            f"| `{name}` | {row['parameters']:,} ({row['parameters'] / whole:.1%}) | {row['bytes']:,} "
            f"| {row['bits_per_byte_1024']:.3f} "
            f"| {above} | {row['bits_per_byte_2048']:.3f} | {row['docstring_loss']:.3f} | {row['parsing_share']:.1%} of 200 |"
        )
    lines += [f"| `xz -9`, {what} | | | {bits:.3f} | | | | |" for what, bits in XZ.items()]
    seen = f"{tokens['pretrain']:,} tokens of pretraining, then {tokens['elastic']:,} of elastic training"
    return "\n".join([*lines, "", f"After {seen}; one run, seed 0.", ""])


def draw(logs: Mapping[str, list[dict]]) -> None:
    """Cross-entropy over tokens: pretraining, then each size."""
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    first = logs["pretrain"][-1]["tokens"]
    curves = {"pretrain": ([row["tokens"] for row in logs["pretrain"]], [row["loss"] for row in logs["pretrain"]])}
    for column in sorted({name for row in logs["elastic"] for name in row if name.startswith("cross_entropy_")}):
        rows = [row for row in logs["elastic"] if row.get(column, 0) > 0]
        curves[column.removeprefix("cross_entropy_")] = (
            [first + row["tokens"] for row in rows],
            [row[column] for row in rows],
        )
    for label, (tokens, losses) in curves.items():
        averages = [sum(piece) / len(piece) for piece in (losses[max(0, i - 4) : i + 1] for i in range(len(losses)))]
        axes.plot([count / 1e6 for count in tokens], averages, label=label)
    axes.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token), mean of 5 lines")
    axes.set_ylim(top=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "loss.png", metadata={"Software": None})


def replace(document: Path, place: re.Pattern, text: str) -> None:
    """Put `text` at the one place of a document."""
    content = document.read_text(encoding="utf-8")
    if len(place.findall(content)) != 1:
        raise ValueError(f"{document} has {len(place.findall(content))} places for {place.pattern}: allowed is 1")
    write_text(document, place.sub(lambda _: text, content))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
