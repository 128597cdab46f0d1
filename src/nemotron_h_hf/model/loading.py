"""Loading without surprises: files are checked before use, weights after.

transformers renames `backbone.` to `model.` and merges per-expert matrices for its own classes only; the same rules are
registered here for ours. The native class shares their key in this process, and they fit it as well.

Tensors keep the dtype they have in the file: a checkpoint may hold A_log in fp32 and projections in bf16. Matrices stored in
several dtypes are the exception, since a product needs one: see `stored_dtypes`.
"""

import contextvars
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.utils import logging

from .json_files import read_json
from .weights import FLOAT32, FLOATS, INDEX_NAME, NO_WEIGHTS, Name, Stored, files_of, read_header, read_index, read_name

logger = logging.get_logger(__name__)

COMPUTED_WIDE = rf"\.(A_log|D|dt_bias|gate\.weight|{'|'.join(FLOAT32)}|\w*norm(_f)?\.weight)$"
"""Names of tensors that are made fp32 where they are used, in whichever dtype they are stored."""

# Arguments of `from_pretrained` that say where the files are.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

EXPERT_EXAMPLE = "backbone.layers.1.mixer.experts.0.up_proj.weight"
# What transformers takes for an expert: . is any character
LIKE_AN_EXPERT = re.compile(r"mixer.experts.*.(up_proj|down_proj).weight")


ReadWeights = Callable[[list[str]], Mapping[str, Any] | None]
"""Safetensors files -> slices to load, with the methods of safetensors' own, by released name; None: the files as they are."""


@dataclass(frozen=True)
class Loading:
    """The request of `from_pretrained`, which transformers does not pass on to where files are read.

    `keep_dtypes`: no dtype was given. `read_weights`: what reads the files instead of transformers, if it was given.
    """

    keep_dtypes: bool = False
    read_weights: ReadWeights | None = None


loading: contextvars.ContextVar[Loading] = contextvars.ContextVar("loading", default=Loading())  # noqa: B039 (frozen)


class OldName(WeightRenaming):
    """A name that is read and never written."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(self._original_target_patterns, self._original_target_patterns)


def register_names() -> None:
    """Teach transformers to read and write the released names for these classes."""
    # transformers 5.3 to 5.15 wrote `embedding` (transformers#48075); read under every prefix that is read
    singular = [OldName(f"{at}embedding.weight", f"{at}embeddings.weight") for at in ("backbone.", "model.")]
    singular.append(OldName("^embedding.weight", "embeddings.weight"))
    for layout, prefix in (
        ("nemotron_h", WeightRenaming),
        ("nemotron_h_puzzle", OldName),
    ):  # the latter writes `model.`
        rules = [*singular, prefix("backbone.", "model."), *expert_rules()]
        register_checkpoint_conversion_mapping(layout, rules, overwrite=True)


def expert_rules() -> list[WeightConverter]:
    """One matrix per expert on disk, one tensor of all of them in the model."""
    return [
        WeightConverter(f"mixer.experts.*.{name}.weight", f"mixer.experts.{name}", [MergeModulelist(dim=0)])
        for name in ("up_proj", "down_proj")
    ]


def module_names(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict in released names (`backbone.`, one matrix per expert) under the names of the modules.

    transformers' Trainer resumes by `load_state_dict` of the saved file as it is, and only warns of names that do not fit.

    Args:
        own: the model's own state dict; experts that `state_dict` lacks (another shard has them) stay as they are there.
    """
    names = {name: read_name(name) for name in state_dict}
    if not any(
        text.startswith(("backbone.", "model.embedding.")) or name.expert is not None for text, name in names.items()
    ):
        return state_dict
    renamed: dict[str, Tensor] = {}
    for text, name in names.items():
        if name.expert is None:
            renamed[name.module] = state_dict[text]
        else:
            if name.module not in renamed:
                renamed[name.module] = own[name.module].detach().clone()
            renamed[name.module][name.expert] = state_dict[text]
    return renamed


