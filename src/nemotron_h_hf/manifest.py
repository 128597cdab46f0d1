"""What a folder of weights should hold: the manifest written next to them, and its check on loading.

`elastic_manifest.json` holds the number of parameters, each tensor's dtype, shape and SHA-256, a fingerprint, and for a
model that was cut out of a parent its budget, the parent's name and fingerprint, and how far its logits are from the masked
parent's. The fingerprint is a SHA-256 over names, dtypes, shapes and the first and last `EDGE_BYTES` of every tensor. It
costs a few reads per tensor, and any training changes it; a change in the middle of a tensor alone does not.

On loading, counts, shapes and fingerprint are always checked, and every checksum too where the weights are at most
`FULL_CHECK_BYTES`; `nemotron-h info FOLDER --checksums` checks them all.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import cached_file

from .model.json_files import read_json
from .model.loading import HUB_ARGUMENTS
from .model.weights import PIECE_BYTES, Stored, find_tensors

NAME = "elastic_manifest.json"
VERSION = 1
EDGE_BYTES = 4096
FULL_CHECK_BYTES = 256 * 2**20
REMEDY = f"write the weights again, or remove {NAME} if they were meant to change"


def find_manifest(path: str | os.PathLike, arguments: Mapping[str, Any]) -> str | None:
    """The manifest of a folder or hub id, if it has one; `arguments` are those of `from_pretrained`."""
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(path, NAME, **hub, **{f"_raise_exceptions_for_{problem}": False for problem in quiet})


def fingerprint(stored: Mapping[str, Stored]) -> str:
    """A digest of the tensors that is quick to make: see above. The same for one file and for many."""
    digest = hashlib.sha256()
    for name, entry in sorted(stored.items()):
        digest.update(f"{name} {entry.code} {list(entry.shape)}\n".encode())
        with open(entry.file, "rb", buffering=0) as file:
            for start in sorted({0, max(0, entry.num_bytes - EDGE_BYTES)}):
                file.seek(entry.offset + start)
                digest.update(file.read(min(EDGE_BYTES, entry.num_bytes - start)))
    return digest.hexdigest()


def make_manifest(stored: Mapping[str, Stored], sha256: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The manifest of written files; `sha256` by released name; `more`: budget, parent, residual."""
    tensors = {
        name: {"dtype": entry.code, "shape": list(entry.shape), "sha256": sha256[name]}
        for name, entry in stored.items()
    }
    count = sum(math.prod(entry.shape) for entry in stored.values())
    return {"version": VERSION, "num_parameters": count, "fingerprint": fingerprint(stored), **more, "tensors": tensors}


def as_text(manifest: Mapping[str, Any]) -> str:
    """JSON with a line for each tensor."""
    head = json.dumps({**manifest, "tensors": None}, indent=2)
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest["tensors"].items()]
    return head.replace('"tensors": null', '"tensors": {\n' + ",\n".join(lines) + "\n  }") + "\n"


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """A manifest from its file; `ValueError` names the file if it is none."""
    try:
        manifest = read_json(path)
        version, _, _ = manifest["version"], manifest["fingerprint"] + "", manifest["num_parameters"] + 0
        for entry in manifest["tensors"].values():
            entry["dtype"] + "", entry["shape"] + [], entry["sha256"] + ""
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is not a manifest: {error!r}; {REMEDY}") from None
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}: allowed is {VERSION}")
    return manifest


def check_manifest(path: str | os.PathLike, files: Iterable[str | os.PathLike], full: bool | None = None) -> None:
    """Compare weights with their manifest.

    Args:
        full: compare every tensor's checksum, which reads them all; None does so up to `FULL_CHECK_BYTES`.

    Raises:
        ValueError: naming the tensor that is missing, left over, of another shape or changed.
    """
    manifest, stored = read_manifest(path), find_tensors(files)
    noted = manifest["tensors"]
    for name in sorted(set(noted) ^ set(stored)):
        where = "lack" if name in noted else "have"
        raise ValueError(f"{path} does not fit the weights, which {where} {name}; {REMEDY}")
    for name, entry in stored.items():
        if [entry.code, list(entry.shape)] != [noted[name]["dtype"], noted[name]["shape"]]:
            expected = f"{noted[name]['dtype']} {noted[name]['shape']}"
            raise ValueError(f"{path} has {name} as {expected}, it is {entry.code} {list(entry.shape)}; {REMEDY}")
    count = sum(math.prod(entry.shape) for entry in stored.values())
    if count != manifest["num_parameters"]:
        raise ValueError(f"{path} has num_parameters={manifest['num_parameters']:,}, the files {count:,}; {REMEDY}")
    if full is None:
        full = sum(entry.num_bytes for entry in stored.values()) <= FULL_CHECK_BYTES
    if full:
        changed = [name for name, entry in stored.items() if checksum(entry) != noted[name]["sha256"]]
        if changed:
            raise ValueError(f"{path} has another checksum for {len(changed)} tensors, {changed[0]} first; {REMEDY}")
    if fingerprint(stored) != manifest["fingerprint"]:
        raise ValueError(f"{path} has another fingerprint than the weights, which were changed after it; {REMEDY}")


def checksum(entry: Stored) -> str:
    """SHA-256 of a stored tensor's bytes."""
    digest = hashlib.sha256()
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.offset)
        left = entry.num_bytes
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise ValueError(f"{entry.file} was cut short while it was read")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
