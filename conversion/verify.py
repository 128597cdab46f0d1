"""Checks of a finished conversion: the output read again, and the logits of a probe against a reference's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from nemotron_h_hf.checkpoint import PIECE_BYTES, Digest
from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.model.configuration_nemotron_h_vl import NemotronHVLConfig
from nemotron_h_hf.model.modeling_nemotron_h import NemotronHForCausalLM
from nemotron_h_hf.model.weights import Checkpoint
from nemotron_h_hf.resumable import checksum
from nemotron_h_hf.whole_files import write_text

from .formats import read_megatron
from .plan import Plan, plan_to_hf, some, to_hf
from .source_checkpoint import SourceCheckpoint
from .torch_dist import inside
from .vision import Config, language

PROBE_TOKENS = 24


def check_source(folder: Path, source: Checkpoint | SourceCheckpoint) -> None:
    """Compare a source with every checksum that it has: integrity.json, and those of the zips of Megatron's files.

    Raises:
        ValueError: naming the file that differs.
    """
    check_integrity(folder)
    if isinstance(source, SourceCheckpoint):
        source.check_records()


def check_integrity(folder: Path) -> None:
    """Compare a source's files with its integrity.json, which megatron-core 0.19 can write; without one, nothing.

    Raises:
        ValueError: naming the file that differs.
    """
    path = folder / "integrity.json"
    if not path.is_file():
        return
    try:
        listed = read_json(path)
        algorithm, files = listed["algorithm"], dict(listed["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of checksums: {error!r}") from None
    if algorithm != "sha256":
        raise ValueError(f"{path}: algorithm={algorithm!r}: allowed is 'sha256'")
    for name, expected in files.items():
        digest = hashlib.sha256()
        with open(inside(folder, name, "a checksum"), "rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        if digest.hexdigest() != expected:
            raise ValueError(f"{folder / name} does not have the checksum that {path.name} gives")


def check_output(
    target: Path, to: str, digests: dict[str, Digest], plan: Plan, source: Checkpoint | SourceCheckpoint
) -> None:
    """Read everything that was written again.

    A Hugging Face target must have the checksums that were noted while writing. A Megatron target is converted back, in
    memory and tensor by tensor, and must give the source's tensors again.

    Raises:
        ValueError: naming the tensors that differ.
    """
    if to == "hf":
        written = Checkpoint(target)
        wrong = [
            name for name, digest in digests.items() if name not in written or checksum(written[name]) != digest.sha256
        ]
        wrong += [name for name in written if name not in digests]
    else:
        wrong = _differences(read_megatron(target), source, plan)
    if wrong:
        raise ValueError(f"{target} does not hold what was written: {some(wrong)}")


def _differences(written: SourceCheckpoint, source: Checkpoint, plan: Plan) -> list[str]:
    """Names of the source's tensors that do not come back from a written Megatron checkpoint bit by bit."""
    wrong = []
    stored = {spec.name for job in plan.jobs for spec in job.sources}
    back = plan_to_hf(written, plan.config, allow_missing=["*"] if plan.missing else [])
    seen = set()
    for job in back.jobs:
        for spec, tensor in zip(job.targets, to_hf(job, written[job.sources[0].name]), strict=True):
            seen.add(spec.name)
            if spec.name not in stored or checksum(tensor.contiguous()) != checksum(source[spec.name].to(spec.dtype)):
                wrong.append(spec.name)
    return wrong + sorted(stored - seen)


def compare_logits(target: Path, reference: str | Path, config: Config) -> dict[str, Any]:
    """Logits of the same random tokens through the target and a reference checkpoint, both in float32; after a tile, if it sees.

    Raises:
        ValueError: when they differ by more than 1e-3 of the largest logit, or the vocabularies differ.
    """
    ours, theirs = _logits(target, config), _logits(Path(reference), None)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"logits of {target} have shape {tuple(ours.shape)}, those of {reference} {tuple(theirs.shape)}"
        )
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= 1e-3 * max(scale, 1e-6):
        raise ValueError(
            f"logits of {target} differ from those of {reference} by {difference:.3g}, the largest is {scale:.3g}"
        )
    return {"reference": str(reference), "max_difference": difference, "largest_logit": scale, "tokens": PROBE_TOKENS}


@torch.no_grad()
def _logits(folder: Path, config: Config | None) -> torch.Tensor:
    with TemporaryDirectory() as temporary:
        if config is not None:  # the target gets its config.json last of all, so the probe sees it elsewhere
            for file in folder.glob("*.safetensors*"):
                (Path(temporary) / file.name).symlink_to(file.resolve())
            write_text(Path(temporary) / "config.json", config.to_json_string(use_diff=False))
            folder = Path(temporary)
        model = _load(folder)
    text, generator = language(model.config), torch.Generator().manual_seed(0)
    tokens = torch.randint(min(3, text.vocab_size - 1), text.vocab_size, (1, PROBE_TOKENS), generator=generator)
    if text is model.config:
        return model(tokens, use_cache=False).logits
    side, token = model.config.image_size, model.config.image_token_id
    tokens = tokens.masked_fill(tokens == token, 0)
    picture = torch.full((1, model.config.image_seq_length), token)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return model(torch.cat([picture, tokens], 1), pixel_values=pixels, use_cache=False).logits


def _load(folder: Path) -> NemotronHForCausalLM:
    """A text model, or one that sees."""
    sees = isinstance(AutoConfig.from_pretrained(folder), NemotronHVLConfig)
    kind = AutoModelForImageTextToText if sees else NemotronHForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()
