"""What a conversion will do, tensor by tensor, decided before a byte is read: jobs, what is left over, what is missing.

A job is one Megatron tensor and the Hugging Face tensors with the same numbers; either side may be the source. The
rearranging itself is `to_hf` and `to_megatron`, which apply the functions of `layouts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import Checkpoint, TensorSpec, stays_float32

from . import layouts
from .names import FLAT, HEADS, PARTS, QKV, VOCAB, Link
from .source_checkpoint import SourceCheckpoint
from .vision import NOT_IN_MEGATRON, Config, language, links


@dataclass(frozen=True)
class Job:
    """Source tensors, the tensors made of them, and how."""

    link: Link
    sources: tuple[TensorSpec, ...]
    targets: tuple[TensorSpec, ...]
    places: str  # the files that the sources are in, for people

    @property
    def how(self) -> str:
        """The rearrangement in words."""
        words = {
            QKV: "qkv groups",
            HEADS: "qkv heads",
            PARTS: "+".join(part for part, _ in self.link.parts),
            VOCAB: "vocabulary rows",
        }
        cast = {s.dtype for s in self.sources} != {t.dtype for t in self.targets}
        return words.get(self.link.layout, "as it is") + (", cast" if cast else "")


@dataclass
class Plan:
    """All jobs in order, and the names on the source's side that have no part in them."""

    config: Config
    jobs: list[Job]
    ignored: dict[str, str] = field(default_factory=dict)  # name -> why
    missing: list[str] = field(default_factory=list)  # allowed by the user
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> NemotronHConfig:
        """The configuration of the language model."""
        return language(self.config)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(spec.num_bytes for job in self.jobs for spec in job.targets)

    @property
    def num_elements(self) -> int:
        """Elements of all tensors that will be written."""
        return sum(spec.num_elements for job in self.jobs for spec in job.targets)

    def fingerprint(self, *settings: Any) -> str:
        """The same for the same sources, targets and settings; a conversion is resumed only under the same one."""
        jobs = [(job.sources, job.targets, job.link.layout, job.places) for job in self.jobs]
        content = [jobs, self.config.to_json_string(use_diff=False), settings]
        return sha256(json.dumps(content, default=str).encode()).hexdigest()


