"""The hybrid cache: keys and values for attention layers, convolution and state-space states for Mamba layers, nothing for the rest.

Keys and values reuse transformers' layer classes. `MambaCacheLayer` adds roll-back: a recurrent state does not know which
tokens made it. While recording is on, the layer keeps the state before the last few tokens and what those tokens fed into
the recurrence, and `crop(-n)` replays all but the last n of them. Assisted generation, prompt lookup and multi-token
verification need this.

    cache = HybridCache(model.config)                       # grows;  max_cache_len=4096 makes it static
    model(**prompt, cache=cache)                            # or past_key_values=, as in older transformers
    branch = cache.fork()                                   # continue many times from one prompt
    batch = HybridCache.join([cache, other])                # rows of different lengths next to each other, padded on the left
    batch.keep([1], drop=3); batch.take(0)                  # rows that go on; one row as a cache of its own
    cache.save("prompt.safetensors"); HybridCache.load("prompt.safetensors", model.config)

    b batch, l length, d convolution channels, k conv taps, h heads, p head_dim, g groups, n state
"""

import copy
import json
import os
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from .arguments import CACHE_NAME
from .loading import is_finite
from .saving import whole_file
from .ssd import conv_window, final_state
from .weights import read_checked, tensors_digest

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers 5.17 puts a state layer there, which stays empty

    class DummyLayer(LinearAttentionLayer):
        """The entry of a layer that keeps nothing."""

        is_croppable = True

        def crop(self, tokens_to_remove: int) -> None:
            """There is nothing to remove."""

        def batch_repeat_interleave(self, repeats: int) -> None:
            """There are no rows."""

        def batch_select_indices(self, indices: Tensor) -> None:
            """There are no rows."""


RECORDED_TOKENS = 256  # how far `crop` can go back; bounds what recording keeps
FILE_FORMAT = "nemotron_h_hf.cache.v1"


