"""The table of a run: every measurement next to its floor and to transformers' own, memory, and the targets."""

from collections.abc import Iterator

from .memory import GB
from .records import Journal, Measurement, Target, ratio


def table(journal: Journal) -> list[str]:
    """The report for people, one string per line."""
    found = journal.targets(journal)
    errors = journal.head.get("correctness", {})
    lines = ["correctness gate passed:", *(f"  {error:8.1e}  {name}" for name, error in errors.items()), ""]
    if not errors:
        lines = ["no side of ours: nothing to check", ""]
    rates = journal.head["rates"]
    lines.append(
        f"measured here: {rates['bytes_per_second'] / 1e9:,.0f} GB/s, {rates['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    )
    lines += ["", *_rows(journal.measurements)]
    if memory := list(_memory(journal)):
        lines += ["", "memory, GB: predicted weights + cache + states + activations = total; measured", *memory]
    if skipped := journal.head.get("skipped"):
        lines += ["", "not run", *(f"  {line}" for line in skipped)]
    if found:
        lines += ["", f"targets, set for {journal.head['targets_are_for']}", *(_target(target) for target in found)]
    return lines


def _rows(measurements: list[Measurement]) -> Iterator[str]:
    yield "seconds: median (least-largest); of the floor: its time over the median; native: how many times longer that takes"
    heads = (
        f"{'rows':>6}{'tokens':>10}{'seconds':>30}{'tokens/s':>12}{'of the floor':>14}{'native':>8}{'warm-up s':>11}"
    )
    yield f"{'':<58}{heads}"
    for m in measurements:
        name = f"{m.part}, {m.side}, {m.variant}"
        if m.failure:
            yield f"{name:<58}{m.rows:>6}{m.context:>10,}  {m.failure}"
            continue
        spread = f"{m.median:.4g} ({min(m.seconds):.4g}-{max(m.seconds):.4g})"
        native = ratio(next((other for other in measurements if _is_native_of(other, m)), None), m)
        cells = f"{'-' if m.rate is None else f'{m.rate:,.1f}':>12}"
        cells += f"{'-' if m.share_of_floor is None else f'{m.share_of_floor:.1%}':>14}"
        cells += f"{'-' if native is None else f'{native:.2f}':>8}{m.warm_up_seconds:>11.1f}"
        yield f"{name:<58}{m.rows:>6}{m.context:>10,}{spread:>30}{cells}"


def _is_native_of(other: Measurement, m: Measurement) -> bool:
    same = (other.part, other.variant, other.rows, other.context) == (m.part, m.variant, m.rows, m.context)
    return same and other.side == "native" and m.side == "ours"


def _memory(journal: Journal) -> Iterator[str]:
    for m in journal.measurements:
        what = f"  {m.part}, {m.side}, {m.variant}, {m.rows} x {m.context:,}: "
        if m.peak_bytes and m.predicted_bytes:
            kinds = ("weights", "kv", "state", "activations")
            parts = " + ".join(f"{m.predicted_bytes[kind] / GB:.2f}" for kind in kinds)
            beyond = "" if journal.head["device"]["kind"] == "cuda" else " beyond what was held before"
            yield f"{what}{parts} = {m.predicted_bytes['total'] / GB:.2f}; {m.peak_bytes / GB:.2f}{beyond}"
        elif m.peak_bytes:
            yield f"{what}{m.peak_bytes / GB:.3f} beyond the weights"
        elif "at_least_bytes" in m.figures:
            yield f"{what}needs more than {m.figures['at_least_bytes'] / GB:.3f} beyond the weights"


def _target(target: Target) -> str:
    value = "-" if target.value is None else f"{target.value:.3g}"
    return f"  {target.verdict:<14}{target.name}: {value} ({'>=' if target.at_least else '<='} {target.limit:g})"
