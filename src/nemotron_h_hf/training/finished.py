"""The end of a fine-tuning run: the trained model or its adapters as a folder that `from_pretrained` loads."""

from pathlib import Path

from .trainer import NemotronHTrainer


def save_finished(trainer: NemotronHTrainer, folder: Path) -> bool:
    """Write the weights, gathered first where FSDP spreads them; called by every process, True on the one that wrote."""
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)  # whole on the main process, empty on others
        if trainer.args.should_save:
            trainer._save(str(folder), state_dict=weights)
    else:
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads again
    return trainer.is_world_process_zero()