class MambaCacheLayer(LinearAttentionLayer):
    """Convolution state (b, d, k) and state-space state (b, h, p, n) of one Mamba layer, with roll-back.

    The states are updated in place: compiled graphs need constant addresses.
    """

    is_croppable = True

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.tokens_seen = 0
        self.drop_record()

    def store(self, conv_state: Tensor, ssm_state: Tensor, num_tokens: int) -> None:
        """Take the states after `num_tokens` more tokens."""
        if torch.is_grad_enabled() and ssm_state.requires_grad:  # a graph may still need the old values
            self._assign(conv_state, ssm_state)
        else:
            if not self.is_recurrent_states_initialized[0]:
                self.lazy_initialization(conv_states=conv_state, recurrent_states=ssm_state)
            self.conv_states[0].copy_(conv_state)
            if ssm_state is not self.recurrent_states[0]:  # one-token steps update it where it is
                self.recurrent_states[0].copy_(ssm_state)
        self.has_previous_state[0] = True
        if not torch.compiler.is_compiling():
            self.tokens_seen += num_tokens

    # Roll-back

    def drop_record(self) -> None:
        """Forget how the last tokens made the state; they can no longer be removed."""
        self.before: tuple[Tensor, Tensor] | None = None  # states before the recorded tokens
        self.recorded: dict[str, Tensor] = {}  # what the tokens fed in, each (b, l, ...), in the order of the columns
        self.A: Tensor | None = None

    def record(self, before: tuple[Tensor | None, Tensor | None], A: Tensor, fed: dict[str, Tensor]) -> None:
        """Remember tokens that are about to become part of the state.

        Args:
            before: the states that the tokens meet (None for zeros); used only if nothing is recorded yet.
            A: (h) decay rates.
            fed: `conv` (b, l, d) inputs of the convolution, `x` (b, l, h, p), `dt` (b, l, h), `B` (b, l, g, n) inputs of
                the scan, `real` (b, l) bool, False for padding (where dt is 0).
        """
        self.A = A
        if self.before is None:
            self.before = self._snapshot(before, fed)
            # Copies: views would keep larger tensors alive
            self.recorded = {name: t.clone() for name, t in fed.items()}
        else:
            self.recorded = {name: torch.cat([kept, fed[name]], dim=1) for name, kept in self.recorded.items()}
        if (length := self.recorded["real"].shape[1]) > 2 * RECORDED_TOKENS:
            self._commit(length - RECORDED_TOKENS)

    def crop(self, tokens_to_remove: int) -> None:
        """`crop(-n)` removes the last n tokens, `crop(0)` commits: the tokens so far can no longer be removed."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: allowed is 0 (commit) or -n (remove n tokens)")
        if tokens_to_remove < 0 and self.has_previous_state[0]:
            length = self._recorded_length(-tokens_to_remove)
            self.store(*self._replay(length + tokens_to_remove), tokens_to_remove)
        self.drop_record()

    def crop_rows(self, removed: Tensor) -> None:
        """As `HybridCache.crop_rows`: of what was recorded, the last `removed[i]` tokens of row i count as padding."""
        if not self.has_previous_state[0]:
            return
        length, removed = self._recorded_length(int(removed.max())), removed.to(self.recorded["dt"].device)
        kept = torch.arange(length, 0, -1, device=removed.device) > removed[:, None]
        self.recorded["real"] = self.recorded["real"] & kept
        self.recorded["dt"] = self.recorded["dt"].masked_fill(~kept[..., None], 0)
        fewest = int(removed.min())
        self.store(*self._replay(length - fewest), -fewest)
        self.drop_record()

    def _recorded_length(self, needed: int) -> int:
        length = self.recorded["real"].shape[1] if self.recorded else 0
        if length < needed:
            raise ValueError(
                f"tokens_to_remove={-needed}: {length} tokens are recorded since the last crop; call "
                f"activate_past_recording() before the forward passes to undo (at most {RECORDED_TOKENS} tokens back)"
            )
        return length

    def _snapshot(self, states: tuple[Tensor | None, Tensor | None], fed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if states[0] is not None:
            return states[0].clone(), states[1].clone()
        (b, _, d), (h, p), n = fed["conv"].shape, fed["x"].shape[2:], fed["B"].shape[-1]
        return fed["conv"].new_zeros(b, d, self.taps), fed["dt"].new_zeros(b, h, p, n)

    def _replay(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The states after the first `num_tokens` recorded columns."""
        if num_tokens == 0:
            return self.before
        fed = {name: t[:, :num_tokens] for name, t in self.recorded.items()}
        order = torch.argsort(~fed["real"], dim=1, stable=True)
        conv = fed["conv"].gather(1, order[..., None].expand_as(fed["conv"]))
        conv_state = conv_window(conv, self.taps, self.before[0], fed["real"].sum(1))
        return conv_state, final_state(fed["x"], fed["dt"], self.A, fed["B"], self.before[1])

    def _commit(self, num_tokens: int) -> None:
        """Fold the oldest recorded tokens into the state before them."""
        self.before = self._replay(num_tokens)
        self.recorded = {name: kept[:, num_tokens:].clone() for name, kept in self.recorded.items()}

    # Rows and devices

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> None:
        self.map_rows(lambda t: t.to(device))
        self.A = None if self.A is None else self.A.to(device)
        self.device = torch.device(device)

    def reset(self) -> None:
        super().reset()
        self.tokens_seen = 0
        self.drop_record()

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, records included."""
        states = [t for t in (self.conv_states[0], self.recurrent_states[0]) if t is not None]
        return states + list(self.before or ()) + list(self.recorded.values())

    def map_rows(self, function) -> None:
        """Apply a function of rows to all that is held; each tensor has the batch first."""
        if self.is_recurrent_states_initialized[0]:
            self._assign(function(self.conv_states[0]), function(self.recurrent_states[0]))
        if self.before is not None:
            self.before = tuple(function(state) for state in self.before)
            self.recorded = {name: function(kept) for name, kept in self.recorded.items()}

    def _assign(self, conv_state: Tensor, ssm_state: Tensor) -> None:
        self.conv_states[0], self.recurrent_states[0] = conv_state, ssm_state
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.conv_kernel_size[0] = conv_state.shape[-1]
        self.dtype, self.device = conv_state.dtype, conv_state.device


class GrowingLayer(DynamicLayer):
    """Keys and values (b, kv heads, l, head_dim) that grow in place, in memory with room for a quarter more tokens:
    transformers' layer copies all of them at every token.

    `keys` and `values` are views of the filled part. Tensors that replace them (reordered rows, another device, a forward
    with gradients) are outside of that memory; the next update allocates new memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drop_memory()

    def drop_memory(self) -> None:
        """Keep no room to grow."""
        self.key_memory: Tensor | None = None
        self.value_memory: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a graph may still need the old values
            self.drop_memory()
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_memory = _append(self.keys, self.key_memory, key_states)
        self.values, self.value_memory = _append(self.values, self.value_memory, value_states)
        return self.keys, self.values

    def make_room(self) -> tuple[Tensor, Tensor]:
        """Keys and values with a place for one more token, which is not written yet."""
        if self.key_memory is not None and len(self.key_memory) != len(self.keys):
            self.drop_memory()
        length = self.keys.shape[-2] + 1
        self.reserve(length)
        self.show(length)
        return self.keys, self.values

    def reserve(self, room: int) -> int:
        """Reserve memory for at least `room` tokens, to write more in place; returns the number of tokens it holds."""
        memory = self.key_memory
        if memory is None or self.keys.data_ptr() != memory.data_ptr() or memory.shape[-2] < room:
            length = self.keys.shape[-2]
            room = max(room, length + length // 4)
            self.key_memory, self.value_memory = _moved(self.keys, room), _moved(self.values, room)
            self.show(length)
        return self.key_memory.shape[-2]

    def show(self, length: int) -> None:
        """Let `keys` and `values` be the first `length` tokens in memory."""
        self.keys, self.values = self.key_memory[:, :, :length], self.value_memory[:, :, :length]

    def offload(self) -> None:
        super().offload()
        self.drop_memory()

    def reset(self) -> None:
        super().reset()
        self.drop_memory()


def _append(held: Tensor, memory: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """(held and new, the memory they are in). New memory is allocated if held is not in it, or if it is full."""
    start = held.shape[-2] if held.numel() else 0
    end = start + new.shape[-2]
    inside = start and memory is not None and held.data_ptr() == memory.data_ptr() and len(held) == len(memory)
    if not inside or end > memory.shape[-2]:
        memory = new.new_empty(*new.shape[:2], end + end // 4, new.shape[-1])
        if start:
            memory[:, :, :start] = held
    memory[:, :, start:end] = new
    return memory[:, :, :end], memory


def _moved(held: Tensor, room: int) -> Tensor:
    """Memory for `room` tokens that begins with `held`."""
    memory = held.new_empty(*held.shape[:2], room, held.shape[-1])
    memory[:, :, : held.shape[-2]] = held
    return memory


class HybridCache(Cache):
    """Cache of a Nemotron-H model: one entry per layer, as `config.layers_block_type` says.

    Args:
        config: the model's configuration.
        max_cache_len: tokens that the attention layers have room for; None lets them grow. Mamba states have one size.
        offloading: keep the keys and values of waiting layers in CPU memory (CUDA only; elsewhere they stay).

    Raises:
        ValueError: for a `max_cache_len` that is no positive integer below 2**31.
    """

    max_cache_len: int | None = None  # in transformers 5.17 a property of the base class

    def __new__(cls, config: PreTrainedConfig | None = None, max_cache_len: int | None = None, *args, **kwargs):
        if cls is HybridCache:  # tools ask for transformers' classes: PEFT, ExecuTorch's exporter, generate() itself
            cls = DynamicHybridCache if max_cache_len is None else StaticHybridCache
        return super().__new__(cls)

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None, offloading: bool = False) -> None:
        if max_cache_len is not None and not 0 < max_cache_len < 2**31:
            raise ValueError(f"max_cache_len={max_cache_len}: allowed is None or a positive integer below 2**31")
        layers = hybrid_layers(config, max_cache_len)
        Cache.__init__(self, layers=layers, offloading=offloading and torch.cuda.is_available())
        self.max_cache_len = max_cache_len

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens seen, padding included (an attention-free model counts them in its Mamba layers)."""
        return sequence_length(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.max_cache_len is not None and not _is_recorded():
            needed = int(self.layers[layer_idx].get_seq_length()) + key_states.shape[-2]
            if needed > self.max_cache_len:
                raise ValueError(
                    f"max_cache_len={self.max_cache_len}: the static cache is full, {needed} tokens are needed"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Start over; static layers keep their memory."""
        super().reset()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, GrowingLayer):  # transformers 5.17 keeps its length
                self.layers[index] = GrowingLayer()

    def crop(self, tokens_to_remove: int) -> None:
        """`crop(-n)` removes the last n tokens of every row; `crop(0)` commits what is recorded.

        Raises:
            ValueError: for a positive number, for more tokens than are held, for more tokens than Mamba layers recorded
                (see `activate_past_recording`), or for a static cache.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > int(self.get_seq_length()):
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: allowed is 0 or -n with n at most the {int(self.get_seq_length())} "
                "tokens in the cache"
            )
        if tokens_to_remove < 0 and self.max_cache_len is not None:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a static cache cannot be rolled back; use one that grows"
            )
        leave_inference_mode(self)
        # Mamba layers first: they may refuse, and then nothing has changed.
        for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, MambaCacheLayer)):
            if isinstance(layer, MambaCacheLayer) or tokens_to_remove:
                layer.crop(tokens_to_remove)

    def crop_rows(self, removed: Tensor) -> None:
        """Remove another number of tokens from each row: the last `removed[i]` (int64, on the CPU) from row i.

        Columns that every row loses go. The others stay, and are padding in the rows that lost them: the `attention_mask` of
        later forwards has 0 there. Raises as `crop`.
        """
        fewest, most = int(removed.min()), int(removed.max())
        if fewest == most:
            return self.crop(-fewest)
        leave_inference_mode(self)
        for layer in self.layers:
            if isinstance(layer, MambaCacheLayer):
                layer.crop_rows(removed)
        for layer in self.layers:
            if fewest and isinstance(layer, CacheLayerMixin):
                layer.crop(-fewest)

    def fork(self) -> "HybridCache":
        """An independent copy, to continue several times from here."""
        tensors = [t for layer in self.layers if isinstance(layer, MambaCacheLayer) for t in layer.tensors()]
        tensors += [t for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        graph = {id(t): t.detach().clone() for t in tensors if not t.is_leaf}  # results of a forward with gradients
        return copy.deepcopy(self, graph)

    @staticmethod
    def join(caches: Sequence["HybridCache"]) -> "HybridCache":
        """A cache of all rows of several, which stay as they are; rows of shorter ones are padded on the left.

        The model has no position embedding, so keys and values mean the same at any place. The forward that follows needs an
        `attention_mask` with 0 at the padding.

        Raises:
            ValueError: for no cache, an empty or a static one, one that records, or caches of different models.
        """
        if not caches:
            raise ValueError("caches=[]: allowed is one cache or more")
        length = max(cache._rows_length() for cache in caches)
        joined = copy.copy(caches[0])
        joined.layers = [
            _join_layers(layers, length) for layers in zip(*(cache.layers for cache in caches), strict=True)
        ]
        return joined

    def keep(self, rows: Sequence[int], drop: int = 0) -> None:
        """Keep these rows, in this order, without the `drop` columns on the left, which are padding in all of them.

        Raises:
            ValueError: for a row that is not there, more columns than there are, a static cache, or one that records.
        """
        length = self._rows_length()
        if not 0 <= drop < length:
            raise ValueError(f"drop={drop}: allowed is 0 to {length - 1}, the cache holds {length} tokens")
        indices = torch.tensor(self._row_numbers(rows))
        for layer in self.layers:
            if isinstance(layer, MambaCacheLayer):
                layer.batch_select_indices(indices)
                layer.tokens_seen -= drop
            elif isinstance(layer, GrowingLayer):
                index = indices.to(layer.keys.device)
                layer.keys, layer.values = (t[:, :, drop:].index_select(0, index) for t in (layer.keys, layer.values))
                layer.drop_memory()

    def take(self, row: int, padding: int = 0) -> "HybridCache":
        """A copy of one row, without the `padding` columns on its left; raises as `keep`."""
        taken = copy.copy(self)
        taken.layers = [_copied(layer) for layer in self.layers]
        taken.keep([row], padding)
        return taken

    def _rows_length(self) -> int:
        """Tokens held, of a cache whose rows can be moved."""
        if self.max_cache_len is not None:
            raise ValueError(
                f"max_cache_len={self.max_cache_len}: rows of a static cache cannot be moved; use one that grows"
            )
        if any(isinstance(layer, MambaCacheLayer) and layer.recorded for layer in self.layers):
            raise ValueError("the cache records its last tokens: call crop(0) before moving rows")
        length = int(self.get_seq_length())
        if length == 0:
            raise ValueError("the cache is empty: allowed is one that has read at least one token")
        return length

    def _row_numbers(self, rows: Sequence[int]) -> list[int]:
        held = next(len(t) for layer in self.layers for t in _row_tensors(layer))
        if not len(rows) or not all(0 <= row < held for row in rows):
            raise ValueError(f"rows={list(rows)}: allowed are some of 0 to {held - 1}")
        return list(rows)

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> "HybridCache":
        """Move everything, for example to "cpu" while a conversation waits. Accelerate calls it as it calls a tensor's, with
        None where it does not know the device: then everything stays."""
        if device is None:
            return self
        for layer in self.layers:
            if isinstance(layer, MambaCacheLayer):
                layer.to(device)
            elif isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                layer.device = torch.device(device)
                if isinstance(layer, GrowingLayer):
                    layer.drop_memory()
                if isinstance(layer, StaticLayer):
                    layer.cumulative_length = layer.cumulative_length.to(device)
        return self

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of what is held: `attention` (keys and values, room to grow not counted), `mamba` (states, and records
        while recording), and their `total`."""
        sizes = {"attention": 0, "mamba": 0}
        for layer in self.layers:
            if isinstance(layer, MambaCacheLayer):
                sizes["mamba"] += sum(t.nbytes for t in layer.tensors())
            elif isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                sizes["attention"] += layer.keys.nbytes + layer.values.nbytes
        return {**sizes, "total": sum(sizes.values())}

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the cache to one safetensors file. Records are not kept: a loaded cache starts committed.

        Raises:
            FileExistsError: if the file is there and `overwrite` is not set.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
        length, tensors, shapes = int(self.get_seq_length()), {}, []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MambaCacheLayer) and layer.has_previous_state[0]:
                conv_state, ssm_state = read_states(layer)
                tensors |= {f"layers.{index}.conv_state": conv_state, f"layers.{index}.ssm_state": ssm_state}
            elif isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                tensors |= {
                    f"layers.{index}.keys": layer.keys[:, :, :length],
                    f"layers.{index}.values": layer.values[:, :, :length],
                }
            shapes.append(type(layer).__name__)
        metadata = {"format": FILE_FORMAT, "length": str(length), "num_layers": json.dumps(len(shapes))}
        metadata["sha256"] = tensors_digest(tensors, metadata)
        with whole_file(path) as part:
            save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: PreTrainedConfig, max_cache_len: int | None = None, device: str = "cpu"
    ) -> "HybridCache":
        """Read a cache that `save` wrote, for a model with this configuration.

        Raises:
            ValueError: if the file is damaged, is no cache, or was written by another model.
        """
        tensors, metadata = read_checked(path, device)
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} is not a saved cache: its format is {metadata.get('format')!r}, not {FILE_FORMAT!r}"
            )
        length = metadata.get("length", "")
        if not length.isdecimal() or not tensors:
            raise ValueError(f"{path} is not a saved cache: length={length!r}, {len(tensors)} tensors")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not is_finite(tensor):
                raise ValueError(f"{path} has {name} in {tensor.dtype}: allowed are finite floating-point numbers")
            if name.endswith((".keys", ".values")) and (tensor.dim() != 4 or tensor.shape[2] != int(length)):
                raise ValueError(f"{path} has {name} in shape {tuple(tensor.shape)}: allowed are {length} tokens")
        cache = cls(config, max_cache_len)
        expected = set()
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, MambaCacheLayer):
                names = (f"layers.{index}.conv_state", f"layers.{index}.ssm_state")
            elif isinstance(layer, CacheLayerMixin):
                names = (f"layers.{index}.keys", f"layers.{index}.values")
            else:
                continue
            expected |= set(names)
            if not set(names) <= set(tensors):
                break
            if isinstance(layer, MambaCacheLayer):
                layer.store(tensors[names[0]], tensors[names[1]], int(length))
            else:
                cache.update(tensors[names[0]], tensors[names[1]], index)
        if expected != set(tensors) or metadata.get("num_layers") != str(len(cache.layers)):
            raise ValueError(f"{path} was written by another model: its layers are not those of this configuration")
        check_cache(cache, config, batch_size=next(iter(tensors.values())).shape[0])
        return cache


