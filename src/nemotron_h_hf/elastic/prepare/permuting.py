"""A parent's weights in another order: the same function, with what matters most in front.

Memory: one tensor and its copy; of a live model's experts, those of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import Digest, save
from ...model.configuration_nemotron_h import NemotronHConfig
from ...model.configuration_nemotron_h_vl import NemotronHVLConfig
from ...model.weights import Checkpoint, TensorSpec, name_in_file, read_name, released_name
from ...slicing import Kept, cuts
from ..vision import cuts_in_files


@torch.no_grad()
def permute_model(model: nn.Module, order: Kept) -> None:
    """Put the weights of a NemotronHForCausalLM, in place, in the order of `order`, which holds all indices."""
    state = model.state_dict(keep_vars=True)
    stacked: dict[str, Tensor] = {}
    for cut in cuts(model.config, order):
        own = read_name(cut.name)
        name, number, target = own.module, own.expert, state[own.module]
        if number is None:
            target.copy_(cut.of(target))
            continue
        if name not in stacked:
            stacked[name] = torch.empty_like(target)
        stacked[name][number] = cut.of(target[read_name(cut.source).expert])
        if number + 1 == len(target):  # the layer's last: none of the old ones is needed any more
            target.copy_(stacked.pop(name))


def permute_checkpoint(
    source: Path,
    config: NemotronHConfig | NemotronHVLConfig,
    order: Kept,
    output: Path,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, Digest]:
    """Write the weights of the checkpoint `source` to the folder `output` in the order of `order`, in their own dtypes.

    `progress` is called with the bytes of each tensor. What was seen of each is returned by released name. Of a
    vision-language model the language model is reordered, and with it the rows of the projector's last matrix.

    Raises:
        ValueError: naming the tensor, if the files are not those of `config`, or if `output` has weights already.
    """
    stored = Checkpoint(source)
    if sees := isinstance(config, NemotronHVLConfig):
        names = {name: name for name in stored}
        shapes = {name: stored.spec(name).shape for name in stored}
        planned = list(cuts_in_files(shapes, cuts(config.text_config, order), order.hidden))
    else:
        names = {released_name(name): name for name in stored}
        planned = list(cuts(config, order))
    for cut in planned:
        if cut.source not in names:
            raise ValueError(f"{source} lacks {cut.source}, which its config asks for")
        if (shape := stored.spec(names[cut.source]).shape) != cut.shape:
            raise ValueError(f"{source} has {cut.source} in shape {shape}, its config asks for {cut.shape}")
    if left_over := sorted(set(names) - {cut.source for cut in planned}):
        raise ValueError(f"{source} has {left_over[0]}, for which its config has no place")
    written = {cut.name: cut.name if sees else name_in_file(cut.name, config.model_type) for cut in planned}
    specs = [TensorSpec(written[cut.name], stored.spec(names[cut.source]).dtype, cut.shape) for cut in planned]

    def reordered() -> Iterator[tuple[str, Tensor]]:
        for cut in planned:
            tensor = cut.of(stored[names[cut.source]])
            yield written[cut.name], tensor
            progress(tensor.nbytes)

    digests = save(output, specs, reordered())
    return {name if sees else released_name(name): digest for name, digest in digests.items()}
