"""Stage ranked.json: candidates on held-out text, the best first, and controls that chose without importance."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ..compression.candidates import KINDS, Candidate, with_sizes
from ..compression.ranking import Progress, places, rank
from ..cost import layers_of_kind
from ..elastic.prepare.measuring import batches_of
from ..environment import can_measure, reset_peak, status_bytes
from .memory_image import MemoryImage
from .run import Run
from .searching import all_costs
from .stage_files import Stage

STEP = 8  # neurons; widths of a control come in it


def rank_candidates(run: Run, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Rank, or go on with it."""
    stage = run.stages["ranked"]
    if (known := stage.result()) is not None:
        return known
    rows = run.text.ranking_rows
    batches = list(batches_of(rows, run.arguments.batch_size))
    image = run.image()
    resident = begin_peak()
    progress = _rank(image, candidates, batches, stage, "importance")
    taken = None if resident is None else status_bytes("VmHWM") - resident
    results = {name: tally.result() for name, tally in progress.tallies.items()}
    place, by_name = places(results), {one.name: one for one in candidates}
    order = sorted(place, key=lambda name: (place[name], name))
    ranked = [{**by_name[name].to_dict(), **results[name], "place": place[name]} for name in order]
    controls = [] if not run.arguments.controls else _controls(run, ranked, batches, stage)
    seconds = sum(one["seconds"] for one in ranked)
    alone = sum(len(one["sizes"]["layers"]) for one in ranked) * len(batches)
    return stage.finish(
        num_tokens=progress.parent.num_tokens, parent=progress.parent.result(), ranked=ranked, controls=controls,
        measured={
            "seconds": seconds, "seconds_per_candidate": seconds / len(ranked), "extra_memory_bytes": taken,
            "layers_run": sum(one["layers_run"] for one in ranked), "layers_without_sharing": alone,
        },
    )  # fmt: skip


def begin_peak() -> int | None:
    """Bytes resident in this process, whose peak begins anew here; None where that cannot be measured."""
    if not can_measure():
        return None
    reset_peak()
    return status_bytes("VmRSS")


def _rank(
    image: MemoryImage, candidates: Sequence[Candidate], batches: Sequence[dict], stage: Stage, key: str
) -> Progress:
    kept = stage.partial()
    progress = Progress.from_dict(kept[key]) if key in kept else Progress()
    total, done = len(candidates) * len(batches), len(candidates) * progress.batch + progress.position
    with tqdm(total=total, initial=done, unit="candidate", desc=f"ranking, {key}") as bar:
        for _ in rank(image.parent, image.model_of, candidates, batches, progress):
            bar.update()
            stage.keep(**{**kept, key: progress.to_dict()})
    stage.keep(now=True, **{**kept, key: progress.to_dict()})
    return progress


def _controls(run: Run, ranked: Sequence[dict], batches: Sequence[dict], stage: Stage) -> list[dict[str, Any]]:
    """Each rule's choice of as many layers and neurons as the best candidate keeps, or of one axis alone, measured."""
    found = []
    for rule, order, sizes in control_sizes(run, ranked):
        entry = {"rule": rule, "order": order, "sizes": sizes}
        if sizes is not None:
            control = Candidate(f"control-{rule}", sizes, {}, {})
            entry |= _rank(run.image(order), [control], batches, stage, rule).tallies[control.name].result()
        found.append(entry)
    return found


def control_sizes(run: Run, ranked: Sequence[dict]) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(rule, order of the neurons, sizes, None where the rule has no model that fits)."""
    best = next(one for one in ranked if one["name"] != "mixed")
    alone = {name: size for name, size in best["sizes"].items() if name != "layers"}
    whole = {name: getattr(run.config, name) for name in alone}
    deep = next((one["sizes"] for one in ranked if all(one["sizes"].get(name) == whole[name] for name in whole)), None)
    kept = {kind: layers_of_kind(run.config, kind) for name, kind in KINDS.items() if name in best["counts"]}
    numbers = {KINDS[name]: number for name, number in best["counts"].items()}
    values = run.stages["scores"].result()["importance"][run.arguments.layer_score][run.arguments.reduce]

    def choose(key) -> dict[str, Any]:
        layers = [layer for kind, own in kept.items() for layer in sorted(own, key=key)[: numbers[kind]]]
        return {"layers": sorted(layers), **alone}

    count = run.config.num_hidden_layers
    controls = [
        ("reversed", "reversed", choose(lambda layer: values[str(layer)])),
        ("first and last", "importance", choose(lambda layer: min(layer, count - 1 - layer))),
        ("depth alone", "importance", deep),
        ("width alone", "importance", _widest(run)),
    ]
    for number in range(run.arguments.controls):
        draw = random.Random(f"{run.arguments.seed}/{number}")
        drawn = {layer: draw.random() for layer in range(count)}
        controls.append((f"random {number}", f"random:{run.arguments.seed + number}", choose(drawn.get)))
    return sorted(controls, key=lambda control: control[1])  # those of one order share an image


def _widest(run: Run) -> dict[str, Any] | None:
    """All layers, and the most neurons in each MLP that fit; None where there is no such model, or a table of times has none."""
    own = run.config.intermediate_size
    if "intermediate_size" not in run.sizes or not isinstance(own, int) or "seconds" in run.arguments.limits():
        return None
    costs, limits = all_costs(run), run.arguments.limits()

    def too_large(steps: int) -> bool:
        config = with_sizes(run.config, {"intermediate_size": steps * STEP})
        return any(sum(costs[name](config).values()) > most for name, most in limits.items())

    steps = bisect_left(range(1, own // STEP + 1), True, key=too_large)
    layers = list(range(run.config.num_hidden_layers))
    return {"layers": layers, "intermediate_size": steps * STEP} if steps else None
