"""Measures a model that becomes a parent: width scores, depth scores, losses; each is kept and not repeated.

A record has a fingerprint of model and text; a record of another model is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...compression.depth import Removal, num_passes, remove_layers
from ...compression.importance import WidthScores, accumulate
from ...inputs import read_json
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ...whole_files import write_json
from ..budgets import Budget
from ..child import Child, child_of
from ..masks import MaskedForward, Masks, attach_masks, child_masks

SAVE_EVERY_SECONDS = 60.0
MAX_LOGITS = 2**27  # in a batch whose logits are compared: 512 MiB in fp32, several times
Row = Mapping[str, Tensor]
"""`input_ids` (l), and perhaps `position_ids` and `labels` (l), as data/packing.py makes them; without padding."""


def fingerprint(model: NemotronHForCausalLM, rows: Sequence[Row]) -> str:
    """A fingerprint of a model and a text: the configuration, all norms (they change with any training), the tokens."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for norm in (*(block.norm for block in model.model.layers), model.model.norm_f):
        digest.update(norm.weight.detach().double().cpu().numpy().tobytes())
    for row in rows:
        for name in sorted(row):
            digest.update(row[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def measure_width(
    model: NemotronHForCausalLM, rows: Sequence[Row], batch_size: int, path: Path | None, mark: str,
    before_activation: bool = False,
) -> WidthScores:  # fmt: skip
    """Score all rows, continuing after those in the file."""
    scores = WidthScores.empty() if path is None else WidthScores.load(path, mark)
    saved = time.monotonic()
    with tqdm(total=len(rows), initial=scores.num_rows, unit="row", desc="width") as bar:
        for done in accumulate(model, batches_of(rows[scores.num_rows :], batch_size), scores, before_activation):
            bar.update(done - bar.n)
            if path is not None and (done == len(rows) or time.monotonic() - saved > SAVE_EVERY_SECONDS):
                scores.save(path, mark)
                saved = time.monotonic()
    return scores


def measure_depth(
    model: NemotronHForCausalLM, rows: Sequence[Row], num_removals: int, batch_size: int, path: Path | None, mark: str
) -> list[Removal]:
    """Remove layers, continuing after those in the file."""
    entries = read_record(path, mark).get("removals", [])
    done = [Removal(e["layer"], {int(j): s for j, s in e["scores"].items()}) for e in entries][:num_removals]
    count, length = model.config.num_hidden_layers, rows[0]["input_ids"].shape[-1] if rows else 1
    fitting = max(1, MAX_LOGITS // (length * model.config.vocab_size))
    batches = list(batches_of(rows, min(batch_size, fitting)))
    total = len(batches) * (num_passes(count, num_removals) - num_passes(count, len(done)))
    masked = attach_masks(model)
    try:
        with tqdm(total=total, unit="pass", desc="depth") as bar:
            logits = logits_without(model, masked)
            for removal in remove_layers(logits, batches, count, num_removals, list(done), bar.update):
                done.append(removal)
                write_record(path, mark, removals=[asdict(removal) for removal in done])
                bar.set_postfix_str(f"layer {removal.layer}: {removal.scores[removal.layer]:.2e}")
    finally:
        masked.remove()
    return done


def measure_losses(
    model: NemotronHForCausalLM, rows: Sequence[Row], children: Sequence[Child], batch_size: int, path: Path | None,
    mark: str,
) -> dict[str, float]:  # fmt: skip
    """Mean loss per token (nats) of the whole model and of each child, by `key_of`, continuing after those in the file."""
    losses = read_record(path, mark).get("losses", {})
    masked = attach_masks(model)
    try:
        with tqdm([child_of(model.config, Budget(name="whole")), *children], unit="size", desc="losses") as bar:
            for child in bar:
                key = key_of(child.budget)
                if key not in losses:
                    masked.masks = child_masks(child, model.device)
                    losses[key] = round(mean_loss(model, rows, batch_size), 6)
                    write_record(path, mark, losses=losses)
                bar.set_postfix_str(f"{child.name} {losses[key]:.4f}")
    finally:
        masked.remove()
    return losses


@torch.no_grad()
def mean_loss(model: NemotronHForCausalLM, rows: Sequence[Row], batch_size: int) -> float:
    """Cross-entropy in nats per predicted token."""
    total, count = 0.0, 0
    for batch in batches_of(rows, batch_size):
        labels = batch.get("labels", batch["input_ids"])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
        output = model(
            **inputs, labels=labels.to(model.device), num_items_in_batch=1, skip_logits=True, use_cache=False
        )
        total += float(output.loss)
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def logits_without(model: NemotronHForCausalLM, masked: MaskedForward) -> Callable[[Row, frozenset[int]], Tensor]:
    """The model's logits with layers bypassed."""

    def logits(batch: Row, gone: frozenset[int]) -> Tensor:
        kept = torch.ones(model.config.num_hidden_layers)
        kept[list(gone)] = 0
        masked.masks = Masks(layers=kept) if gone else None
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
        return model(**inputs, use_cache=False).logits

    return logits


def batches_of(rows: Sequence[Row], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Rows, `batch_size` at a time, each tensor (b, l)."""
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def key_of(budget: Budget) -> str:
    """A budget by its sizes, not by its name."""
    return json.dumps(budget.sizes())


def read_record(path: Path | None, mark: str) -> dict[str, Any]:
    """What was measured; {} if nothing yet.

    Raises:
        ValueError: if it is of another model or text.
    """
    if path is None or not path.exists():
        return {}
    record = read_json(path)
    if record.get("fingerprint") != mark:
        raise ValueError(f"{path} was measured on another model or other text; remove it to begin again")
    return record


def write_record(path: Path | None, mark: str, **record: Any) -> None:
    """Write whole or not at all."""
    if path is not None:
        write_json(path, {"fingerprint": mark, **record})
