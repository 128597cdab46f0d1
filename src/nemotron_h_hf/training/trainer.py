"""NemotronHTrainer: transformers.Trainer with our optimizer groups, schedule by tokens, exact data resume and safe checkpoints."""

from __future__ import annotations

from transformers import Trainer


class NemotronHTrainer(Trainer):
    """transformers.Trainer for a Nemotron-H model; `args` are `NemotronHTrainingArguments`.

    Args:
        flops_per_token: of forward and backward together, for the model FLOPs utilisation; None leaves it out.
    """

    def __init__(self, *args, flops_per_token: float | None = None, **kwargs):
        self.flops_per_token = flops_per_token
        super().__init__(*args, **kwargs)