def check_folder(path: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    """Refuse what `from_pretrained(path, **arguments)` would fail on later; a hub id passes."""
    folder = os.path.join(path, arguments.get("subfolder") or "")
    check_index(folder)
    if arguments.get("config") is None:
        check_config(folder)


def check_config(folder: str | os.PathLike) -> None:
    """Refuse a folder of weights without a configuration, for which transformers would take the default one.

    Raises:
        ValueError: naming the file.
    """
    path = Path(folder) / "config.json"
    if path.parent.is_dir() and not path.is_file():
        raise ValueError(f"{path} is missing: a save is under way, or was interrupted and has to be repeated")


def check_index(folder: str | os.PathLike) -> None:
    """Refuse a configuration that is no JSON, and an index of shards that is damaged or leads out of its folder.

    A hub id, or a folder without them, passes.

    Raises:
        ValueError: naming the file.
    """
    path = Path(folder) / INDEX_NAME
    if path.is_file():
        read_index(path)
        if "metadata" not in read_json(path):
            raise ValueError(f"{path} has no metadata, which transformers asks for")
    for name in ("config.json", "generation_config.json"):
        if (Path(folder) / name).is_file():
            read_json(Path(folder) / name)


def weight_files(folder: str | os.PathLike) -> list[str]:
    """The safetensors files of a folder, those of the index or the only one.

    Raises:
        ValueError: if there are none, or the index is damaged.
    """
    check_index(folder)
    files = sorted(map(str, files_of(Path(folder))))
    if missing := [os.path.basename(file) for file in files if not os.path.isfile(file)]:
        raise ValueError(f"{Path(folder) / INDEX_NAME} names {missing[0]}, which is missing")
    return files


def check_files(files: Iterable[str], quantised: bool = False) -> None:
    """Refuse files that cannot be the weights of a model, before anything is read.

    They are damaged, have a tensor twice, have numbers other than floating point (unless `quantised`), or have experts
    of one layer that differ in shape.

    Raises:
        ValueError: naming the file or the tensors.
    """
    first: dict[str, Stored] = {}
    half: dict[str, str] = {}
    seen: dict[str, str] = {}
    experts: dict[str, set[int]] = {}
    for file in files:
        for text, stored in read_header(file).items():
            if text in seen:
                raise ValueError(f"{text} is in {seen[text]} and in {file}: allowed is one of them")
            seen[text] = file
            name = read_name(text.removeprefix("language_model."))
            if LIKE_AN_EXPERT.search(text) and name.expert is None:
                raise ValueError(f"{file} has {text}: allowed for an expert is a name such as {EXPERT_EXAMPLE}")
            if not quantised and text.rpartition(".")[2] not in NO_WEIGHTS:
                _check_code(file, text, stored.code, half)
            if name.expert is None:
                continue
            place = text.replace(f"experts.{name.expert}.", "experts.*.")
            experts.setdefault(place.removesuffix(".weight"), set()).add(name.expert)
            other = first.setdefault(place, stored)
            if stored.shape != other.shape:
                raise ValueError(f"{file} has {text} in shape {stored.shape}, but {other.name} in {other.shape}")

    for place, numbers in experts.items():
        if numbers != set(range(len(numbers))):
            raise ValueError(
                f"{Path(file).parent} has {len(numbers)} of {place}, up to number {max(numbers)}: allowed are 0 to "
                f"{len(numbers) - 1}"
            )


def _check_code(file: str, name: str, code: str, half: dict[str, str]) -> None:
    """`half`: the first tensor of F16 and of BF16. A checkpoint with both loads with a warning, because a damaged header
    looks the same: the same 16 bits are different numbers in the two dtypes."""
    if not re.fullmatch(r"B?F\d.*", code):
        raise ValueError(f"{file} has {name} in {code}: allowed for weights are {', '.join(FLOATS)} and 8-bit floats")
    if code in ("F16", "BF16") and code not in half:
        half[code] = name
        if len(half) > 1:
            logger.warning(
                f"{file} has {half['F16']} in F16 and {half['BF16']} in BF16; in most checkpoints it is one of them"
            )


def file_dtypes(files: Iterable[str]) -> dict[str, str]:
    """Name of each tensor -> the code of its dtype, such as BF16."""
    return {name: stored.code for file in files for name, stored in read_header(file).items()}


def stored_dtypes(codes: Mapping[str, str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Regular expressions for names of parameters -> their dtype when none was asked for, for those that differ from `dtype`.

    Matrices, and biases added to their products, have the one dtype that the files store them in; if there are several, all
    take `dtype`, the configuration's, as in transformers' own class. What is computed in fp32 keeps its stored dtype; with a
    float64 model all is float64, and float64 vectors of another model become fp32. Layers that agree share one expression:
    transformers tries them all on every name.
    """
    # The rest is `dtype`
    text = {name: code for name, code in codes.items() if not name.startswith(("vision_", "mlp1."))}
    stored = {name: FLOATS[code] for name, code in text.items() if code in FLOATS}
    products = {found for name, found in stored.items() if not re.search(COMPUTED_WIDE, name)}
    working = products.pop() if len(products) == 1 else dtype
    if products:
        names = ", ".join(sorted(str(found).removeprefix("torch.") for found in products))
        logger.warning(f"The matrices are stored in several dtypes ({names}); all are loaded in {working}.")
    by_place: dict[Name, dict[Name, torch.dtype]] = {}
    for text, found in stored.items():
        is_wide = re.search(COMPUTED_WIDE, text) and working != torch.float64
        wanted = (torch.float32 if found == torch.float64 else found) if is_wide else working
        name = read_name(text.removeprefix("language_model."))
        name = name._replace(root="mtp" if name.root == "mtp" else "", expert=None)
        by_place.setdefault(name._replace(layer=None), {})[name] = wanted
    plan = {}
    for names in by_place.values():
        alike = len(set(names.values())) == 1
        for name, wanted in list(names.items())[: 1 if alike else None]:
            if wanted != dtype:
                pattern = re.escape(name.module)
                if alike:
                    pattern = pattern.replace(rf"layers\.{name.layer}\.", r"layers\.\d+\.", 1)
                plan[rf"^(?:model\.)?(?:language_model\.)?{pattern}$"] = wanted
    return plan


def check_loaded(model: nn.Module, info: dict, path: str, new_on_load: tuple[str, ...], ignore: list[str]) -> None:
    """Refuse a model whose configuration and weights do not match, or whose weights are not numbers.

    Raises:
        ValueError: naming tensors that have another shape, are missing, left over, or hold NaN or infinity.
    """
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path} has {name} in shape {tuple(stored)}, its config asks for {tuple(expected)}")
    missing = sorted(name for name in info["missing_keys"] if name not in new_on_load)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors that its config asks for: {_some(missing)}")
    left_over = sorted(name for name in info["unexpected_keys"] if not any(re.search(rule, name) for rule in ignore))
    if left_over:
        raise ValueError(f"{path} has {len(left_over)} tensors that its config has no place for: {_some(left_over)}")
    bad = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if bad:
        raise ValueError(f"{path} has NaN or infinity in {len(bad)} tensors: {_some(bad)}")


def warn_of_fresh_head(model: nn.Module, info: dict) -> tuple[str, ...]:
    """The head that a save of the bare stack cannot have, with a warning; from a language model's files it must not be missing."""
    head = "lm_head.weight"
    saved_by = [name for name in model.config.architectures or () if name.endswith("Model")]
    if head not in info["missing_keys"] or not saved_by:
        return ()
    logger.warning(f"{head} is not in a checkpoint of {saved_by[0]} and is newly initialized: train it before use")
    return (head,)


def drop_absent_mtp(model: nn.Module, info: dict) -> None:
    """Take multi-token prediction out of a model whose checkpoint has none of it, even if its config names it.

    transformers' own class leaves `mtp.*` out when it saves and keeps `num_nextn_predict_layers`.
    """
    expected = {name for name in model.state_dict() if name.startswith("mtp.")}
    if expected and expected <= set(info["missing_keys"]):
        logger.warning(
            f"num_nextn_predict_layers={model.config.num_nextn_predict_layers}, but the checkpoint has no mtp.* weights "
            "(transformers' own class drops them on saving): multi-token prediction is left out."
        )
        del model.mtp
        model.config.drop_mtp()
        info["missing_keys"] = set(info["missing_keys"]) - expected


def limits_of_other_readers(config: PreTrainedConfig) -> list[str]:
    """What transformers' own nemotron_h does not take from a checkpoint with this configuration, one line each."""
    reasons = {
        "tie_word_embeddings": (config.tie_word_embeddings, "draws a new lm_head"),
        "attention_bias": (config.attention_bias, "leaves the biases of attention out"),
        "intermediate_size": (
            isinstance(config.intermediate_size, list),
            "refuses a list of widths (so does vLLM without our code next to the weights)",
        ),
    }
    for field in ("mamba_num_heads", "mamba_head_dim", "num_attention_heads"):
        reasons[field] = (isinstance(getattr(config, field), list), "refuses a list of sizes (so does vLLM)")
    if config.model_type == "nemotron_h_puzzle":
        return [
            "The checkpoint has the layout of the released Puzzle model (model_type nemotron_h_puzzle, a block for each layer), "
            "because experts differ by layer, attention has a sliding window, or it was read so: vLLM, TensorRT-LLM and "
            "llama.cpp read it, transformers needs this package or its code next to the weights."
        ]
    return [
        f"{field}={getattr(config, field)}: without this package, transformers' own nemotron_h {effect}."
        for field, (applies, effect) in reasons.items()
        if applies
    ]


def warn_of_other_readers(config: PreTrainedConfig) -> None:
    """Say what transformers' own nemotron_h does not take from a checkpoint with this configuration."""
    for line in limits_of_other_readers(config):
        logger.warning_once(line)


def plain_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a quantised weight is made of; of any other weight, itself."""
    if is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor (a quantised one in its parts) has neither NaN nor infinity. One pass that allocates nothing."""
    for part in plain_parts(weight):
        if part.is_floating_point() and not part.is_meta and part.numel():
            values = part.detach() if part.dtype.itemsize > 1 else part.detach().float()
            if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):  # NaN anywhere comes out as NaN
                return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
