"""One copy of the weights in host memory: the first process holds them until they are sharded, the others hold none.

`fsdp_cpu_ram_efficient_loading: true` in Accelerate's file asks for it. transformers (5.23) still reads every file in
every process, and Accelerate (1.15) sends only parameters, no buffers, and only to processes that have memory for them.
Therefore here:

    load      the first process as always; the others build the model on the meta device, of dtypes and shapes alone
    shard     on the meta device, in every process; the first one's tensors wait in a state dict
    fill      tensor by tensor, the first process sends every process its part, and buffers whole
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import is_fsdp_enabled


def device_to_load_on() -> str | None:
    """The `device_map` of a model that will be sharded: "meta" where another process holds the weights, otherwise None.

    The process group has to be there; parsing NemotronHTrainingArguments makes it.
    """
    return "meta" if is_fsdp_enabled() and dist.get_rank() > 0 else None


def let_accelerate_fill(model: nn.Module) -> None:
    """Prepare for `Accelerator.prepare`, which shards `model` and calls the functions given here.

    It tells the optimizer's parameters by their addresses, which are all 0 on the meta device. Therefore they are numbered.
    Once Accelerate distributes buffers (its issue 3898) numbering them is enough.
    """
    if not is_fsdp_enabled():
        return
    for number, parameter in enumerate(model.parameters()):
        if parameter.is_meta:
            parameter.data_ptr = partial(int, number)
    fsdp_utils.fsdp2_load_full_state_dict = _fill_for_accelerate


@contextmanager
def filled_after(model: nn.Module) -> Iterator[None]:
    """Shard `model` in this context, in every process; at its end it has the first process's weights."""
    if not is_fsdp_enabled():
        yield
        return
    weights = model.state_dict()
    # Buffers that are not saved, such as angles.
    others = {name: buffer for name, buffer in model.named_buffers() if name not in weights}
    model.to("meta")
    yield
    fill(model, weights)
    device = next(parameter.device for parameter in model.parameters())
    for name, buffer in others.items():
        place, _, own = name.rpartition(".")
        whole = _on(device, buffer)
        dist.broadcast(whole, src=0)
        model.get_submodule(place).register_buffer(own, whole, persistent=False)


def fill(model: nn.Module, weights: Mapping[str, Tensor], cpu_offload: bool = False) -> None:
    """Give the tensors of a model that was sharded on the meta device their values, in every process at once.

    Args:
        weights: whole tensors by name; of all but the first process only dtype and shape count.
        cpu_offload: keep the parts in host memory.
    """
    empty = model.state_dict()
    device = next(place.device_mesh.device_type for place in empty.values() if isinstance(place, DTensor))
    filled = {}
    for name, place in empty.items():
        whole = _on(device, weights[name].detach())
        if isinstance(place, DTensor):
            part = distribute_tensor(whole, place.device_mesh, place.placements)
            filled[name] = part.cpu() if cpu_offload else part
        else:
            dist.broadcast(whole, src=0)
            filled[name] = whole
    model.load_state_dict(filled, assign=True)


def _on(device: torch.device | str, tensor: Tensor) -> Tensor:
    """The tensor on that device, with any values if it has none yet."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _fill_for_accelerate(
    accelerator: Any, model: nn.Module, full_sd: Mapping[str, Tensor], cpu_offload: bool = False
) -> nn.Module:
    fill(model, full_sd, cpu_offload)
    return model