class DynamicHybridCache(HybridCache, DynamicCache):
    """A `HybridCache` that grows; what `HybridCache(config)` makes."""


class StaticHybridCache(HybridCache, StaticCache):
    """A `HybridCache` with a fixed room; what `HybridCache(config, max_cache_len)` makes."""


def _row_tensors(layer) -> list[Tensor]:
    """What a layer holds of each row: Mamba states, or keys and values."""
    if isinstance(layer, MambaCacheLayer):
        return layer.tensors()
    return [layer.keys, layer.values] if isinstance(layer, CacheLayerMixin) and layer.is_initialized else []


def _copied(layer):
    """The layer with own lists and the same tensors: what replaces them does not change the first one."""
    copied = copy.copy(layer)
    for name, held in vars(layer).items():
        if isinstance(held, (list, dict)):
            setattr(copied, name, copy.copy(held))
    return copied


def _join_layers(layers: Sequence, length: int):
    """One layer with the rows of all, keys and values padded on the left to `length`."""
    joined = _copied(layers[0])
    if isinstance(joined, MambaCacheLayer):
        joined._assign(*(torch.cat(states) for states in zip(*(read_states(layer) for layer in layers), strict=True)))
        joined.tokens_seen = length
    elif isinstance(joined, GrowingLayer):
        joined.keys, joined.values = (
            torch.cat([_padded(t, length) for t in tensors]) for tensors in zip(*map(_row_tensors, layers), strict=True)
        )
        joined.drop_memory()
    return joined


