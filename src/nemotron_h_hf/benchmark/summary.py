"""The table of a GPU benchmark: every measurement next to its floor, memory next to its prediction, and the targets."""

from collections.abc import Iterator

from .records import Journal, Measurement
from .report import GB, Target

VERDICTS = {True: "met", False: "missed", None: "not measured"}


def table(journal: Journal, found: list[Target]) -> list[str]:
    """The report for people, one string per line; `found` may be empty."""
    errors = journal.head.get("correctness", {})
    lines = ["correctness gate passed:", *(f"  {error:8.1e}  {name}" for name, error in errors.items()), ""]
    if not errors:
        lines = ["no side of ours: nothing to check", ""]
    rates = journal.head["rates"]
    lines.append(
        f"measured here: {rates['bytes_per_second'] / 1e9:,.0f} GB/s, {rates['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    )
    lines += ["", *_rows(journal.measurements)]
    if any(m.peak_bytes for m in journal.measurements):
        lines += [
            "",
            "memory, GB: predicted weights + cache + states + activations = total; measured",
            *_memory(journal),
        ]
    if skipped := journal.head.get("skipped"):
        lines += ["", "not run", *(f"  {line}" for line in skipped)]
    if found:
        lines += ["", f"targets, set for {journal.head['targets_are_for']}", *(_target(target) for target in found)]
    return lines


def _rows(measurements: list[Measurement]) -> Iterator[str]:
    yield "seconds: median (least-largest); of the floor: its time over the median"
    yield f"{'':<48}{'rows':>6}{'tokens':>10}{'seconds':>30}{'tokens/s':>12}{'of the floor':>14}{'warm-up s':>11}"
    for m in measurements:
        name = f"{m.part}, {m.side}, {m.variant}"
        if m.failure:
            yield f"{name:<48}{m.rows:>6}{m.context:>10,}  {m.failure}"
            continue
        spread = f"{m.median:.4g} ({min(m.seconds):.4g}-{max(m.seconds):.4g})"
        cells = f"{'-' if m.rate is None else f'{m.rate:,.1f}':>12}"
        cells += f"{'-' if m.share_of_floor is None else f'{m.share_of_floor:.1%}':>14}{m.warm_up_seconds:>11.1f}"
        yield f"{name:<48}{m.rows:>6}{m.context:>10,}{spread:>30}{cells}"


def _memory(journal: Journal) -> Iterator[str]:
    for m in journal.measurements:
        if m.peak_bytes and m.predicted_bytes:
            parts = " + ".join(
                f"{m.predicted_bytes[kind] / GB:.2f}" for kind in ("weights", "kv", "state", "activations")
            )
            beyond = "" if journal.head["device"]["kind"] == "cuda" else " beyond what was held before"
            total = f"{m.predicted_bytes['total'] / GB:.2f}; {m.peak_bytes / GB:.2f}{beyond}"
            yield f"  {m.part}, {m.side}, {m.variant}, {m.rows} x {m.context:,}: {parts} = {total}"


def _target(target: Target) -> str:
    value = "-" if target.value is None else f"{target.value:.3g}"
    return (
        f"  {VERDICTS[target.passed]:<14}{target.name}: {value} ({'>=' if target.at_least else '<='} {target.limit:g})"
    )
