"""Nemotron-H for Hugging Face transformers. Importing the package registers its classes for `model_type: nemotron_h`."""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .elastic.attach import attach
from .model.cache import HybridCache
from .model.configuration_nemotron_h import NemotronHConfig
from .model.modeling_nemotron_h import NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHModel

__version__ = "0.1.0"

# The small trained model that comes with the package.
EMBEDDED_MODEL = str(Path(__file__).parent / "assets" / "nemotron-h-tiny")

attach()
AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
AutoModel.register(NemotronHConfig, NemotronHModel, exist_ok=True)
AutoModelForCausalLM.register(NemotronHConfig, NemotronHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NemotronHConfig, NemotronHForSequenceClassification, exist_ok=True)

# Public names that are imported when they are first asked for -> the module that has them.
LATER = {
    "BudgetSchedule": "nemotron_h_hf.elastic.live.generating",
    "NemotronHElasticForCausalLM": "nemotron_h_hf.elastic.live.parent",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(LATER[name]))[name]


__all__ = [
    "EMBEDDED_MODEL",
    "BudgetSchedule",
    "HybridCache",
    "NemotronHElasticForCausalLM",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHModel",
]
