"""LoRA on out_proj, which PEFT refuses for every model of `model_type: nemotron_h`.

PEFT's reason is transformers' own class, whose fused kernel takes `out_proj.weight` and thereby bypasses an adapter.
Our mixer calls out_proj as a module, so an adapter on it works. PEFT has no setting for this. Therefore its check is
wrapped, for our classes and out_proj only: transformers' own nemotron_h is still refused, and so is conv1d, whose weight
our mixer reads.

An adapter with out_proj loads only where these classes do; `merge_and_unload()` gives a checkpoint that loads anywhere.
"""

import sys
from types import ModuleType

from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHECK = "_check_lora_target_modules_mamba"  # PEFT 0.21; (peft_config, model, target_name), raises ValueError

_wrapped_in: ModuleType | None = None


def allow_adapters_on_out_proj(model_class: type[nn.Module]) -> None:
    """Let PEFT, if it is in use, put adapters on the out_proj of `model_class`; cheap to call again.

    The model calls it whenever its modules are walked, which PEFT does before its check. PEFT therefore need not be
    installed, is never imported from here, and may be imported before or after this package.
    """
    global _wrapped_in
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or tuners is _wrapped_in or CHECK not in vars(tuners):
        return
    check = vars(tuners)[CHECK]

    def check_unless_ours(peft_config, model: nn.Module, target_name: str) -> None:
        if not isinstance(model, model_class):
            return check(peft_config, model, target_name)
        _warn_of_idle_adapters(peft_config, model)
        if target_name != "out_proj":
            check(peft_config, model, target_name)

    setattr(tuners, CHECK, check_unless_ours)
    _wrapped_in = tuners


def _warn_of_idle_adapters(peft_config, model: nn.Module) -> None:
    if "mtp" in dict(model.named_children()) and peft_config.exclude_modules is None:
        logger.warning_once(
            "target_modules may also match the multi-token prediction layers, which run only with mtp_loss_weight: without "
            r"it their adapters get no gradient. Pass exclude_modules=r'mtp\..*' to leave them out."
        )
