"""Which parts of a vision-language model a stage of training changes.

projector   the paper's first stage: tower and language model are frozen
all         its second stage
lora        adapters on the language model's projections and on the projector (with --lora_rank)
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..errors import require
from .adapters import AdapterArguments
from .arguments import flag

STAGES = ("projector", "all", "lora")


@dataclass
class VisionArguments:
    """Of models that see."""

    _argument_group_name = "vision"

    train: str | None = flag(
        None,
        "of a vision-language model: projector (tower and language model frozen), all, or lora (adapters on language "
        "model and projector, tower frozen); default: all, or lora with --lora_rank",
        STAGES,
    )


def choose_stage(vision: VisionArguments, adapters: AdapterArguments, sees: bool) -> str | None:
    """The stage of this run; None for a text model.

    Raises:
        ValueError: for flags that contradict each other or the model.
    """
    asked, rank = vision.train, adapters.lora_rank
    require(sees or asked is None, "train", asked, "none for a text model")
    if not sees:
        return None
    stage = asked or ("lora" if rank else "all")
    require((stage == "lora") == (rank > 0), "train", stage, "lora together with --lora_rank, the others without")
    return stage


def freeze(model: PreTrainedModel, stage: str) -> None:
    """Leave gradients to what the stage trains; adapters are added afterwards."""
    if stage == "projector":
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
