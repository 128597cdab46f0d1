"""Make an ordinary checkpoint from a training run's: one folder that from_pretrained loads.

    nemotron-h export runs/big model/                            # the run's last whole checkpoint
    nemotron-h export runs/big/checkpoint-500 model/ --dtype bfloat16

A run under FSDP writes its weights in parts, one file per process. This joins them one tensor at a time, without GPUs or
processes, also for a model larger than memory. Other runs' checkpoints are copied. Adapters (LoRA) alone are refused:
`nemotron-h merge` joins them with their base.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.conversion.sharded_run import export_run
from nemotron_h_hf.model.saving import saving
from nemotron_h_hf.output_folders import is_made, note_made, stamps, writing
from nemotron_h_hf.training.checkpoints import MARKER, check_whole, last_whole_checkpoint

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportArguments:
    """What the command line says."""

    source: Path = argument("a run's folder, or one of its checkpoints", metavar="SRC")
    target: Path = argument("new folder", metavar="DST")
    dtype: str | None = option(None, "of the weights (as in SRC, float32 in most runs)", choices=DTYPES)
    max_shard_gb: float = option(5.0, "of the files of DST (5)")


def main(argv: Sequence[str] | None = None) -> int:
    """Find the checkpoint, write it, say so."""
    arguments = parse(argv)
    checkpoint = find_checkpoint(arguments.source)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with writing(arguments.target, checkpoint) as target:
        made_from = {"command": "export", "checkpoint": stamps(checkpoint), **vars(arguments), "target": None}
        if is_made(target, made_from):
            print(f"{target} is already there and whole")
            return 0
        with saving(target) as staging:
            count = export_run(checkpoint, staging, dtype, int(arguments.max_shard_gb * 1e9))
            note_made(staging, made_from)
    print(f"{arguments.target} holds {count} tensors of {checkpoint}")
    return 0


def parse(argv: Sequence[str] | None) -> ExportArguments:
    """Read and check the command line."""
    arguments = read_options(ExportArguments, argv, "export", __doc__)
    if not arguments.max_shard_gb > 0:
        raise ValueError(f"--max-shard-gb={arguments.max_shard_gb}: allowed is above 0")
    return arguments


def find_checkpoint(source: Path) -> Path:
    """The checkpoint itself, or the last whole one of a run."""
    if (source / MARKER).is_file():
        check_whole(source)
        return source
    checkpoint = last_whole_checkpoint(source)
    if checkpoint is None:
        raise ValueError(f"SRC={source}: allowed is a run's folder with a whole checkpoint, or such a checkpoint")
    return checkpoint


if __name__ == "__main__":
    sys.exit(main())
