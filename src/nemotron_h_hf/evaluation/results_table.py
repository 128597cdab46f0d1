"""The results of an evaluation: everything a folder holds, and the table of it for people; scores in percent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..inputs import read_json
from . import harness, held_out, long_context
from .sample_records import Records


def collect(folder: Path, records: Records) -> dict:
    """`bpb`, `long_context` and `harness`, each if there are records of it, with the settings of its samples."""
    by_part: dict[str, list[dict]] = {}
    for key, row in records.by_key.items():
        part = key.split("/")[0]
        by_part.setdefault(part if part in ("bpb", "harness") else "long_context", []).append(row)
    results: dict = {}
    if rows := by_part.get("bpb"):
        results["bpb"] = held_out.summarise(rows) | read_json(folder / "bpb.json")
    if rows := by_part.get("long_context"):
        results["long_context"] = long_context.summarise(rows)
    if rows := by_part.get("harness"):
        results["harness"] = rows
    return results


def table(results: dict) -> list[str]:
    """Lines for everything in `results` (keys `bpb`, `long_context`, `harness`, each there if it was asked for)."""
    lines: list[str] = []
    if found := results.get("bpb"):
        lines += [
            f"bits per byte {found['bits_per_byte']:.4f}   {found['num_documents']:,} documents, "
            f"{found['num_bytes']:,} bytes, {found['num_tokens']:,} tokens, "
            f"window {found['window']:,}, stride {found['stride']:,}",
            "",
        ]
    if found := results.get("long_context"):
        lines += [*long_context_lines(found), ""]
    if found := results.get("harness"):
        lines += [*harness_lines(found), ""]
    return lines[:-1]


def long_context_lines(rows: Sequence[dict]) -> list[str]:
    """A line per task and, below it, per depth; a column per length."""
    lengths = sorted({row["length"] for row in rows})
    scores = {(row["task"], row["depth"], row["length"]): row["score"] for row in rows}
    num_samples = {row["num_samples"] for row in rows if row["depth"] is None}
    asked = str(min(num_samples)) if len(num_samples) == 1 else f"{min(num_samples)} to {max(num_samples)}"
    lines = [f"share of the expected answer found, percent; {asked} samples each"]
    lines.append(f"{'tokens':<24}" + "".join(f"{length:>9,}" for length in lengths) + f"{'mean':>9}")
    for task, depth in sorted({(row["task"], row["depth"]) for row in rows}, key=_order(rows)):
        name = task if depth is None else f"  at depth {depth:.0%}"
        cells = [scores.get((task, depth, length)) for length in lengths]
        there = [cell for cell in cells if cell is not None]
        lines.append(f"{name:<24}" + "".join(map(_percent, [*cells, sum(there) / len(there)])))
    return lines


def _percent(score: float | None) -> str:
    return f"{'-' if score is None else f'{100 * score:.1f}':>9}"


def _order(rows: Sequence[dict]):
    """Tasks in the order they come in, each before its depths."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return lambda name: (tasks.index(name[0]), -1.0 if name[1] is None else name[1])


def harness_lines(rows: Sequence[dict]) -> list[str]:
    """A line per task and metric."""
    lines = [f"{'lm-evaluation-harness':<36}{'metric':<32}{'value':>9}{'stderr':>9}"]
    for row in rows:
        for name, metric, value, stderr in harness.figures(row):
            error = "" if stderr is None else f"{stderr:.4f}"
            lines.append(f"{name:<36}{metric:<32}{value:>9.4f}{error:>9}")
    return lines
