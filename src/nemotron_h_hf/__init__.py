"""Nemotron-H for Hugging Face transformers. Importing the package registers its classes for `nemotron_h` and `nemotron_h_puzzle`.

tensors.py             the table of a checkpoint's tensors and of the axes that smaller models cut
cost.py                parameters, bytes and operations of a configuration
memory_model.py        bytes at inference, each part in its own precision
slicing.py             which rows and columns of each tensor a smaller model keeps
checkpoint.py          sharded safetensors, in and out, one tensor at a time
resumable.py           a checkpoint folder that an interrupted run continues to write
whole_files.py         files that are complete or absent
output_folders.py      folders that commands write: locked, separate from their sources, resumed
manifest.py            checksums next to the weights, and the check on loading
checkpoint_summary.py  the facts of one checkpoint, for `info` and model cards
vision_summary.py      the facts of a vision-language model
hub.py                 model card, model code next to the weights, upload
command_line.py        a command's options as a dataclass
inputs.py              devices, YAML files and tokenizers given to a command
environment.py         the machine, versions, and the memory of this process
errors.py              the form of every refusal
tokenizer_files.py     what a checkpoint folder has apart from weights and configuration
units.py               "380B", "32Ki" and "7GiB" as numbers
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # where Pillow or torchvision lack, too

from .elastic.attach import attach
from .model.cache import HybridCache
from .model.configuration_nemotron_h import NemotronHConfig, NemotronHPuzzleConfig
from .model.configuration_nemotron_h_vl import NemotronHVLConfig
from .model.image_processing_nemotron_h_vl import NemotronHVLImageProcessor, NemotronNanoVLV2ImageProcessor
from .model.modeling_nemotron_h import (
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHModel,
    NemotronHPuzzleForCausalLM,
    NemotronHPuzzleForSequenceClassification,
    NemotronHPuzzleModel,
)
from .model.modeling_nemotron_h_vl import (
    NemotronH_Nano_Omni_Reasoning_V3,
    NemotronH_Nano_VL_V2,
    NemotronHVLForConditionalGeneration,
    NemotronHVLModel,
)
from .model.processing_nemotron_h_vl import (
    NemotronH_Nano_Omni_Reasoning_V3Processor,
    NemotronHVLProcessor,
    NemotronNanoVLV2Processor,
)

__version__ = "0.1.0"

# The small trained model that comes with the package.
EMBEDDED_MODEL = str(Path(__file__).parent / "assets" / "nemotron-h-tiny")
# A smaller one that sees; `digits.png` in its folder is a picture for it.
EMBEDDED_VISION_MODEL = str(Path(__file__).parent / "assets" / "nemotron-h-vl-tiny")

attach()
for base, language_model, classifier in (
    (NemotronHModel, NemotronHForCausalLM, NemotronHForSequenceClassification),
    (NemotronHPuzzleModel, NemotronHPuzzleForCausalLM, NemotronHPuzzleForSequenceClassification),
):
    config_class = base.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, base, exist_ok=True)
    AutoModelForCausalLM.register(config_class, language_model, exist_ok=True)
    AutoModelForSequenceClassification.register(config_class, classifier, exist_ok=True)

AutoModel.register(NemotronHVLConfig, NemotronHVLModel, exist_ok=True)
for model_class, image_processor, processor in (
    (NemotronHVLForConditionalGeneration, NemotronHVLImageProcessor, NemotronHVLProcessor),
    (NemotronH_Nano_VL_V2, NemotronNanoVLV2ImageProcessor, NemotronNanoVLV2Processor),
    (NemotronH_Nano_Omni_Reasoning_V3, NemotronNanoVLV2ImageProcessor, NemotronH_Nano_Omni_Reasoning_V3Processor),
):
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    AutoImageProcessor.register(config_class, slow_image_processor_class=image_processor, exist_ok=True)
    AutoProcessor.register(config_class, processor, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    if model_class is not NemotronHVLForConditionalGeneration:  # the released config.json maps this to it as well
        AutoModel.register(config_class, model_class, exist_ok=True)

# Public names that are imported when they are first asked for -> the module that has them.
LATER = {
    "BudgetSchedule": "nemotron_h_hf.elastic.live.generating",
    "NemotronHElasticForCausalLM": "nemotron_h_hf.elastic.live.parent",
    "NemotronHElasticForConditionalGeneration": "nemotron_h_hf.elastic.live.vision",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(LATER[name]))[name]


__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_VISION_MODEL",
    "BudgetSchedule",
    "HybridCache",
    "NemotronHElasticForCausalLM",
    "NemotronHElasticForConditionalGeneration",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHModel",
    "NemotronHPuzzleConfig",
    "NemotronHPuzzleForCausalLM",
    "NemotronHPuzzleForSequenceClassification",
    "NemotronHPuzzleModel",
    "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Nano_VL_V2",
    "NemotronHVLConfig",
    "NemotronHVLForConditionalGeneration",
    "NemotronHVLImageProcessor",
    "NemotronHVLModel",
    "NemotronHVLProcessor",
]
