"""Reads what describes a checkpoint, JSON files and safetensors headers; every error names the file.

A safetensors file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets),
then the data. https://github.com/huggingface/safetensors#format. Its own library checks that the offsets follow each other
from the first byte of data to the last and fit shape and dtype; names that are given twice are looked for here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The content of a JSON file, which has to be an object (or another `kind`).

    Raises:
        ValueError: naming the file, if it is no JSON, no UTF-8, too deep to read or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{path} holds {type(content).__name__} as JSON: allowed is {names.get(kind, kind.__name__)}")
    return content


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        ValueError: naming the index, if it has no such map, or one that leads out of its folder.
    """
    content = read_json(path)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata", {}), dict):
        raise ValueError(f"{path} is not an index of shards, its metadata is {content['metadata']!r:.80}")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is not an index of shards, it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise ValueError(
                f"{path} names the shard {file!r} for {name}: a plain file name is allowed, without folders"
            )
    return weight_map


def read_header(path: str | os.PathLike) -> dict[str, dict]:
    """Names, dtypes, shapes and offsets of a safetensors file, from its header alone.

    Raises:
        ValueError: naming the file, if it is cut short, no safetensors file, or has tensors that overlap, leave gaps, do
            not fit their shape and dtype, or share a name.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is cut short or not a safetensors file ({size} bytes, header of {length})")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is not a safetensors file, its header cannot be read: {error!r:.300}") from None
    if end != size:
        raise ValueError(f"{path} is cut short or damaged: its header describes {end} bytes, the file has {size}")
    try:
        with safe_open(path, framework="pt"):
            return header
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or damaged: {error}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return found


def open_tensors(path: str | os.PathLike, device: str = "cpu") -> safe_open:
    """safetensors' own reader of a file, after the checks of `read_header`; use it as a context manager."""
    read_header(path)
    return safe_open(path, framework="pt", device=device)


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and over what is noted of them (but for `sha256`)."""
    noted = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(noted, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if len(flat):
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def read_checked(path: str | os.PathLike, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and what is noted of them; with a `sha256` among the latter, that must be theirs.

    Raises:
        ValueError: naming the file, if it is damaged or has another checksum.
    """
    with open_tensors(path, device) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    if "sha256" in metadata and metadata["sha256"] != tensors_digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: it has another checksum than when it was written")
    return tensors, metadata
