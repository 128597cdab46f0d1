"""Stage scores.json: how much neurons and layers matter to the teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from ..compression.depth import layer_order
from ..compression.layer_scores import LayerScores, Narrower, accumulate
from ..compression.mixed_widths import FIELDS
from ..cost import layers_of_kind
from ..elastic.prepare.measuring import batches_of, measure_depth, measure_width
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from .arguments import REMOVAL
from .memory_image import MemoryImage, order_of
from .run import WIDTH_SCORES, Run
from .text import Row


def score(run: Run) -> dict[str, Any]:
    """Score, or go on with it: neurons every minute, layers every few batches are kept."""
    stage, arguments = run.stages["scores"], run.arguments
    if (known := stage.result()) is not None:
        return known
    started, model, rows = time.monotonic(), run.load(), run.text.scoring_rows()
    before = arguments.neuron_score == "before"
    widths = measure_width(model, rows, arguments.batch_size, run.work / WIDTH_SCORES, run.width_mark, before)
    removed = by_removal(run, model, rows[: arguments.layer_samples]) if arguments.layer_score == REMOVAL else {}
    narrow = None
    if not arguments.stream:
        image = MemoryImage.of(model, order_of(run.config, widths, set(run.sizes)))
        run.keep_image(image)
        model, narrow = image.parent, narrower(run, image)
    scores = LayerScores(stage.partial().get("errors", {}))
    batches = batches_of(rows[scores.num_samples : arguments.layer_samples], arguments.batch_size)
    with tqdm(total=arguments.layer_samples, initial=scores.num_samples, unit="row", desc="layers") as bar:
        for done in accumulate(model, batches, scores, run.measures, narrow):
            bar.update(done - bar.n)
            stage.keep(errors=scores.errors)
    return stage.finish(
        pattern=run.config.hybrid_override_pattern, importance=removed | {
            measure: {reduce: scores.importance(measure, reduce) for reduce in ("rank", "mean")} for measure in run.measures
        },
        errors=scores.errors, neurons=WIDTH_SCORES, seconds=time.monotonic() - started,
    )  # fmt: skip


def by_removal(run: Run, model: NemotronHForCausalLM, rows: Sequence[Row]) -> dict[str, dict[str, dict[int, int]]]:
    """Half of the layers, removed one after another: a layer is the more important the longer it stays (compression/depth.py)."""
    count = run.config.num_hidden_layers // 2
    removals = measure_depth(model, rows, count, run.arguments.batch_size, run.work / "depth.json", run.width_mark)
    place = {layer: number for number, layer in enumerate(layer_order(removals))}
    return {REMOVAL: {"rank": place, "mean": place}}


def narrower(run: Run, image: MemoryImage) -> Narrower | None:
    """For a knapsack of widths: MLP or MoE layer -> width -> the block of the model that has it."""
    if not run.arguments.mixed_widths:
        return None
    found: dict[int, dict[int, nn.Module]] = {}
    for kind, field in FIELDS.items():
        for size in run.sizes.get(field, ()):
            stack = image.model_of({field: size}).model.layers if size != getattr(run.config, field) else None
            for layer in layers_of_kind(run.config, kind) if stack is not None else ():
                found.setdefault(layer, {})[size] = stack[layer]
    return found
