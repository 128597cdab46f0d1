"""Low-rank adapters (LoRA) on a Nemotron-H model, and its base in 4 bits (QLoRA): which modules, and the warnings.

Targets may be a preset or names of modules. In a hybrid the choice matters more than elsewhere: adapters on
attention only, the usual default, reach 4 of the 52 layers of the 8B.

    all         in_proj, out_proj (Mamba), q/k/v/o_proj (attention), up/down_proj (MLP and shared experts), latent projections
    mamba, attention, mlp           one of the three kinds
    experts     the routed experts' weights too, on top of all; they are parameters, no modules
"""

import importlib.util
import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import require
from .arguments import flag, nearest

logger = logging.get_logger(__name__)

MAMBA, ATTENTION = ("in_proj", "out_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj")
PROJECTOR = ("linear_1", "linear_2")  # of a vision-language model; its tower never has adapters
PRESETS = {
    "all": (*MAMBA, *ATTENTION, *MLP, *PROJECTOR), "mamba": MAMBA, "attention": ATTENTION, "mlp": MLP,
    "experts": (*MAMBA, *ATTENTION, *MLP, *PROJECTOR),
}  # fmt: skip
EXPERTS = ("experts.up_proj", "experts.down_proj")
FEW_PARAMETERS = 0.001  # of the model's own
FEW_LAYERS = 0.5
DEFAULTS = {"lora_alpha": 32.0, "lora_dropout": 0.0, "lora_targets": "all"}  # of flags, where there are adapters


@dataclass
class AdapterArguments:
    """LoRA: 0 as rank trains the whole model."""

    _argument_group_name = "adapters"

    lora_rank: int = flag(
        0, "rank of LoRA adapters; 0 trains all weights. Adapters want a higher --learning_rate, about 2e-4"
    )
    lora_alpha: float | None = flag(None, "adapters are scaled by alpha / rank; default: 32")
    lora_dropout: float | None = flag(None, "on the input of the adapters; default: 0")
    lora_targets: str | None = flag(
        None, "all, mamba, attention, mlp, experts (all and the routed experts), or names with commas; default: all"
    )
    load_in_4bit: bool = flag(False, "keep the base in 4 bits (QLoRA); needs bitsandbytes")

    def __post_init__(self) -> None:
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 (the whole model) or more")
        for name, default in DEFAULTS.items():
            given = getattr(self, name)
            has_adapters = self.lora_rank > 0
            require(
                has_adapters or given is None, name, given, "none without --lora_rank, where all weights are trained"
            )
            setattr(self, name, default if given is None else given)


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, dropout: float, targets: str) -> nn.Module:
    """The model with LoRA adapters (a PeftModel); only the adapters are trained.

    Args:
        targets: a preset, or names of modules separated by commas.

    Raises:
        ImportError: without peft.
        ValueError: for a rank below 1 or targets that the model does not have.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need peft: pip install 'nemotron-h-hf[peft]'")
    from peft import LoraConfig, get_peft_model

    require(rank >= 1, "lora_rank", rank, "1 or more")
    text = model.config.get_text_config()
    left_out = ([r"mtp\..*"] if text.num_nextn_predict_layers else []) + [r".*vision_tower\..*"]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules(model, targets),
        target_parameters=list(EXPERTS) if targets == "experts" else None,
        exclude_modules="|".join(left_out), task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    warn_of_few_weights(adapted, text)
    return adapted


def target_modules(model: nn.Module, targets: str) -> list[str]:
    """Last parts of module names: of a preset those that the model has, otherwise exactly the names given."""
    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if targets in PRESETS:
        chosen = [name for name in PRESETS[targets] if name in present]
        require(bool(chosen), "lora_targets", targets, f"a preset that matches one of {', '.join(sorted(present))}")
        if targets == "experts":
            has_experts = any(name.endswith("mixer.experts") for name, _ in model.named_modules())
            require(has_experts, "lora_targets", targets, "a model with routed experts; or all")
        return chosen
    chosen = [name.strip() for name in targets.split(",") if name.strip()]
    for name in chosen:
        allowed = f"{', '.join(PRESETS)}, or some of {', '.join(sorted(present))}"
        require(name in present, "lora_targets", name, allowed + nearest(name, [*PRESETS, *present]))
    require(bool(chosen), "lora_targets", targets, ", ".join(PRESETS))
    return chosen


def warn_of_few_weights(model: nn.Module, config: PreTrainedConfig) -> None:
    """Say how much is trained, and warn when that is very little or most layers have no adapter."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    count, total = sum(size for _, size in trained), count_parameters(model)
    layers = {match[1] for name, _ in trained if (match := re.search(r"layers\.(\d+)\.", name)) and ".mtp." not in name}
    num_layers = len(config.layers_block_type)
    said = (
        f"{count:,} of {total:,} parameters are trained ({count / total:.3%}), in {len(layers)} of {num_layers} layers"
    )
    if count < FEW_PARAMETERS * total or len(layers) < FEW_LAYERS * num_layers:
        logger.warning(
            f"{said}: that is little. --lora_targets all reaches every layer, a higher --lora_rank has more."
        )
    else:
        logger.info(said)


def trained_adapters(model: nn.Module) -> tuple[float, int]:
    """Elements of the adapters' matrices that each token meets, and the lowest layer that has one (lm_head counts as one more)."""
    config, elements, layers = model.config.get_text_config(), 0.0, []
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dim() == 2:
            own = [int(number) for number in re.findall(r"\.layers\.(\d+)\.", name)]
            share = 1.0
            if ".experts." in name:
                chosen, of = (config.size(field, own[-1]) for field in ("num_experts_per_tok", "n_routed_experts"))
                share = chosen / of
            elements += weight.numel() * share
            layers += own
    return elements, min(layers, default=config.num_hidden_layers)


def count_parameters(model: nn.Module) -> int:
    """Parameters, those in 4 bits counted by what they stand for."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def check_four_bit(model: nn.Module) -> str:
    """How much of a model loaded with `four_bit_loading` is in 4 bits, in words.

    Raises:
        ValueError: if nothing is.
    """
    from bitsandbytes.nn import Linear4bit

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = [module for module in linears if isinstance(module, Linear4bit)]
    require(
        bool(packed), "load_in_4bit", True, f"a model with layers to quantise: none of its {len(linears)} Linear were"
    )
    return (
        f"{len(packed)} of {len(linears)} Linear layers are in 4 bits, {model.get_memory_footprint():,} bytes in total"
    )


def four_bit_loading(use_cpu: bool = False) -> dict[str, object]:
    """Arguments of `from_pretrained` for a base in 4 bits (NF4, computed in bfloat16), on this process's own device.

    Raises:
        ValueError: where bitsandbytes is missing or has no 4-bit kernels for the device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit: needs bitsandbytes (pip install bitsandbytes), which is not installed")
    from bitsandbytes.functional import quantize_4bit

    on_gpu = torch.cuda.is_available() and not use_cpu
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        quantize_4bit(torch.ones(64, dtype=torch.bfloat16, device=device), quant_type="nf4")
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise ValueError(
            f"load_in_4bit: bitsandbytes cannot run on {device} here ({error}); leave it out, or take a machine where "
            "`python -m bitsandbytes` succeeds"
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}