def _padded(states: Tensor, length: int) -> Tensor:
    """(b, kv heads, l, head_dim) with zeros on the left, `length` tokens in all."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))


def _is_recorded() -> bool:
    """Whether a graph is being made of what runs now: the device cannot be asked then."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def hybrid_layers(config: PreTrainedConfig, max_cache_len: int | None = None) -> list:
    """One empty cache layer per layer of the model."""
    attention = GrowingLayer if max_cache_len is None else lambda: StaticLayer(max_cache_len)
    makers = {"full_attention": attention, "linear_attention": lambda: MambaCacheLayer(config.conv_kernel)}
    return [makers.get(kind, DummyLayer)() for kind in config.layers_block_type]


def read_states(layer: LinearAttentionLayer) -> tuple[Tensor | None, Tensor | None]:
    """(convolution state (b, d, k), state-space state (b, h, p, n)), or (None, None) before the first token."""
    if not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """Fit a transformers cache to this model in place: layers it has yet to create, and roll-back for unused Mamba layers."""
    if isinstance(cache, HybridCache):
        return cache
    if not isinstance(cache, Cache):
        raise ValueError(f"{CACHE_NAME}={type(cache).__name__}: allowed is HybridCache or another transformers Cache")
    if not cache.layers:
        cache.layers = hybrid_layers(config)
        cache.layer_class_to_replicate = None
    for index, (layer, kind) in enumerate(zip(cache.layers, config.layers_block_type)):
        if type(layer) is LinearAttentionLayer and not layer.has_previous_state[0]:
            cache.layers[index] = MambaCacheLayer(config.conv_kernel) if kind == "linear_attention" else DummyLayer()
            cache.layers[index].record_past = layer.record_past
    return cache


