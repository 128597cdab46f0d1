"""What a conversion plans and what it did, as JSON for programs and as a table for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemotron_h_hf.checkpoint import Digest
from nemotron_h_hf.units import human_bytes

from .plan import Plan
from .write_megatron import Written

# What Megatron's own pickles name besides tensors; anything else among the stand-ins is worth a warning.
USUAL = (
    "megatron.",
    "numpy.",
    "signal.Signals",
    "_codecs.encode",
    "_io.BytesIO",
    "pathlib.",
    "transformer_engine.",
    "torch.",
)

JSON_NAME, TABLE_NAME = "conversion_report.json", "conversion_report.txt"


@dataclass
class Report:
    """The outcome of one conversion; `tensors` has a line per written tensor, under its name in the output."""

    source: str
    source_format: str
    target: str
    target_format: str
    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    num_nan: int = 0
    num_inf: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    files_kept: list[str] = field(default_factory=list)  # from an earlier, interrupted run; verified
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: bool = False
    logits: dict[str, Any] | None = None
    dry_run: bool = False
    already_there: bool = False  # by the same conversion before; checked again, no weights were written
    tokenizer_added: bool | None = None  # to one that was there, if asked for: False where it had one
    fingerprint: str = ""  # of source, plan and settings
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def table(self) -> str:
        """One line per tensor."""
        rows = [("source", "target", "shape", "dtype", "layout", "sha256", "from")]
        for name, line in self.tensors.items():
            shape = "x".join(map(str, line["shape"]))
            found = line.get("sha256", "")[:12]
            rows.append((" ".join(line["sources"]), name, shape, line["dtype"], line["layout"], found, line["files"]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *self.summary()]) + "\n"

    def summary(self) -> list[str]:
        """Totals, what was left out and why, and what deserves attention."""
        if self.already_there:
            lines = [f"{self.target} is already there and whole: {self.num_tensors:,} tensors, checked again"]
            if self.tokenizer_added is not None:
                done = (
                    "copied the tokenizer to it" if self.tokenizer_added else "its own tokenizer files were left alone"
                )
                lines.append(done)
            return lines
        done = "would write" if self.dry_run else "wrote"
        lines = [
            f"{self.source} ({self.source_format}) -> {self.target} ({self.target_format})",
            f"{done} {self.num_tensors:,} tensors, {self.num_elements:,} elements, {human_bytes(self.num_bytes)}"
            + (f" in {len(self.files)} files" if self.files else ""),
        ]
        if not self.dry_run:
            lines.append(
                f"read {human_bytes(self.bytes_read)} in {self.seconds:.1f} s; {self.num_nan} NaN, {self.num_inf} infinite"
            )
        if self.files_kept:
            lines.append(f"kept {len(self.files_kept)} finished files of an interrupted run, after checking them")
        for reason, count in Counter(self.ignored.values()).most_common():
            lines.append(f"ignored: {count:,} x {reason}")
        if self.missing:
            lines.append(f"missing, allowed by name: {len(self.missing)}")
        if self.num_nan or self.num_inf:
            bad = [name for name, line in self.tensors.items() if line.get("num_nan") or line.get("num_inf")]
            lines.append(f"WARNING: not all numbers are finite: {', '.join(bad[:5])}")
        odd = [name for name in self.stand_ins if not name.startswith(USUAL)]
        if odd:
            lines.append(
                f"WARNING: its pickles name {', '.join(odd)}, which no checkpoint needs; nothing of it was run"
            )
        if len(odd) < len(self.stand_ins):
            usual = ", ".join(name for name in self.stand_ins if name not in odd)
            lines.append(f"named by its pickles and not loaded: {usual}")
        lines += [f"note: {note}" for note in self.notes]
        if self.verified:
            lines.append("verified: the output was read again and is what was written")
        if self.logits:
            lines.append(
                f"logits: largest difference from {self.logits['reference']} is {self.logits['max_difference']:.2e}"
            )
        return lines


def add_plan(report: Report, plan: Plan) -> None:
    """Put a plan's lines and totals into a report."""
    for job in plan.jobs:
        for spec in job.targets:
            report.tensors[spec.name] = {
                "sources": [source.name for source in job.sources],
                "shape": list(spec.shape),
                "dtype": str(spec.dtype).removeprefix("torch."),
                "layout": job.how,
                "files": job.places,
            }
    report.num_tensors, report.num_elements, report.num_bytes = len(report.tensors), plan.num_elements, plan.num_bytes
    report.ignored, report.missing = plan.ignored, plan.missing
    report.notes += plan.notes


def add_written(report: Report, written: Written) -> None:
    """Put files, checksums and counts into a report."""
    report.files, report.files_kept = written.files, written.kept
    for name, digest in written.digests.items():
        report.tensors[name] |= digest._asdict()
        report.num_nan += digest.num_nan
        report.num_inf += digest.num_inf


def finished_before(folder: Path, fingerprint: str) -> Written | None:
    """What the same conversion noted in its report when it ended; None without a report, or if it has not ended."""
    try:
        noted = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        if noted["fingerprint"] != fingerprint or any(folder.glob("*_journal.jsonl")):
            return None
        digests = {name: Digest(*(line[field] for field in Digest._fields)) for name, line in noted["tensors"].items()}
        return Written(digests, noted["files"], noted["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def parse_dtype(text: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name; "auto" and None keep the stored one."""
    if text is None or text == "auto" or isinstance(text, torch.dtype):
        return None if text == "auto" else text
    allowed = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if text not in allowed:
        raise ValueError(f"dtype={text!r}: allowed are auto, {', '.join(allowed)}")
    return allowed[text]
