"""The family in one file: the teacher in the order of its neurons, with the finalists as budgets of an elastic parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compression.importance import WidthScores
from ..elastic.budgets import Budget, Elastic
from ..elastic.live.saving import write_manifest
from ..elastic.prepare.permuting import permute_checkpoint
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.saving import saving
from ..output_folders import is_made, note_made, writing
from ..tokenizer_files import TOKENIZER_FILES, copy_files
from ..whole_files import write_text
from .memory_image import order_of
from .run import WIDTH_SCORES, Run


def write_family(
    run: Run, scores: Mapping[str, Any], ranked: Mapping[str, Any], benchmarked: Mapping[str, Any]
) -> None:
    """Write it, one tensor at a time; nothing if it is there. Losses are those on the held-out text."""
    values = scores["importance"][run.arguments.layer_score][run.arguments.reduce]
    found = {one["name"]: one for one in ranked["ranked"]}
    budgets = {name: Budget.from_dict(name, {**found[name]["sizes"], "loss": found[name]["loss"]})
               for name in benchmarked["finalists"]}  # fmt: skip
    budgets = {"full": Budget(name="full", trained=True, loss=ranked["parent"]["loss"]), **budgets}
    least_first = sorted(range(run.config.num_hidden_layers), key=lambda layer: values[str(layer)])
    sizes = {name: tuple(sorted(tried, reverse=True)) for name, tried in run.sizes.items()}
    elastic = Elastic(budgets, sizes, tuple(least_first), {"loss": ranked["parent"]["loss"]})
    with writing(run.arguments.family, run.teacher, run.work) as output:
        made_from = {"command": "minipuzzle family", "stage": run.stages["benchmarked"].digest}
        if is_made(output, made_from):
            return
        config = NemotronHConfig.from_dict({**run.config.to_dict(), "elastic": elastic.to_dict()})
        order = order_of(run.config, WidthScores.load(run.work / WIDTH_SCORES, run.width_mark), set(run.sizes))
        with saving(output) as staging:
            digests = permute_checkpoint(run.teacher, run.config, order, staging)
            copy_files(TOKENIZER_FILES, run.teacher, staging)
            write_manifest(staging, {name: digest.sha256 for name, digest in digests.items()})
            write_text(staging / "config.json", config.to_json_string(use_diff=False))
            note_made(staging, made_from)
