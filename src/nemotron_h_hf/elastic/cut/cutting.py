"""Cuts a nested model out of its parent's files into an ordinary checkpoint, a tensor at a time, and says what it is.

    report = slice_checkpoint("path/to/parent", "6b", "path/to/small")

The parent is never built: each tensor of the small model is read from its rows in the parent's files, cut, written, and
freed. Finished files are noted in a journal, so a killed run can resume; config.json comes last, so a folder that
has one is whole. Next to the weights are the tokenizer's files, the generation config, and the manifest (manifest.py).

The residual is the largest difference between the logits of the small model, loaded from what was written, and those of the
masked parent, in fp32 on `PROBE_TOKENS` random tokens. It needs the whole parent in memory, so by default it is only
measured for a parent of at most `AUTO_VERIFY_BYTES` in fp32.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig

from ... import manifest
from ...checkpoint import Digest, ShardWriter, plan_shards
from ...cost import num_parameters
from ...model.configuration_nemotron_h import NemotronHConfig
from ...model.loading import limits_of_other_readers, weight_files
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ...model.weights import TensorSpec, find_tensors, name_in_file, released_name
from ...output_folders import refuse_changed, stamps, writing
from ...resumable import Journal, check_room, write_shards
from ...tokenizer_files import TOKENIZER_FILES, copy_files
from ...whole_files import write_text
from ..budgets import Budget
from ..child import Child
from ..child_files import ChildFiles, PendingCut
from ..masks import attach_masks, child_masks
from ..resolve import Request, resolve
from .other_readers import nearest_expressible

AUTO_VERIFY_BYTES = 2**30
PROBE_TOKENS = 64
MAX_RELATIVE_RESIDUAL = 1e-3  # of the largest logit; rounding in fp32 stays far below, a wrong cut far above


@dataclass
class SliceReport:
    """What was cut. `residual` is None if it was not measured; `limits` are what other readers will not take."""

    budget: Budget
    num_parameters: int
    parent_parameters: int
    parent_bytes: int
    bytes_read: int = 0
    bytes_written: int = 0
    files: list[str] = field(default_factory=list)
    files_kept: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    nearest: Budget | None = None
    nearest_parameters: int | None = None
    residual: dict[str, Any] | None = None
    seconds: float = 0.0
    already_there: bool = False  # by the same cut before; checked again, nothing was written


def slice_checkpoint(
    parent: str | Path,
    budget: Request,
    output: str | Path,
    *,
    max_shard_bytes: int | None = None,
    verify: bool | None = None,
    uniform: bool = False,
    progress: Callable[[int, int], object] = lambda num_bytes, total: None,
) -> SliceReport:
    """Write the small model of a budget as its own checkpoint.

    Args:
        parent: folder or hub id; it is only read.
        budget: a name, fraction, need, sizes or `Budget` (resolve.py).
        output: a new or empty folder, or that of the same cut interrupted.
        max_shard_bytes: of a file; None for as many files as large as the parent's largest.
        verify: measure the residual; None does so for a small parent.
        uniform: cut the nearest budget that other readers can express, if this one they cannot.
        progress: hears of the bytes written, and of all there are.

    Raises:
        ValueError: for a budget that does not fit, a parent that is damaged or was changed after its manifest, a folder
            in use, too little room on the disk, or a residual that is too large; the folder then has no config.json.
            For an output that is the parent, holds it or is inside it.
        OSError: if the disk fills on the way; likewise. BlockingIOError if another run is writing there.
    """
    started = time.monotonic()
    source = local_folder(parent)
    with writing(output, source) as target:
        report = _slice(parent, source, budget, target, max_shard_bytes, verify, uniform, progress)
    report.seconds = time.monotonic() - started
    return report


def _slice(
    parent: str | Path,
    source: Path,
    budget: Request,
    target: Path,
    max_shard_bytes: int | None,
    verify: bool | None,
    uniform: bool,
    progress: Callable[[int, int], object],
) -> SliceReport:
    """The work; `target` is locked."""
    seen = stamps(source)
    config = read_parent(source)
    child = resolve(config, budget)
    nearest = nearest_expressible(child)
    if uniform:
        child = nearest
    files, reader = weight_files(source), ChildFiles(child)
    pending = {name_in_file(name, child.config.model_type): cut for name, cut in reader.tensors(files).items()}
    if (source / manifest.NAME).is_file():
        manifest.check_manifest(source / manifest.NAME, files)
    shards = plan_shards(([_spec(name, cut)] for name, cut in pending.items()), _shard_bytes(max_shard_bytes, files))
    total = sum(spec.num_bytes for specs in shards.values() for spec in specs)
    origin = {
        "name": source.resolve().name if Path(parent).is_dir() else str(parent),
        "num_parameters": num_parameters(config),
        "fingerprint": manifest.fingerprint(find_tensors(files)),
    }
    report = SliceReport(child.budget, child.num_parameters, origin["num_parameters"], reader.parent_bytes)
    report.limits = limits_of_other_readers(child.config)
    if nearest is not child:
        report.nearest, report.nearest_parameters = nearest.budget, nearest.num_parameters
    if _finished_before(target, child, origin, shards):
        report.files = report.files_kept = list(shards)
        report.already_there = True
        return report
    check_room(target, total)
    journal = Journal(target, _fingerprint(origin, child, shards), "slice")

    def fill(writer: ShardWriter, specs: Sequence[TensorSpec]) -> None:
        for spec in specs:
            writer.write(spec.name, pending[spec.name].read(), lambda num_bytes: progress(num_bytes, total))

    digests, report.files_kept = write_shards(
        target, shards, fill, journal, lambda num_bytes: progress(num_bytes, total)
    )
    if bad := [name for name, digest in digests.items() if digest.num_nan or digest.num_inf]:
        raise ValueError(
            f"{source} has NaN or infinity in {len(bad)} tensors, {bad[0]} first; config.json was not written"
        )
    report.files, report.bytes_read, report.bytes_written = list(shards), reader.bytes_read, total
    if verify or (verify is None and 4 * report.parent_parameters <= AUTO_VERIFY_BYTES):
        report.residual = measure_residual(source, target, child)
    refuse_changed(seen)
    _finish(source, target, child, origin, digests, report)
    journal.finish()
    return report


def local_folder(parent: str | Path) -> Path:
    """The folder, or that of a hub id, downloaded without code and pickles.

    Raises:
        OSError: for what is neither.
    """
    if Path(parent).is_dir():
        return Path(parent)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(str(parent), allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        raise OSError(f"{parent} is no folder here, and as a hub id it cannot be downloaded: {error}") from error


def read_parent(source: Path) -> NemotronHConfig:
    """The configuration in a folder."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json")
    return NemotronHConfig.from_pretrained(source)


