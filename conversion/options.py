"""What may be asked of a conversion, and what follows from the kind of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES

from .formats import Found
from .report import parse_dtype
from .write_legacy import write_ranks
from .write_megatron import Layout
from .write_torch_dist import write_distributed

FORMATS = {"torch_dist": write_distributed, "torch": write_ranks}
OF_A_MEGATRON_TARGET = ("format", "tp", "pp", "ep", "vocab_divisible_by", "core")


@dataclass(frozen=True)
class Options:
    """The options of `convert`; the command line has the same.

    to            "hf" or "megatron"; the opposite of what the source is, if not given
    format        of a Megatron target: "torch_dist" (which loads under any parallelism) or "torch"
    tp, pp, ep    tensor, pipeline, expert parallel sizes of a "torch" target; `pp` may be the layers of each stage
    dtype         of the written floating-point tensors; each tensor's own if not given
    config        a preset's name or a config.json that completes what a Megatron checkpoint does not say
    tokenizer     a folder whose tokenizer files are copied to a Hugging Face target
    vocab_divisible_by   a Megatron target's vocabulary is padded to a multiple of this times `tp`
    core          megatron-core release whose local names a "torch" target has: "auto", "0.16", "0.19"
    allow_unused, allow_missing   patterns of names (as in a shell) whose tensors may be left over or absent
    dry_run       plan and report; nothing is written
    verify_output read everything that was written again
    verify_logits a Hugging Face checkpoint; a probe through the result must give the same logits
    """

    to: str | None = None
    format: str | None = None
    tp: int = 1
    pp: int | Sequence[int] = 1
    ep: int = 1
    dtype: str | torch.dtype | None = None
    config: str | Path | None = None
    max_shard_size: str | int = "5GB"
    tokenizer: str | Path | None = None
    vocab_divisible_by: int = 128
    core: str = "auto"
    allow_unused: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    dry_run: bool = False
    verify_output: bool = False
    verify_logits: str | Path | None = None

    def settled(self, found: Found) -> Options:
        """With direction, format and dtype as they are for this source.

        Raises:
            ValueError: for options that do not fit the source or each other.
        """
        to = "megatron" if found.format == "hf" else "hf"
        if self.to not in (None, to):
            raise ValueError(f"to={self.to!r}: allowed is {to!r}, {found.folder} is a {found.format} checkpoint")
        format = "hf" if to == "hf" else self.format or "torch_dist"
        if to == "megatron" and format not in FORMATS:
            raise ValueError(f"format={format!r}: allowed are {', '.join(FORMATS)}")
        if to == "megatron" and self.verify_logits is not None:
            raise ValueError(f"verify_logits={self.verify_logits}: allowed is a Hugging Face target; verify_output checks a "
                             "Megatron one")  # fmt: skip
        usual = Options()
        for name in OF_A_MEGATRON_TARGET if to == "hf" else ("tokenizer",):
            if getattr(self, name) != getattr(usual, name):
                kind = "Megatron" if to == "hf" else "Hugging Face"
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed with a {kind} target, this one is {format}")
        folder = None if self.tokenizer is None else Path(self.tokenizer)
        if folder is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"tokenizer={folder}: allowed is a folder with {', '.join(TOKENIZER_FILES[:2])}, ...")
        return replace(self, to=to, format=format, tokenizer=folder, dtype=parse_dtype(self.dtype))

    @property
    def layout(self) -> Layout:
        """Of a Megatron target."""
        return Layout(self.format, self.tp, self.pp, self.ep, self.vocab_divisible_by, self.core)
