"""FP8 training after the Nemotron-H paper: which Linear layers are converted, and their conversion by torchao.

The recipe (arXiv 2504.03624, section on FP8): per-tensor current scaling, E4M3 weights and activations, E5M2 gradients,
in the products of the forward and of both backward passes of every Linear in the decoder blocks,

    s(t) = F_max / max|t|      q(t) = cast(t * s(t))      y = q(x) q(W)^T / (s(x) s(W)), summed in fp32

but for the first and last four matrix products (GEMMs) in the order they run. That is torchao's "tensorwise" recipe with
our own filter. A GEMM here is a step through a layer that NVIDIA's trainer runs as one product:

    Mamba       in_proj | out_proj
    attention   q_proj, k_proj, v_proj together (one fused matrix there) | o_proj
    MLP         up_proj | down_proj
    MoE         into the experts (fc1_latent_proj, shared up_proj) | out of them (shared down_proj, fc2_latent_proj)

so every layer counts two, and four GEMMs are two layers, as NVIDIA's preset for this family has it. Routed experts stay
in high precision: their weights are one tensor per layer, no Linear. The same holds for embeddings, lm_head, router, convolution, scan,
attention's softmax, norms and the multi-token prediction layers.

Convert before the optimizer, the Trainer, adapters, FSDP2 or torch.compile see the model, and leave mixed precision at bf16:
Accelerate's "fp8" would convert once more with another filter. Parameters stay the same objects in high
precision: state dicts, checkpoints and optimizers do not change, and FSDP2 gathers weights in high precision.
Without torch.compile expect no gain in speed on a GPU.

Transformer Engine's current scaling cannot be reached through Accelerate (1.15 read): it builds DelayedScaling, or
MXFP8BlockScaling by a switch, and has no argument that would make it Float8CurrentScaling; and its converter takes every
Linear, lm_head too, without a filter. Going around it, by `te.autocast` in a model with te.Linear, would be a second FP8
path, for CUDA alone and with other parameters; it is not offered.
"""

import os
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

MULTIPLE = 16  # sizes that torch._scaled_mm takes
MIN_CAPABILITY = (8, 9)  # CUDA devices with FP8 products: Ada, Hopper and later

# Kind of layer -> its GEMMs in order, each the names of the Linear modules that make it up.
GEMMS = {
    "linear_attention": (("in_proj",), ("out_proj",)),
    "full_attention": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("up_proj",), ("down_proj",)),
    "moe": (("shared_experts.up_proj",), ("shared_experts.down_proj",)),
    "latent_moe": (("fc1_latent_proj", "shared_experts.up_proj"), ("shared_experts.down_proj", "fc2_latent_proj")),
}


def convert_to_fp8(
    model: PreTrainedModel, emulate: bool | None = None, skip_first: int = 4, skip_last: int = 4
) -> list[str]:
    """Make the recipe's Linear modules of `model` compute in FP8, in place; the names of those converted.

    Args:
        emulate: round as FP8 does and multiply in fp32, on any device. None: real FP8 if there is a CUDA device that
            can, else emulated with a warning; with real FP8, modules whose sizes are no multiples of 16 are
            emulated, with a warning too. (False on a CPU runs torch's own FP8 product, no faster there.)
        skip_first, skip_last: GEMMs at either end of the stack that stay in high precision.

    Raises:
        ImportError: without torchao.
        ValueError: if the model is converted already or Accelerate would do it, if a module is no plain Linear, if sizes
            are no multiples of 16 (emulate=False), or if nothing is left to convert.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("FP8 training needs torchao: pip install 'nemotron-h-hf[fp8]'") from error
    if converted := converted_modules(model):
        raise ValueError(f"model: {len(converted)} modules are in FP8 already, {converted[0]} first; convert it once")
    refuse_accelerate_fp8(AcceleratorState().mixed_precision if is_initialized() else None)
    names = fp8_module_names(model, skip_first, skip_last)
    check_modules(model, names)
    emulated = set(choose_emulated(model, names, emulate))
    if "moe" in model.config.get_text_config().layers_block_type:
        logger.warning_once("FP8: routed experts stay in high precision, only shared experts and projections convert")
    for how, chosen in ((True, emulated), (False, set(names) - emulated)):
        # Padding acts on the inner size of each product, which is the number of tokens for a weight's gradient.
        config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=how, pad_inner_dim=not how)
        convert_to_float8_training(model, module_filter_fn=lambda _, name, now=chosen: name in now, config=config)
    return names


def fp8_module_names(
    model_or_config: PreTrainedModel | PreTrainedConfig, skip_first: int = 4, skip_last: int = 4
) -> list[str]:
    """The Linear modules that the recipe converts, in the order they run; for a configuration, as the causal LM names them.

    Raises:
        ValueError: for negative counts, or if they leave nothing.
    """
    for field, value in (("skip_first", skip_first), ("skip_last", skip_last)):
        if value < 0:
            raise ValueError(f"{field}={value}: allowed is 0 or more")
    gemms = decoder_gemms(model_or_config)
    if skip_first + skip_last >= len(gemms):
        raise ValueError(
            f"skip_first={skip_first}, skip_last={skip_last}: allowed is a sum below the {len(gemms)} GEMMs of "
            "this model's decoder"
        )
    return [name for gemm in gemms[skip_first : len(gemms) - skip_last] for name in gemm]


def decoder_gemms(model_or_config: PreTrainedModel | PreTrainedConfig) -> list[tuple[str, ...]]:
    """Every GEMM of the decoder blocks in execution order: the names of the Linear modules it consists of."""
    if isinstance(model_or_config, PreTrainedModel):
        config, base = model_or_config.config.get_text_config(), model_or_config.base_model
        prefix = "" if base is model_or_config else model_or_config.base_model_prefix + "."
        prefix += "language_model." if config is not model_or_config.config else ""
    else:
        config, prefix = model_or_config, "model."
    return [
        tuple(f"{prefix}layers.{index}.mixer.{name}" for name in gemm)
        for index, kind in enumerate(config.layers_block_type)
        for gemm in GEMMS["latent_moe" if kind == "moe" and config.size("moe_latent_size", index) else kind]
    ]


def print_fp8_modules(model: PreTrainedModel) -> None:
    """Say which modules are in FP8, one line per layer, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(describe_fp8_modules(model), flush=True)


