"""A teacher's largest logits for rows of tokens, on disk: written once, then read by every student and every epoch.

    FOLDER/cache.json                what it was made with: teacher, k, temperature, vocabulary
    FOLDER/rows-000-00000.safetensors   of process 0, the first shard; per row
        digest    (rows)         int64, of the row's token ids and positions
        ids       (rows, l, k)   int32, tokens of the k largest logits
        log_probs (rows, l, k)   float32, log softmax(z / T) of these
        log_rest  (rows, l)      float32, log of the mass of all other tokens

That is 8 bytes per token and kept logit. A row is found by its digest, so order, epochs, batch size and number of
processes are free, and other data, another tokenizer or another packing is noticed at its first row.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..inputs import open_tensors, read_json
from ..output_folders import is_empty
from ..whole_files import whole_file, write_json
from .losses import TopK, top_k

FORMAT = 1
VALUES_PER_TENSOR = 64  # of each weight, that go into a teacher's fingerprint
# Of a configuration, what does not change the logits.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "auto_map"}


@dataclass(frozen=True)
class CacheIdentity:
    """What has to agree between writing a cache, continuing it, and using it."""

    teacher: str
    vocab_size: int
    k: int
    temperature: float
    format: int = FORMAT


class TeacherCache:
    """The rows of a cache folder, read when they are asked for.

    Raises:
        ValueError: for a folder without a cache, or with one of another format.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.identity = _read_identity(self.folder)
        self._places: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            with open_tensors(path) as file:
                self._places |= {digest: (path, row) for row, digest in enumerate(file.get_tensor("digest").tolist())}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: int) -> bool:
        return digest in self._places

    def check(self, **wanted: object) -> None:
        """`ValueError` unless the cache was made with these values of `CacheIdentity`."""
        for name, value in wanted.items():
            found = asdict(self.identity)[name]
            if found != value:
                raise ValueError(f"{self.folder} was made with {name}={found!r}, this run has {value!r}")

    def lookup(self, input_ids: Tensor, position_ids: Tensor | None = None) -> TopK:
        """(b, l) tokens, as they were cached -> what the teacher said of them, on the device of `input_ids`.

        Raises:
            ValueError: for a row that is not in the cache.
        """
        rows = [self._read(digest, input_ids.shape[1]) for digest in row_digests(input_ids, position_ids)]
        return TopK(*(torch.stack(tensors).to(input_ids.device) for tensors in zip(*rows)))

    def _read(self, digest: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if digest not in self._places:
            raise ValueError(
                f"{self.folder} has {len(self):,} rows, and not this one of {length} tokens: it was made from other data, "
                "with another tokenizer or sequence_length, or is not finished (the command that makes it resumes)"
            )
        path, row = self._places[digest]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(name)[row] for name in ("ids", "log_probs", "log_rest"))


def write_cache(
    folder: str | os.PathLike,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    k: int,
    temperature: float = 1.0,
    rows_per_shard: int = 256,
    process_index: int = 0,
) -> int:
    """Run the teacher over batches and keep its k largest logits; rows that the folder has already are passed over.

    Args:
        batches: mappings with `input_ids` (b, l) and maybe `position_ids` (b, l); other entries are ignored.
        process_index: names this process's shards; each process brings its own rows, and process 0 makes the folder.

    Returns:
        The number of rows that the folder has of this process and had of others when it began.

    Raises:
        ValueError: if the folder holds a cache of another teacher, k or temperature.
    """
    folder = Path(folder)
    vocab_size = teacher.config.vocab_size
    identity = CacheIdentity(fingerprint(teacher), vocab_size, k, temperature)
    try:
        if process_index == 0:
            _start(folder, identity)
    finally:  # the others then find what is wrong themselves
        if dist.is_initialized():
            dist.barrier()
    TeacherCache(folder).check(**asdict(identity))
    done = set(TeacherCache(folder)._places)
    waiting: list[dict[str, Tensor]] = []
    device = teacher.get_input_embeddings().weight.device
    teacher.eval()
    for batch in batches:
        input_ids, position_ids = batch["input_ids"], batch.get("position_ids")
        digests = row_digests(input_ids, position_ids)
        new = [row for row, digest in enumerate(digests) if digest not in done and digest not in digests[:row]]
        if not new:
            continue
        done.update(digests)
        positions = None if position_ids is None else position_ids[new].to(device)
        hidden = teacher_hidden_states(teacher, input_ids[new].to(device), positions)
        kept = top_k(hidden, teacher.get_output_embeddings(), vocab_size, k, temperature)
        for row, *tensors in zip(new, *kept):
            digest = torch.tensor(digests[row])
            waiting.append({"digest": digest} | {n: t.cpu() for n, t in zip(TopK._fields, tensors)})
        while len(waiting) >= rows_per_shard:
            _write_shard(folder, process_index, waiting[:rows_per_shard])
            waiting = waiting[rows_per_shard:]
    if waiting:
        _write_shard(folder, process_index, waiting)
    return len(done)


@torch.no_grad()
def teacher_hidden_states(
    teacher: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """(b, l) -> (b, l, hidden) after the final norm; `position_ids` that restart keep packed documents apart."""
    return teacher.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state


def row_digests(input_ids: Tensor, position_ids: Tensor | None = None) -> list[int]:
    """A 64-bit number per row of tokens and positions."""
    rows = input_ids.long().cpu()
    positions = torch.arange(rows.shape[1]).expand_as(rows) if position_ids is None else position_ids.long().cpu()
    joined = torch.cat([rows, positions.expand_as(rows)], dim=1).contiguous().numpy()
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little", signed=True) for row in joined]


def fingerprint(model: nn.Module) -> str:
    """Hex digest of configuration, names, shapes and some values of every weight: another checkpoint has another one."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // VALUES_PER_TENSOR)]
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _start(folder: Path, identity: CacheIdentity) -> None:
    """Make the folder a cache with this identity, unless it is a cache already."""
    if (folder / "cache.json").is_file():
        return
    if folder.exists() and not is_empty(folder):
        raise ValueError(
            f"{folder} holds files but no cache.json: allowed is a new or empty folder, or a cache to continue"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cache.json", asdict(identity))


def _read_identity(folder: Path) -> CacheIdentity:
    path = folder / "cache.json"
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return CacheIdentity(**content)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no cache of a teacher: there is no cache.json") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not describe a cache of a teacher: {error}") from None


def _write_shard(folder: Path, process_index: int, rows: list[dict[str, Tensor]]) -> None:
    """One file under its final name only when it is whole and on the disk."""
    prefix = f"rows-{process_index:03d}-"
    path = folder / f"{prefix}{len(list(folder.glob(prefix + '*.safetensors'))):05d}.safetensors"
    with whole_file(path) as part:
        save_file({name: torch.stack([row[name] for row in rows]).contiguous() for name in rows[0]}, part)