def leave_inference_mode(cache: Cache) -> None:
    """Copy what was made under `torch.inference_mode()`: outside of it such tensors cannot be updated where they are."""
    if torch.is_inference_mode_enabled():
        return
    for layer in cache.layers:
        if isinstance(layer, MambaCacheLayer):
            if any(t.is_inference() for t in layer.tensors()):
                layer.map_rows(lambda t: t.clone())
        elif isinstance(layer, CacheLayerMixin):
            for name, held in vars(layer).items():
                if isinstance(held, Tensor) and held.is_inference():
                    setattr(layer, name, held.clone())


def sequence_length(cache: Cache) -> int | Tensor:
    """Tokens in a cache, whichever class it is and whether or not the model has attention layers."""
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            return layer.get_seq_length()
    for layer in cache.layers:
        if isinstance(layer, MambaCacheLayer):
            return layer.tokens_seen
    return 0


def check_cache(cache: Cache, config: PreTrainedConfig, batch_size: int) -> None:
    """Refuse a cache of another model or of another batch.

    Raises:
        ValueError: naming the layer, what it holds and what the model needs.
    """
    kinds = config.layers_block_type
    if len(cache.layers) != len(kinds):
        raise ValueError(
            f"{CACHE_NAME} has {len(cache.layers)} layers, the model has {len(kinds)}: a cache of another model"
        )
    kv_heads, kv_dim = config.num_key_value_heads, config.head_dim
    tensor_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    state_shapes = _state_shapes(config)
    for index, (layer, kind) in enumerate(zip(cache.layers, kinds)):
        if kind == "linear_attention" and isinstance(layer, LinearAttentionLayer):
            conv_shape, ssm_shape = next(state_shapes)
            if not layer.is_recurrent_states_initialized[0]:
                continue
            held, needed = layer.recurrent_states[0].shape, (batch_size, *ssm_shape)
            if layer.conv_states[0].shape[1:] != conv_shape:
                held, needed = layer.conv_states[0].shape, (batch_size, *conv_shape)
        elif kind == "full_attention" and isinstance(layer, CacheLayerMixin):
            if not layer.is_initialized or layer.keys.numel() == 0:
                continue
            rows, heads, _, dim = layer.keys.shape
            own_heads = heads if tensor_parallel and kv_heads % heads == 0 else kv_heads  # a rank may hold some of them
            held, needed = (rows, heads, dim), (batch_size, own_heads, kv_dim)
        elif kind in ("mlp", "moe") and isinstance(layer, DummyLayer):
            continue
        else:
            raise ValueError(f"{CACHE_NAME}.layers[{index}] is a {type(layer).__name__}, the model's layer is {kind}")
        if tuple(held) != needed:
            what = "another batch" if tuple(held)[1:] == needed[1:] else "another model"
            raise ValueError(f"{CACHE_NAME}.layers[{index}] holds {tuple(held)}, {needed} is needed: a cache of {what}")


def _state_shapes(config: PreTrainedConfig) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
    """(d, k) and (h, p, n) of each Mamba layer. Reads each field once: that takes 3 us, and this runs at every token."""
    fields = (config.mamba_num_heads, config.mamba_head_dim)
    sizes = zip(*(repeat(size) if isinstance(size, int) else size for size in fields))
    g, n, taps = config.n_groups, config.ssm_state_size, config.conv_kernel
    return (((h * p + 2 * g * n, taps), (h, p, n)) for h, p in sizes)