def describe_fp8_modules(model: PreTrainedModel) -> str:
    """The modules of `model` that are in FP8, one line per layer, under a line with their number."""
    names = set(converted_modules(model))
    linear = [name for gemm in decoder_gemms(model) for name in gemm]
    if not names:
        return f"FP8 in none of the {len(linear)} Linear modules in the decoder"
    by_layer: dict[str, list[str]] = {}
    for name in linear:
        if name in names:
            layer, module = name.split(".mixer.")
            by_layer.setdefault(layer, []).append(module)
    num_emulated = sum(model.get_submodule(name).config.emulate for name in names)
    how = {0: "real", len(names): "emulated"}.get(num_emulated, f"{num_emulated} of them emulated")
    rows = [f"  {layer}: {', '.join(modules)}" for layer, modules in by_layer.items()]
    return "\n".join([f"FP8 ({how}) in {len(names)} of the {len(linear)} Linear modules in the decoder:", *rows])


def converted_modules(model: nn.Module) -> list[str]:
    """Names of the modules torchao converted, whoever asked for it; needs no torchao."""
    module = sys.modules.get("torchao.float8.float8_linear")
    if module is None:
        return []
    return [name for name, child in model.named_modules() if isinstance(child, module.Float8Linear)]


def refuse_double_conversion(model: nn.Module, settings: TrainingArguments | Accelerator) -> None:
    """Stop a converted model from being converted again by Accelerate; does nothing for one that is not converted.

    Raises:
        ValueError: if mixed precision is fp8, or an FP8 recipe or backend is set, in arguments, accelerator or environment.
    """
    if not converted_modules(model):
        return
    refuse_accelerate_fp8(settings.mixed_precision)
    if isinstance(settings, Accelerator) and settings.fp8_backend != "NO":
        raise ValueError(
            f"Accelerate has the FP8 backend {settings.fp8_backend.value}: allowed is none, the model is in FP8 already"
        )


def refuse_accelerate_fp8(mixed_precision: str | None) -> None:
    """ValueError if `mixed_precision`, or else the environment that an Accelerator would read, is fp8."""
    for source, value in (
        ("mixed_precision", mixed_precision),
        ("ACCELERATE_MIXED_PRECISION", os.environ.get("ACCELERATE_MIXED_PRECISION")),
    ):
        if value is not None and value.lower() == "fp8":
            raise ValueError(
                f"{source}=fp8: allowed are bf16 and no; Accelerate would convert every Linear but two, after "
                "another filter than the paper's; the conversion here is the whole of FP8"
            )


def check_modules(model: nn.Module, names: list[str]) -> None:
    """ValueError unless each named module is a plain Linear."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"{name}={type(module).__name__}: allowed is nn.Linear; convert before adapters are added, "
                "and without quantised weights"
            )


def choose_emulated(model: nn.Module, names: list[str], emulate: bool | None) -> list[str]:
    """Those of the named Linear modules that are emulated; warns if the caller left the choice and there are any.

    Raises:
        ValueError: with emulate=False, for sizes that torch._scaled_mm does not take.
    """
    linear = {name: model.get_submodule(name) for name in names}
    odd = [name for name, m in linear.items() if m.in_features % MULTIPLE or m.out_features % MULTIPLE]
    if emulate is None:
        emulate = not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= MIN_CAPABILITY)
        if emulate:
            logger.warning_once(
                f"FP8 is emulated: no CUDA device of capability {'.'.join(map(str, MIN_CAPABILITY))} or more. Values are "
                "rounded as in FP8 and multiplied in fp32, which is slower than no FP8."
            )
        elif odd:
            logger.warning_once(
                f"FP8 is emulated in {len(odd)} of {len(names)} modules, whose sizes are no multiples of {MULTIPLE}: "
                f"{', '.join(odd)}"
            )
        return names if emulate else odd
    if odd and not emulate:
        inputs, outputs = linear[odd[0]].in_features, linear[odd[0]].out_features
        raise ValueError(
            f"{odd[0]}={inputs} inputs and {outputs} outputs: allowed in real FP8 are multiples of {MULTIPLE}; choose "
            "such sizes, or emulate=None, which emulates the modules that have others"
        )
    return names if emulate else []
