"""From the live layout back to an ordinary checkpoint, a tensor at a time; and which models have a live layout."""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ... import manifest
from ...checkpoint import save
from ...model.loading import warn_of_other_readers, weight_files
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ...model.saving import save_whole
from ...model.weights import FLOATS, TensorSpec, find_tensors, name_in_file, read_name, released_name
from ...tensors import checkpoint_tensors
from ...units import parse_bytes
from ...whole_files import write_text
from .ordered_linear import OrderedLinear
from .tied_tensors import find, tensor_of


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose weights are not plain tensors, all in one place and all named by its configuration.

    Raises:
        ValueError: naming the tensor and what to do.
    """
    if not isinstance(model, NemotronHForCausalLM):
        raise ValueError(
            f"model is a {type(model).__name__}: allowed is a NemotronHForCausalLM; merge adapters first (merge_and_unload)"
        )
    expected = {read_name(name).module for name in checkpoint_names(model)}
    expected |= {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    devices = set()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name not in expected and not name.endswith(".blocks"):
            raise ValueError(
                f"{name} is no weight that the configuration names: adapters must be merged first (merge_and_unload), and "
                "quantised weights cannot be viewed; load the parent in bfloat16"
            )
        plain = type(weight) in (nn.Parameter, Tensor) and (weight.dtype in FLOATS.values() or name.endswith(".blocks"))
        if not plain or type(weight.data) is not Tensor:
            raise ValueError(
                f"{name} is a {type(weight.data).__name__} of {weight.dtype}: allowed are plain tensors of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS.values())}; quantised or sharded weights cannot "
                "be viewed, load the parent in bfloat16 on one device"
            )
        devices.add(weight.device)
    if len(devices) > 1 and "meta" in {device.type for device in devices}:
        raise ValueError("some weights are offloaded: allowed is a model that is wholly in memory")
    if len(devices) > 1:
        raise ValueError(f"the weights are on {', '.join(sorted(map(str, devices)))}: allowed is one device")


def write_ordinary(
    model: NemotronHForCausalLM,
    directory: str | os.PathLike,
    state_dict: Mapping[str, Tensor] | None,
    max_shard_size: int | str,
) -> None:
    """Write the configuration and the weights in released names; those of `state_dict` (names of our modules) if given."""
    check_plain(model)
    warn_of_other_readers(model.config)
    names = [name_in_file(name, model.config.model_type) for name in checkpoint_names(model)]
    tensors = ((name, ordinary_tensor(model, name, state_dict)) for name in names)
    specs = [
        TensorSpec(name, tensor_of(*find(model, read_name(name).module)).dtype, shape)
        for name, shape in zip(names, _shapes(model))
    ]

    def write(folder: str) -> None:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = ["NemotronHForCausalLM"], model.dtype
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        digests = save(Path(folder), specs, tensors, parse_bytes(max_shard_size, "max_shard_size"))
        write_manifest(folder, {released_name(name): digest.sha256 for name, digest in digests.items()})

    save_whole(directory, write)


def write_manifest(folder: str | os.PathLike, sha256: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a folder's weights next to them; `sha256` by released name, None to read the files for it."""
    stored = find_tensors(weight_files(folder))
    if sha256 is None:
        sha256 = {name: manifest.checksum(entry) for name, entry in stored.items()}
    write_text(Path(folder) / manifest.NAME, manifest.as_text(manifest.make_manifest(stored, sha256)))


def checkpoint_names(model: NemotronHForCausalLM) -> Iterator[str]:
    """Released names of all tensors of a model, one for each expert."""
    for tensor in checkpoint_tensors(model.config):
        yield from (place.released for place in tensor.places())


def ordinary_tensor(model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None) -> Tensor:
    """One tensor of a checkpoint, by its released name, on the CPU and contiguous."""
    place = read_name(name)
    module, own = find(model, place.module)
    if state_dict is not None:
        tensor = state_dict[place.module]
    else:
        tensor = module.ordinary(own) if isinstance(module, OrderedLinear) else tensor_of(module, own).detach()
    if place.expert is not None:
        tensor = tensor[place.expert]
    return tensor.cpu().contiguous()


def _shapes(model: NemotronHForCausalLM) -> Iterator[tuple[int, ...]]:
    for tensor in checkpoint_tensors(model.config):
        yield from (tensor.shape for _ in range(tensor.copies))
