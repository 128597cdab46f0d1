"""Results of the runs in one file, and their plot.

python report.py RUNS docs/results/vl
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

KINDS = ("digit in tile", "tile of digit", "how many shapes", "bar")
VARIANTS = ("tags", "no_tags", "no_thumbnail", "blind", "attention")


def main() -> None:
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    found = [json.loads(path.read_text()) for path in sorted(runs.glob("*/result.json"))]
    logs = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in runs.glob("*/log.jsonl")
    }
    (out / "results.json").write_text(json.dumps({"runs": found, "logs": logs}, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(9, 4))
    for place, variant in enumerate(VARIANTS):
        own = [run["accuracy"] for run in found if run["variant"] == variant]
        heights = [statistics.mean(run[kind] for run in own) if own else 0 for kind in KINDS]
        axes.bar(
            [kind + place * 0.16 for kind in range(len(KINDS))], heights, 0.15, label=f"{variant} ({len(own)} runs)"
        )
        cells = " | ".join(cell([run[kind] for run in own]) for kind in KINDS)
        print(f"| {variant} | {len(own)} | {cells} |")
    axes.set_xticks([kind + 0.32 for kind in range(len(KINDS))], KINDS)
    axes.set_ylabel("right answers, held-out pictures")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=80)


def cell(values: list[float]) -> str:
    """The mean, and the least and the most of several."""
    if not values:
        return "-"
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
