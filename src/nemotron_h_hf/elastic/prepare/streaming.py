"""A model whose layers are read from its checkpoint each time they run: one of them is in memory at a time.

It measures a model larger than memory. Embeddings, norms and head stay; the mixer of a layer is read before it runs and
freed before the next one is read. A bypassed one is not read. A forward reads the file once, so larger batches read less; a
layer that runs several times in a row is read once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...model.configuration_nemotron_h import NemotronHConfig
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ...model.weights import Checkpoint, read_name

STACKED = ("experts.up_proj", "experts.down_proj")  # one tensor here, a matrix for each expert in files


def streamed(
    config: NemotronHConfig, folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> NemotronHForCausalLM:
    """The model of a folder of released names, to run without gradients. Multi-token prediction, which no forward runs, stays out.

    Args:
        dtype: of the weights; None for that of each tensor in the file.
        device: where they run.

    Raises:
        ValueError: naming the tensor or file, if the files are not those of `config`.
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    stored = Checkpoint(folder)
    places = {name: read_name(name) for name in stored}

    def read(module: nn.Module, prefix: str) -> None:
        own = dict([*module.named_parameters(), *module.named_buffers()])
        found: dict[str, Tensor] = {}
        missing = set(own)
        experts = {place: set(range(len(own[place]))) for place in own if place.endswith(STACKED)}
        for name, own_name in places.items():
            if not own_name.module.startswith(prefix):
                continue
            place = own_name.module.removeprefix(prefix)
            expert = own_name.expert  # its matrix is a part of that of all experts
            shape = () if place not in own else own[place].shape[1:] if expert is not None else own[place].shape
            if stored.spec(name).shape != tuple(shape):
                raise ValueError(
                    f"{folder} has {name} in shape {stored.spec(name).shape}, its config asks for {tuple(shape)}"
                )
            kind = own[place].dtype if place in dict(module.named_buffers()) else dtype or stored.spec(name).dtype
            tensor = stored[name].to(device, kind)
            if expert is None:
                found[place] = tensor
                missing.discard(place)
                continue
            if place not in found:
                found[place] = torch.empty(own[place].shape, dtype=kind, device=device)
            found[place][expert] = tensor
            experts[place].discard(expert)
            if not experts[place]:
                missing.discard(place)
        if missing:
            raise ValueError(f"{folder} lacks {prefix}{min(missing)} or a part of it, which its config asks for")
        module.load_state_dict(found, assign=True)

    def enter(mixer: nn.Module, prefix: str) -> None:
        if mixer not in loaded:
            while loaded:
                loaded.pop().to("meta")
            loaded.append(mixer)  # also if reading fails
            read(mixer, prefix)

    loaded: list[nn.Module] = []
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        read(block.norm, f"{prefix}norm.")
        block.mixer.register_forward_pre_hook(lambda mixer, _, prefix=prefix: enter(mixer, f"{prefix}mixer."))
    read(model.model.embeddings, "model.embeddings.")
    read(model.model.norm_f, "model.norm_f.")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    else:
        read(model.lm_head, "lm_head.")
    return model.requires_grad_(False).eval()