@torch.no_grad()
def measure_residual(source: Path, target: Path, child: Child) -> dict[str, Any]:
    """How far the written model's logits are from the masked parent's; the parent is gone before the small one is loaded.

    Raises:
        ValueError: if that is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, child.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    small = _load(target, child.config)(ids, use_cache=False).logits
    model = _load(source, child.parent)
    attach_masks(model).masks = child_masks(child)
    difference = (model(ids, use_cache=False).logits - small).abs().max().item()
    largest = small.abs().max().item()
    if not difference <= MAX_RELATIVE_RESIDUAL * largest:
        raise ValueError(
            f"{target}: the logits of the cut model are {difference:.1e} from those of the masked parent, the largest is "
            f"{largest:.3g}; the weights were written, config.json was not"
        )
    return {
        "max_difference_of_logits": difference,
        "largest_logit": largest,
        "num_tokens": PROBE_TOKENS,
        "seed": 0,
        "dtype": "float32",
    }


def _load(folder: Path, config: NemotronHConfig) -> NemotronHForCausalLM:
    """A model in fp32 from a folder that has no config.json yet."""
    own = {"config": config, "generation_config": GenerationConfig(), "dtype": torch.float32}
    return NemotronHForCausalLM.from_pretrained(folder, **own)


def _spec(name: str, cut: PendingCut) -> TensorSpec:
    return TensorSpec(name, cut.dtype, tuple(cut.get_shape()))


def _shard_bytes(asked: int | None, files: Sequence[str]) -> int:
    """One file stays one; of several, none larger than the parent's largest."""
    if asked is not None:
        return asked
    return max(Path(file).stat().st_size for file in files) if len(files) > 1 else 2**62


def _fingerprint(origin: dict[str, Any], child: Child, shards: dict[str, list[TensorSpec]]) -> str:
    """What an interrupted run must have had in common with this one."""
    kept = [child.kept.layers, child.config.to_json_string(use_diff=False)]
    plan = [origin["fingerprint"], kept, {file: [spec.name for spec in specs] for file, specs in shards.items()}]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _finished_before(target: Path, child: Child, origin: dict[str, Any], shards: dict[str, list[TensorSpec]]) -> bool:
    """Whether the same cut has ended in this folder.

    Raises:
        ValueError: if it has, and the weights were changed since then.
    """
    path, config = target / manifest.NAME, target / "config.json"
    if any(target.glob("*_journal.jsonl")) or not (path.is_file() and config.is_file()):
        return False
    noted = manifest.read_manifest(path)
    wanted = {"name": child.budget.name, **child.budget.to_dict()}
    if noted.get("parent") != origin or noted.get("budget") != json.loads(json.dumps(wanted)):
        return False
    if config.read_text(encoding="utf-8") != child.config.to_json_string(use_diff=False):
        return False
    files = [str(target / file) for file in shards]
    if sorted(files) != sorted(weight_files(target)):
        return False
    manifest.check_manifest(path, files, full=True)
    return True


def _finish(
    source: Path, target: Path, child: Child, origin: dict[str, Any], digests: dict[str, Digest], report: SliceReport
) -> None:
    """The files next to the weights, the configuration last."""
    budget = {"name": child.budget.name, **child.budget.to_dict()}
    stored = find_tensors(weight_files(target))
    more = {"budget": budget, "parent": origin, "residual": report.residual}
    found = manifest.make_manifest(
        stored, {released_name(name): digest.sha256 for name, digest in digests.items()}, **more
    )
    if found["num_parameters"] != report.num_parameters:
        raise ValueError(f"{target} holds {found['num_parameters']:,} parameters, its config {report.num_parameters:,}")
    code = sorted(path.name for path in source.glob("*.py")) if "auto_map" in child.config.to_dict() else []
    copy_files([*TOKENIZER_FILES, *code], source, target)
    write_text(target / manifest.NAME, manifest.as_text(found))
    write_text(target / "config.json", child.config.to_json_string(use_diff=False))