def plan_to_hf(
    checkpoint: SourceCheckpoint,
    config: Config,
    dtype: torch.dtype | None = None,
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Plan:
    """Plan Megatron to Hugging Face; `dtype` None keeps each tensor's own.

    Raises:
        ValueError: for names that are unknown, missing or there twice, and shapes that contradict the configuration.
    """
    plan = Plan(config, [], dict(checkpoint.ignored))
    used, missing = set(), []
    for link in links(config):
        present = [name for name in link.megatron if name in checkpoint and name not in used]
        if len(present) > 1:
            raise ValueError(f"{' and '.join(present)} are both there; they are two spellings of one tensor")
        if not present:
            missing.append(link.megatron[0])
            continue
        used.add(present[0])
        source = checkpoint.spec(present[0])
        expected = link.shape if link.layout != VOCAB else (source.shape[0], *link.shape[1:])
        _require_float(source)
        if source.shape != expected or source.shape[0] < link.shape[0]:
            raise ValueError(f"{present[0]} has shape {source.shape}, the configuration asks for {link.shape}")
        targets = [
            TensorSpec(name, target_dtype(name, source.dtype, dtype), shape)
            for name, shape in zip(link.hf, link.hf_shapes, strict=True)
        ]
        plan.jobs.append(Job(link, (source,), tuple(targets), " ".join(checkpoint.entries[present[0]].sources)))
    _settle(plan, [name for name in checkpoint if name not in used], missing, allow_unused, allow_missing)
    return plan


def plan_to_megatron(
    checkpoint: Checkpoint,
    config: Config,
    vocab_multiple: int,
    dtype: torch.dtype | None = None,
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Plan:
    """Plan Hugging Face to Megatron, the vocabulary padded with zeros to a multiple of `vocab_multiple` rows.

    Raises:
        ValueError: as `plan_to_hf`, and when q, k and v of a layer have different dtypes.
    """
    plan = Plan(config, [], {name: "computed, no weights" for name in checkpoint if name.startswith(NOT_IN_MEGATRON)})
    used, missing = set(plan.ignored), []
    for link in links(config):
        absent = [name for name in link.hf if name not in checkpoint]
        used.update(link.hf)
        if absent:
            missing += absent
            continue
        sources = tuple(checkpoint.spec(name) for name in link.hf)
        for source, shape in zip(sources, link.hf_shapes, strict=True):
            _require_float(source)
            if source.shape != shape:
                raise ValueError(f"{source.name} has shape {source.shape}, the configuration asks for {shape}")
        if len({source.dtype for source in sources}) > 1:
            raise ValueError(f"{' and '.join(link.hf)} have different dtypes, Megatron stores them as one tensor")
        shape = link.shape
        if link.layout == VOCAB:
            shape = (layouts.padded_rows(shape[0], vocab_multiple), *shape[1:])
        target = TensorSpec(link.megatron[0], target_dtype(link.hf[0], sources[0].dtype, dtype), shape)
        plan.jobs.append(Job(link, sources, (target,), ""))
    _settle(plan, [name for name in checkpoint if name not in used], missing, allow_unused, allow_missing)
    return plan


def target_dtype(hf_name: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype to write: the stored one if none is asked for, and always for what must stay float32."""
    if asked is None or not stored.is_floating_point or stays_float32(hf_name):
        return stored
    return asked


def _require_float(spec: TensorSpec) -> None:
    if not spec.dtype.is_floating_point:
        raise ValueError(f"{spec.name} is stored as {spec.dtype}: allowed for weights are floating-point numbers")


def _settle(
    plan: Plan, unused: list[str], missing: list[str], allow_unused: Sequence[str], allow_missing: Sequence[str]
) -> None:
    """Left-over and missing tensors are errors, unless the user allows them by name."""
    refused = [name for name in unused if not _allowed(name, allow_unused)]
    if refused:
        hint = (
            "; quantizer state of ModelOpt cannot be converted" if any("_quantizer" in name for name in refused) else ""
        )
        raise ValueError(f"{len(refused)} tensors have no place in the model: {some(refused)}{hint} "
                         f"(--allow-unused leaves them out by name)")  # fmt: skip
    lacking = [name for name in missing if not _allowed(name, allow_missing)]
    if lacking:
        raise ValueError(f"{len(lacking)} tensors of the model are missing: {some(lacking)} "
                         f"(--allow-missing NAME continues without one)")  # fmt: skip
    plan.ignored |= {name: "allowed by --allow-unused" for name in unused}
    plan.missing = missing


def _allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few of many names."""
    return ", ".join(names[:count]) + (f", ... ({len(names)} in total)" if len(names) > count else "")


def to_hf(job: Job, tensor: Tensor) -> list[Tensor]:
    """The HF tensors of a whole Megatron tensor, in the order of the job's targets; views where possible."""
    if job.link.layout == QKV:
        return list(layouts.split_qkv(tensor, *job.link.groups))
    if job.link.layout == HEADS:
        return [torch.cat(layouts.split_qkv(tensor, *job.link.groups))]
    if job.link.layout == FLAT:
        return [tensor.unsqueeze(0)]
    if job.link.layout == VOCAB:
        return [layouts.cut_rows(tensor, job.link.shape[0])]
    return [tensor]


def to_megatron(job: Job, read: Callable[[str], Tensor]) -> Tensor:
    """The whole Megatron tensor of a job, its sources read by `read`."""
    tensors = [read(source.name) for source in job.sources]
    if job.link.layout == QKV:
        return layouts.join_qkv(*tensors, *job.link.groups)
    if job.link.layout == HEADS:
        return layouts.join_qkv(*tensors[0].chunk(3), *job.link.groups)
    if job.link.layout == FLAT:
        return tensors[0].squeeze(0)
    if job.link.layout == VOCAB:
        return layouts.pad_rows(tensors[0], job.targets[0].shape[0])
    return tensors[0]
