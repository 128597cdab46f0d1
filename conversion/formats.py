"""Which kind of checkpoint a folder is, and where its weights and its training arguments are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nemotron_h_hf.inputs import read_json

from . import legacy, torch_dist, torchzip
from .source_checkpoint import SourceCheckpoint, lies_in, naming
from .unpickle import StandIn

TRACKER = "latest_checkpointed_iteration.txt"


class Found(NamedTuple):
    """A recognised checkpoint: hf, torch_dist, torch, torch_dcp, nemo2 or bridge; and the folder of its weights."""

    format: str
    folder: Path


def find(path: str | Path) -> Found:
    """Recognise a checkpoint in a run folder, an iteration or a weights folder.

    Raises:
        ValueError: saying what was looked for, or why a known format is not read.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return Found("hf", path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Found("hf", path)
    if (path / "weights").is_dir() and (path / "context").is_dir():
        return Found("nemo2", path / "weights")
    folder = _iteration(path)
    if any(re.fullmatch(r"mp_rank_\d+.*", child.name) for child in folder.iterdir()):
        return Found("torch", folder)
    if (folder / "metadata.json").is_file():
        return Found(_distributed(folder), folder)
    if (folder / ".metadata").is_file():
        return Found("torch_dcp", folder)
    raise ValueError(
        f"{folder} is no checkpoint that is known: it has no *.safetensors with config.json, no mp_rank_* folders, "
        f"no metadata.json and no .metadata"
    )


def _iteration(path: Path) -> Path:
    """Follow the tracker file of a run folder to the iteration it names."""
    tracker = path / TRACKER
    if not tracker.is_file():
        inner = [child for child in path.iterdir() if re.fullmatch(r"iter_\d{7,}|release", child.name)]
        return inner[0] if len(inner) == 1 and inner[0].is_dir() and not (path / ".metadata").exists() else path
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise ValueError(f"{tracker} holds {text!r:.40}: allowed is a number or 'release'")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ValueError(f"{tracker} names {folder.name}, which is missing")
    return folder


def _distributed(folder: Path) -> str:
    try:
        backend = read_json(folder / "metadata.json")["sharded_backend"]
    except KeyError as error:
        raise ValueError(f"{folder / 'metadata.json'} does not name a sharded_backend: {error!r}") from None
    if backend == "zarr":
        raise ValueError(f"{folder} is in the zarr format, which megatron-core dropped in 0.16; load it with 0.15 or "
                         f"older and save it as torch_dist")  # fmt: skip
    if backend != "torch_dist":
        raise ValueError(f"{folder / 'metadata.json'}: sharded_backend={backend!r}: allowed is 'torch_dist'")
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder / '.metadata'} is missing")
    if (folder / "run_config.yaml").is_file():
        return "bridge"
    return "nemo2" if (folder.parent / "context").is_dir() else "torch_dist"


def read_megatron(path: str | Path) -> SourceCheckpoint:
    """Open a Megatron checkpoint of any format as a lazy mapping of global names to whole tensors.

    Nothing but the tables of contents is read before a tensor is asked for. Nothing in the checkpoint is executed.

    Raises:
        ValueError: naming file and key, for anything missing, damaged or outside of the folder.
    """
    found = find(path)
    if found.format == "hf":
        raise ValueError(f"{path} is a Hugging Face checkpoint, not a Megatron one")
    return open_megatron(found)


def open_megatron(found: Found) -> SourceCheckpoint:
    """As `read_megatron`, of a folder that was found."""
    with naming(found.folder):
        return legacy.open_folder(found.folder) if found.format == "torch" else _open_distributed(found)


def _open_distributed(found: Found) -> SourceCheckpoint:
    table = torch_dist.read_metadata(found.folder)
    args, stand_ins = {}, []
    for read in (_args_from_yaml, _args_from_common, _args_from_objects):
        more, names = read(found, table)
        args = args or more
        stand_ins += names
    checkpoint = torch_dist.open_folder(found.folder, found.format, args, table)
    checkpoint.stand_ins = sorted({*checkpoint.stand_ins, *stand_ins})
    if (found.folder / "modelopt_state").exists():
        checkpoint.notes.append(
            "modelopt_state/ is left alone: quantisation or pruning state has no place in the output"
        )
    if not args:
        checkpoint.notes.append("the checkpoint has no training arguments")
    return checkpoint


def _args_from_yaml(found: Found, table: torch_dist.Table) -> tuple[dict[str, Any], list[str]]:
    """The model section of Bridge's run_config.yaml, or the config section of NeMo 2's model.yaml."""
    path, section = {
        "bridge": (found.folder / "run_config.yaml", "model"),
        "nemo2": (found.folder.parent / "context" / "model.yaml", "config"),
    }.get(found.format, (None, None))
    if path is None or not path.is_file():
        return {}, []
    try:
        content = yaml.load(path.read_text(), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get(section), dict):
        raise ValueError(f"{path} has no section {section!r}")
    return {key: value for key, value in content[section].items() if not isinstance(value, dict)}, []


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, which also reads any unknown tag as nothing."""


_PlainLoader.add_multi_constructor("", lambda loader, tag, node: None)


def _args_from_common(found: Found, table: torch_dist.Table) -> tuple[dict[str, Any], list[str]]:
    path = found.folder / "common.pt"
    if not path.is_file():
        return {}, []
    if not lies_in(path, found.folder):
        raise ValueError(f"{path} leads outside of the folder")
    common = torchzip.read(path)
    return legacy.args_of(common.value), common.stand_ins


def _args_from_objects(found: Found, table: torch_dist.Table) -> tuple[dict[str, Any], list[str]]:
    """Arguments in the distributed checkpoint itself: `common_state` (megatron-core 0.19) or `args` (plain torch)."""
    for key in ("common_state/shard_0_1", "common_state", "args"):
        stored = torch_dist.read_object(found.folder, key, table)
        if stored is None:
            continue
        value = stored.value
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        args = legacy.args_of({"args": value} if isinstance(value, StandIn) else value)
        if args:
            return args, stored.stand_ins
    return {}, []
