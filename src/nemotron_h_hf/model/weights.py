"""Reads the weights of a checkpoint: what its safetensors files hold and where, under which names, in which dtypes.

    Checkpoint("folder")["lm_head.weight"]        a lazy mapping of the names in the files
    find_tensors(["model.safetensors", ...])      released name -> Stored: the place in a file, one for each expert

A safetensors file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets),
then the data. https://github.com/huggingface/safetensors#format. Its own library checks that the offsets follow each other
from the first byte of data to the last and fit shape and dtype; names that are given twice are looked for here.

    in files      backbone.embeddings.weight   backbone.layers.3.mixer.experts.7.up_proj.weight   mtp.layers.0.norm.weight
    in modules    model.embeddings.weight      model.layers.3.mixer.experts.up_proj (7 is a row)  mtp.layers.0.norm.weight
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PIECE_BYTES = 4 * 2**20
"""How much is read at once, where a tensor is read in parts."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The format's code -> torch's dtype."""
# Last names of integers that are stored among the weights: RADIO's choice of class tokens.
NO_WEIGHTS = ("summary_idxs",)
FLOAT32 = ("e_score_correction_bias",)
"""Last names of tensors that are float32 next to weights of any dtype, in every release: this one decides between experts."""
FLOATS = {code: dtype for code, dtype in DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
"""Those that a model computes in."""


class Name(NamedTuple):
    """A tensor's name, taken apart. `local` is its row in the table of tensors, with `{e}` for the number of an expert."""

    root: str  # "backbone", "mtp" or ""
    layer: int | None
    local: str
    expert: int | None = None  # None with `{e}` in `local`: all of them, stacked

    @property
    def released(self) -> str:
        """As files have it; stacked experts keep the name of their parameter."""
        return self._joined(self.root, self.local.format(e=self.expert) if self.expert is not None else self._parameter)

    @property
    def module(self) -> str:
        """The parameter of our modules that it is, or is a row of (`expert`)."""
        return self._joined("model" if self.root == "backbone" else self.root, self._parameter)

    @property
    def template(self) -> str:
        """The released name with `{e}` for the number of an expert."""
        return self._joined(self.root, self.local)

    @property
    def _parameter(self) -> str:
        return self.local.replace("{e}.", "").removesuffix(".weight") if "{e}" in self.local else self.local

    def _joined(self, root: str, local: str) -> str:
        layer = "" if self.layer is None else f"layers.{self.layer}."
        return f"{root}{'.' if root else ''}{layer}{local}"


_NAME = re.compile(r"(?:(backbone|model|mtp)\.)?(?:layers\.(0|[1-9]\d*)\.)?(.*)", re.DOTALL)
_EXPERT = re.compile(r"mixer\.experts\.(?:(0|[1-9]\d*)\.(up_proj|down_proj)\.weight|(up_proj|down_proj))")


def read_name(name: str) -> Name:
    """Take a name apart: of a file or of our modules, and `backbone.embedding`, which transformers 5.3 to 5.15 wrote."""
    root, layer, local = _NAME.fullmatch(name).groups()
    root = "backbone" if root == "model" else root or ""
    if root == "backbone" and layer is None:
        local = re.sub(r"^embedding\.", "embeddings.", local)
    number = None
    if expert := _EXPERT.fullmatch(local):
        number = None if expert[1] is None else int(expert[1])
        local = f"mixer.experts.{{e}}.{expert[2] or expert[3]}.weight"
    return Name(root, None if layer is None else int(layer), local, number)


def stays_float32(name: str) -> bool:
    """Whether a tensor of this name is never stored in another dtype."""
    return name.rpartition(".")[2] in FLOAT32


def released_name(name: str) -> str:
    """The released spelling of a tensor's name in a file."""
    return read_name(name).released


def name_in_file(name: str, model_type: str) -> str:
    """A released name as a checkpoint of that kind has it: the Puzzle model's begin with `model.`."""
    name = released_name(name)
    if model_type == "nemotron_h_puzzle" and name.startswith("backbone."):
        return f"model.{name.removeprefix('backbone.')}"
    return name


class TensorSpec(NamedTuple):
    """What is known about a tensor before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements by the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.num_elements * self.dtype.itemsize


class Stored(NamedTuple):
    """Where a tensor lies: `num_bytes` from `offset` on in `file`; `code` is the format's name of the dtype, such as BF16."""

    name: str
    file: str
    offset: int
    num_bytes: int
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Torch's.

        Raises:
            ValueError: for one that torch does not have, or that is not read here.
        """
        if self.code not in DTYPES:
            raise ValueError(f"{self.file} has {self.name} in {self.code}: allowed are {', '.join(DTYPES)}")
        return DTYPES[self.code]

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        return TensorSpec(self.name, self.dtype, self.shape)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (None: to the end); only those are read."""
        shape = self.shape or (1,)
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows={start}:{stop} of {self.name}: allowed are 0 to {shape[0]}")
        tensor = torch.empty((stop - start, *shape[1:]), dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as file:
            read_into(file, self.offset + start * math.prod(shape[1:]) * self.dtype.itemsize, tensor)
        return tensor if self.shape else tensor[0]

    def experts(self) -> dict[str, "Stored"]:
        """Itself by its released name; of a tensor of all experts (e, rows, columns) one for each, as in released files."""
        name = read_name(self.name)
        if "{e}" not in name.local or name.expert is not None:
            return {name.released: self}
        count, *shape = self.shape
        size = self.num_bytes // count
        names = [name._replace(expert=expert).released for expert in range(count)]
        return {
            one: self._replace(offset=self.offset + expert * size, num_bytes=size, shape=tuple(shape))
            for expert, one in enumerate(names)
        }


def find_tensors(files: Iterable[str | os.PathLike]) -> dict[str, Stored]:
    """The tensors of safetensors files under released names (`backbone.`, one matrix per expert).

    Raises:
        ValueError: for a damaged file, or dtypes that no model computes in.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for stored in read_header(file).values():
            if stored.name.rpartition(".")[2] in NO_WEIGHTS:
                continue
            if stored.code not in FLOATS:
                raise ValueError(f"{file} has {stored.name} in {stored.code}: allowed are {', '.join(FLOATS)}")
            found |= stored.experts()
    return found


def empty_tensors(files: Iterable[str | os.PathLike]) -> dict[str, Tensor]:
    """The tensors of safetensors files under released names, on the meta device: only headers are read."""
    return {name: torch.empty(it.shape, dtype=it.dtype, device="meta") for name, it in find_tensors(files).items()}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder (or of one .safetensors file) under their names there, read when asked for.

    Raises:
        ValueError: naming the file, when one is missing, cut short, or not what the index says.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._stored: dict[str, Stored] = {}
        for file, names in files_of(self.path).items():
            if not file.is_file():
                raise ValueError(f"{file} is missing; the index names it")
            found = read_header(file)
            for name in names or sorted(found, key=lambda name: found[name].offset):
                if name not in found:
                    raise ValueError(f"{file} lacks the tensor {name} that the index puts there")
                self._stored[name] = found[name]
            for stored in found.values():
                _ = stored.dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape, without reading the data."""
        return self._stored[name].spec

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, None)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows `start` to `stop` of a tensor (all of them to the end if `stop` is None); only those are read."""
        tensor = self._stored[name].rows(start, stop)
        self.bytes_read += tensor.nbytes
        return tensor


def files_of(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder, with the names that its index puts there; [] for all of the only file.

    Raises:
        ValueError: if there are none, or the index is damaged.
    """
    if path.is_file():
        return {path: []}
    if (path / SINGLE_NAME).is_file():  # first, as in transformers: a save that is under way may have both (saving.py)
        return {path / SINGLE_NAME: []}
    if (path / INDEX_NAME).is_file():
        files: dict[Path, list[str]] = {}
        for name, file in read_index(path / INDEX_NAME).items():
            files.setdefault(path / file, []).append(name)
        return files
    raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")


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
                f"{path} names the shard {file!r} for {name}: allowed is a plain file name, without folders"
            )
    return weight_map


def read_header(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a safetensors file by their names there, from its header alone.

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
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or damaged: {error}") from None
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        offset = 8 + length + start
        found[name] = Stored(name, str(path), offset, stop - start, entry["dtype"], tuple(entry["shape"]))
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return found


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_into(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of an open file from `offset` on."""
    view = byte_view(tensor)
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} is cut short: {len(view)} bytes at {offset} are needed, {done} are there")
        done += count


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
        digest.update(byte_view(tensor.detach().cpu().contiguous()))
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
