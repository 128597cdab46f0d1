"""The end of a run: the trained model or its adapters as a folder that `from_pretrained` loads."""

import sys
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import require
from ..tokenizer_files import save_tokenizer
from .arguments import NemotronHTrainingArguments
from .checkpoints import last_whole_checkpoint
from .trainer import NemotronHTrainer


def save_finished(
    trainer: NemotronHTrainer,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "model",
    processor: ProcessorMixin | None = None,
) -> Path | None:
    """Write OUTPUT_DIR/`name`: the weights, gathered first where FSDP spreads them, and the tokenizer or processor.

    Every process calls it; the one that wrote gets the folder, the others None.

    Raises:
        ValueError: see `require_trained`.
    """
    require_trained(trainer)
    folder = Path(trainer.args.output_dir, name)
    if trainer.is_fsdp_enabled:
        weights = whole_weights(trainer)
        if trainer.args.should_save:
            trainer._save(str(folder), state_dict=weights)
    else:
        trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return None
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that is not read again
    if processor is not None:
        processor.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    print(f"{folder} holds the trained {name}", file=sys.stderr)
    return folder


def whole_weights(trainer: NemotronHTrainer) -> dict[str, Tensor]:
    """Name -> weight on the CPU, for the process that saves; the others take part in gathering and get nothing."""
    if not any(isinstance(weight, DTensor) for weight in trainer.model.parameters()):  # not FSDP2
        return trainer.accelerator.get_state_dict(trainer.model)
    weights = {}
    for name, weight in trainer.model.state_dict().items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if trainer.args.should_save:
            weights[name] = whole.cpu()
    return weights


def require_trained(trainer: NemotronHTrainer) -> None:
    """Raise a ValueError when the model has the weights that it began with: a sharded run that was done already is not
    loaded again."""
    if trainer.is_fsdp_enabled and trainer.state.global_step == 0:
        output_dir = Path(trainer.args.output_dir)
        way_on = f"nemotron-h export {output_dir} {output_dir / 'model'} writes them"
        if any(".lora_" in name for name, _ in trainer.model.named_parameters()):  # alone in their checkpoints
            way_on = (
                f"{output_dir / 'adapter'} has the adapters; if the run was interrupted while writing them, remove "
                f"{last_whole_checkpoint(output_dir)} and repeat the command"
            )
        raise ValueError(
            f"output_dir: the run in {output_dir} was done before, and its sharded weights are not loaded here; {way_on}"
        )


def take_push(training: NemotronHTrainingArguments) -> str | None:
    """Where --push_to_hub wants the finished model, or None. The trainer is not told: it would push every checkpoint."""
    asked, training.push_to_hub = training.push_to_hub, False
    require(not asked or training.hub_model_id is not None, "hub_model_id", None, "owner/name, with --push_to_hub")
    return training.hub_model_id if asked else None
