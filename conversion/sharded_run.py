"""Checkpoints of a training run under FSDP, spread over files by process, to ordinary ones: one tensor in memory at a time.

Accelerate writes `pytorch_model_fsdp_0/` with torch's distributed checkpointing: the parts of each tensor wherever its
processes wrote them, and a pickled table of them, which is read without executing anything in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from nemotron_h_hf.checkpoint import save
from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.model.configuration_nemotron_h import with_plain_limit
from nemotron_h_hf.model.weights import Checkpoint, Name, TensorSpec, name_in_file, read_name, stays_float32
from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES, copy_files
from nemotron_h_hf.whole_files import write_text

from .source_checkpoint import Entry, Piece, SourceCheckpoint
from .torch_dist import chunks_of, read_metadata, unstacked

WEIGHTS_FOLDER = "pytorch_model_fsdp_0"
WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")  # of activation checkpointing and torch.compile
ADAPTED = "base_model."  # PEFT's, around every name; a run saves its adapters alone
ROUTER = "elastic_router."  # of elastic training; it decided the sizes and is no part of the model


def export_run(
    checkpoint: Path, target: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 2**30
) -> int:
    """Write the weights of a run's checkpoint, sharded or not, as a folder that `from_pretrained` loads; the tensors written.

    Args:
        dtype: of all weights but the router's correction bias; None for that of the checkpoint.

    Raises:
        ValueError: when files are missing or damaged, hold adapters alone, or the target holds weights already.
    """
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds adapters (LoRA) and not the weights under them: allowed is a checkpoint of a whole model; "
            f"nemotron-h merge {checkpoint} --output {target} makes one"
        )
    sharded = (checkpoint / WEIGHTS_FOLDER).is_dir()
    source = open_sharded(checkpoint / WEIGHTS_FOLDER) if sharded else Checkpoint(checkpoint)
    if any(name.startswith(ADAPTED) for name in source):
        raise ValueError(
            f"{checkpoint} holds sharded adapters (LoRA) and not the weights under them: allowed is a checkpoint of a whole "
            f"model; the end of the run writes them to {checkpoint.parent / 'adapter'}, for nemotron-h merge. If it was "
            f"interrupted there, remove {checkpoint} and repeat the training command"
        )
    config = with_plain_limit(read_json(checkpoint / "config.json"))
    names = {name_in_file(name, config.get("model_type")): name for name in sorted(source, key=_by_depth)}
    specs = [_spec(source.spec(name), dtype)._replace(name=written) for written, name in names.items()]
    save(target, specs, ((written, source[name]) for written, name in names.items()), max_shard_bytes)
    copy_files(TOKENIZER_FILES, checkpoint, target)
    stored = next(spec.dtype for spec in specs if not stays_float32(spec.name))
    write_text(
        target / "config.json", json.dumps({**config, "dtype": str(stored).removeprefix("torch.")}, indent=2) + "\n"
    )
    return len(specs)


def open_sharded(folder: Path) -> SourceCheckpoint:
    """The weights under released names (`backbone.`, one matrix per expert), each read when asked for.

    Raises:
        ValueError: naming file and key, when parts are missing, overlap, leave the folder or a file's end.
    """
    table = read_metadata(folder)
    entries: dict[str, Entry] = {}
    for key, found in chunks_of(folder, table.tensors, table).items():
        dtype, shape, _ = table.tensors[key]
        name = plain_name(key)
        if name.local.startswith(ROUTER):
            continue
        if "{e}" in name.local:
            for expert, pieces in unstacked(key, shape, found).items():
                entries[name._replace(expert=expert).released] = Entry(dtype, shape[1:], pieces)
        else:
            entries[name.released] = Entry(
                dtype, shape, [Piece(chunk, 0, box or (1,), corner or (0,)) for corner, box, chunk in found]
            )
    return SourceCheckpoint(folder, "fsdp", entries, {})


def plain_name(key: str) -> Name:
    """`model.model.layers.0.norm.weight` -> that of `backbone.layers.0.norm.weight`; `model.` at the front is Accelerate's."""
    return read_name(WRAPPERS.sub("", key).removeprefix("model."))


def _spec(stored: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    keeps = dtype is None or stays_float32(stored.name)
    return stored if keeps else stored._replace(dtype=dtype)


def _by_depth(name: str) -> tuple:
    """Embeddings, layers by number, what follows them: as a forward pass meets them."""
    first = 0 if "embeddings" in name else 1 if ".layers." in name else 2
    return (first, *(int(part) if part.isdigit() else part for part in name.split(".")))
