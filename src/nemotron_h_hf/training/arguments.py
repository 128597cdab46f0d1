"""Flags and YAML of the training scripts: dataclasses, and `parse`, which fills them, with errors that name the flag or key.

A script has a few dataclasses (a field that takes nested values is typed `dict | str | None`, and its class calls
`as_mapping` on it); together they are one flat set of names. Every name is a flag (`--learning_rate`, or
`--learning-rate`) and a key of the YAML file given by `--config`; flags win over the file, the file over the defaults.

    # run.yaml
    output_dir: runs/small
    learning_rate: 8e-4
    total_tokens: 2.5M
    sources: {code: {path: src/**/*.py}}       # a mapping or list goes to its field as it is
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import sys
from argparse import SUPPRESS, Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from ..errors import require
from ..inputs import read_yaml
from ..units import parse_tokens

logger = logging.get_logger(__name__)

# Of transformers.TrainingArguments, those that --help shows; --help_all shows the others too.
COMMON_FIELDS = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "bf16",
    "gradient_checkpointing", "torch_compile", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "report_to", "seed",
    "data_seed",    "use_cpu", "resume_from_checkpoint", "fsdp", "fsdp_config",
    "push_to_hub", "hub_model_id",
)  # fmt: skip
# Of transformers.TrainingArguments, those that keep their defaults here -> what to do instead.
KEPT_AT_DEFAULT = {
    "optim": "transformers' default, which is without effect; choose by --optimizer",
    "optim_args": "none; --optimizer has no such arguments",
    "optim_target_modules": "none; --optimizer has no such arguments",
    "auto_find_batch_size": "False: rows per step are counted, to resume at the next row",
    "fp16": "False, or --bf16: a gradient that overflows stops the run here, and with fp16 that is usual",
}
# What the schedule wsd alone has, and its defaults.
OF_WSD = {"decay_tokens": "20%", "min_lr_ratio": 0.01, "decay_shape": "linear"}
WITHOUT_WARMUP = ("reduce_lr_on_plateau", "greedy")


def flag(default: Any, help_text: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass's field as a flag with this help."""
    return field(default=default, metadata={"help": help_text} | ({"choices": choices} if choices else {}))


@dataclass
class ModelArguments:
    """What is trained and in what form; shared by pretrain, sft and distill."""

    _argument_group_name = "model"

    model: str | None = flag(
        None,
        "checkpoint folder, hub id, or with --init random also a preset (nemotron-h-8b); default: the embedded model",
    )
    init: str = flag("weights", "weights: start from the checkpoint; random: only its shape", ("weights", "random"))
    config_overrides: dict | str | None = flag(
        None, "with --init random: fields of the configuration to replace, '{hidden_size: 256, ...}'"
    )
    tokenizer: str | None = flag(None, "folder or hub id; default: the model's own")
    dtype: str = flag(
        "float32", "of the weights that the optimizer steps; --bf16 computes in bfloat16", ("float32", "bfloat16")
    )
    attention: str | None = flag(
        None,
        "implementation of attention: sdpa, eager, flash_attention_2, flex_attention; default: transformers' choice",
    )
    mamba: str = flag("auto", "who computes the Mamba layers", ("auto", "torch", "kernels", "triton"))
    mtp_depth: int | None = flag(
        None, "add fresh heads of multi-token prediction, this many depths, to a model that has none"
    )
    mtp_pattern: str | None = flag(
        None,
        "with --mtp_depth: layers of a depth, such as '*E'; default: attention and what the model has, experts or MLP",
    )
    fp8: bool = flag(False, "linear layers in FP8 but for the first and last four, after the paper; needs torchao")


@dataclass
class NemotronHTrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with our defaults, lengths in tokens, and the options of NemotronHTrainer.

    Numbers of tokens may be written 15T, 6.3B, 2.5M, 4K (4,000), 4Ki (4,096); a share of the run as 20%.
    """

    _argument_group_name = "training"

    sequence_length: int = flag(1024, "tokens per row")
    total_tokens: str | None = flag(None, "length of the run, rounded down to whole steps; replaces --max_steps")
    warmup_tokens: str | None = flag("1%", "the learning rate rises linearly over these first tokens")
    decay_tokens: str | None = flag(
        None, "of wsd: it falls over these last tokens, between them it stays at --learning_rate; default: 20%%"
    )
    min_lr_ratio: float | None = flag(
        None, "of wsd: where the decay ends, as a share of --learning_rate; default: the paper's 1/100"
    )
    decay_shape: str | None = flag(None, "of wsd: of the fall; default: linear", ("linear", "cosine"))
    optimizer: str = flag("adamw", "muon: for the matrices inside the layers, AdamW for the rest", ("adamw", "muon"))
    z_loss: float = flag(0.0, "weight of the mean of logsumexp(logits)^2 in the loss; 1e-4 is usual, 0 is off")
    router_aux_loss_coef: float | None = flag(
        None,
        "weight in the training loss of the experts' balance loss, which is 1 when balanced; 0 is off; default: as the "
        "model's configuration says",
    )
    mtp_loss_weight: float = flag(
        0.0,
        "weight of the loss of multi-token prediction, the mean over its depths; 0 leaves those weights as they are",
    )
    mtp_steps: int | None = flag(
        None, "depths in that loss; beyond those with weights the last repeats; default: those with weights"
    )
    mtp_freeze_trunk: bool = flag(False, "with --mtp_loss_weight: train multi-token prediction alone")
    max_loss_jump: float = flag(
        4.0, "stop when a step's loss is this many nats above the mean of the last 100 steps; 0 is off"
    )

    # Other defaults than transformers'.
    lr_scheduler_type: str = flag(
        "wsd", "wsd: warm-up, stable, decay, by tokens; or any name that transformers knows (cosine, linear, ...)"
    )
    warmup_steps: float | None = flag(
        None, "not with wsd: warm-up in steps, or below 1 a share of the run, in place of --warmup_tokens"
    )
    eval_steps: float | None = flag(
        None, "with --eval_data: the held-out loss every so many steps, below 1 every such share of the run"
    )
    push_to_hub: bool = flag(False, "send the finished model or adapters to --hub_model_id, once, at the end")
    hub_model_id: str | None = flag(None, "owner/name, with --push_to_hub")
    data_seed: int | None = flag(None, "of the order of the data; default: --seed")
    resume_from_checkpoint: str | None = flag(None, "checkpoint to resume from; default: the last whole one")
    learning_rate: float = flag(8e-4, "the peak")
    weight_decay: float = flag(0.1, "of matrices; not of norms, biases, A_log, D, dt_bias and convolutions")
    adam_beta2: float = flag(0.95, "of AdamW")
    gradient_checkpointing: bool | None = flag(
        None, "compute activations again in the backward pass instead of keeping them: less memory, a third more work"
    )
    bf16: bool | None = flag(None, "compute in bfloat16; default: yes on a GPU that can, no on a CPU")
    per_device_train_batch_size: int = flag(4, "rows per device and forward pass")
    logging_steps: float = flag(10, "steps per line of metrics.jsonl; below 1 a share of the run")
    save_steps: float = flag(500, "steps between checkpoints; below 1 a share of the run")
    save_total_limit: int | None = flag(3, "checkpoints kept; the oldest go when a new one is whole")
    logging_nan_inf_filter: bool = flag(False, "as in transformers; here a loss that is no number stops the run")
    remove_unused_columns: bool = flag(False, "as in transformers; here rows hold what the model takes")
    report_to: list[str] = field(
        default_factory=lambda: installed_report(),
        metadata={
            "help": "none, tensorboard, trackio, wandb, ...; default: tensorboard, else trackio, where it is installed; "
            "metrics.jsonl is written in any case"
        },
    )

    def __post_init__(self) -> None:
        for name, allowed in KEPT_AT_DEFAULT.items():
            value = getattr(self, name)
            require(value == TrainingArguments.__dataclass_fields__[name].default, name, value, allowed)
        self._settle_schedule()
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ and self.gradient_checkpointing:
            self.activation_checkpointing, self.gradient_checkpointing = True, None  # its name since transformers 5.23
        super().__post_init__()
        reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.ddp_find_unused_parameters is None and not reentrant:
            # Layers that a budget leaves out and the projector in a step without pictures have no gradient. transformers
            # turns this off with gradient checkpointing, of which only the reentrant form cannot have it.
            self.ddp_find_unused_parameters = True
        # Asking for the device joins the other processes; only then is their number known
        # transformers would train by torch's DataParallel, and a step have more rows than are counted.
        if self.n_gpu > 1:
            logger.warning(
                f"{self.n_gpu} GPUs are here and this is one process, which takes the first; accelerate launch takes all"
            )
            self._n_gpu = 1
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns
        require(
            self.mixed_precision != "fp16", "mixed_precision", "fp16", f"bf16 or no (fp16: {KEPT_AT_DEFAULT['fp16']})"
        )
        for name in ("sequence_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("z_loss", "mtp_loss_weight", "max_loss_jump", "weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.min_lr_ratio is None or 0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "0 to 1")
        coefficient = self.router_aux_loss_coef
        require(coefficient is None or coefficient >= 0, "router_aux_loss_coef", coefficient, "0 (off) or more")
        for name, value in (("mtp_steps", self.mtp_steps), ("mtp_freeze_trunk", self.mtp_freeze_trunk or None)):
            require(value is None or self.mtp_loss_weight > 0, name, value, "none without mtp_loss_weight")
        require(self.mtp_steps is None or self.mtp_steps >= 1, "mtp_steps", self.mtp_steps, "1 or more")
        if self.total_tokens is not None:
            self.max_steps = parse_tokens(self.total_tokens, "total_tokens") // self.tokens_per_step
            require(self.max_steps > 0, "total_tokens", self.total_tokens, f"a step's {self.tokens_per_step} or more")

    def _settle_schedule(self) -> None:
        """Fill in the defaults of the schedule that was asked for, and refuse what it would ignore."""
        kind = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        self.uses_wsd = kind == "wsd"
        for name, default in OF_WSD.items():
            value = getattr(self, name)
            require(self.uses_wsd or value is None, name, value, f"with lr_scheduler_type wsd alone, not with {kind}")
            setattr(self, name, default if self.uses_wsd and value is None else value)
        steps = self.warmup_steps
        require(not self.uses_wsd or steps is None, "warmup_steps", steps, "none with wsd; give --warmup_tokens")
        if steps is None:
            self.warmup_steps = 0
        else:
            self.warmup_tokens = None
        if kind in WITHOUT_WARMUP:
            logger.warning(f"lr_scheduler_type {kind} has no warm-up: warmup_tokens and warmup_steps do not count")
        # Names of transformers': our trainer makes wsd itself, and its "constant" has no warm-up.
        self.lr_scheduler_type = {"wsd": "constant", "constant": "constant_with_warmup"}.get(kind, kind)

    @property
    def seed_of_data(self) -> int:
        """Of the order in which data is read: --data_seed, or else --seed."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees on all processes together."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        return rows * self.sequence_length


def parse(
    dataclasses: Sequence[type], argv: Sequence[str] | None, description: str, prog: str, **defaults: Any
) -> tuple[Any, ...]:
    """One instance of each dataclass, from `argv` and the YAML file it may name; `defaults` replace fields' own.

    Raises:
        ValueError: naming the flag or key, its value and what is allowed; with the nearest name for an unknown one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        list(dataclasses), prog=prog, usage=f"{prog} [--config FILE] [--OPTION VALUE ...]", description=description,
        formatter_class=_Formatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these names as keys; flags win over it")
    parser.add_argument(
        "--help_all", action="store_true", help="show every option of transformers.TrainingArguments too"
    )
    parser.set_defaults(**defaults)
    if "--help_all" not in argv and "--help-all" not in argv:
        _hide_rare(parser)
    elif "--help" not in argv:
        parser.print_help()
        raise SystemExit(0)
    names = [item.name for kind in dataclasses for item in fields(kind) if item.init]
    known, unknown = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if unknown:
        raise ValueError(_unknown(unknown[0], names))
    given = [] if known.config is None else _as_flags(read_yaml(known.config, "config"), names, known.config)
    *filled, _ = parser.parse_args_into_dataclasses([*given, *argv], look_for_args_file=False)
    for arguments in filled:
        _require_numbers(arguments)
    return tuple(filled)


def _require_numbers(arguments: Any) -> None:
    """NaN passes every comparison with a limit, so it is refused here; infinity is allowed only as a field's default."""
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            require(value == item.default, item.name, value, "a finite number")


class _Formatter(RawDescriptionHelpFormatter):
    """One spelling of each flag, and its default where the help text does not say it."""

    def _format_action_invocation(self, action: Action) -> str:
        flag = action.option_strings[-1 if action.dest == "help" else 0] if action.option_strings else action.dest
        return flag if action.nargs in (0, "?") else f"{flag} {self._format_args(action, 'VALUE')}"

    def _get_help_string(self, action: Action) -> str | None:
        silent = action.default in (None, SUPPRESS, False) or "default" in (action.help or "")
        return action.help if silent else f"{action.help} (%(default)s)"


class _Parser(HfArgumentParser):
    """argparse ends the process on an error; here it is a ValueError as everywhere else."""

    def error(self, message: str) -> None:
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except ArgumentError as error:
            raise ValueError(str(error)) from None


def installed_report() -> list[str]:
    """Where metrics go besides metrics.jsonl: TensorBoard, else trackio, if it is installed."""
    specs = {name: importlib.util.find_spec(name) for name in ("tensorboard", "trackio")}
    found = [name for name, spec in specs.items() if spec is not None and spec.origin is not None]  # no mere folder
    return found[:1] or ["none"]


def as_mapping(value: str | Mapping | Sequence | None, name: str) -> Any:
    """A field that takes nested values, given as YAML or JSON text (as flags are) or already as mapping or list."""
    if not isinstance(value, str):
        return value
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={value!r}: allowed is a mapping or list in YAML or JSON: {error}") from None
    require(isinstance(content, (dict, list)), name, value, "a mapping or list in YAML or JSON")
    return content


def nearest(name: str, names: Sequence[str]) -> str:
    """'; did you mean ...?' with the name closest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; options begin with --"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    return f"unknown option --{name}{nearest(name, [*names, 'config'])}"


def _as_flags(content: dict[str, Any], names: Sequence[str], path: str) -> list[str]:
    """The file's mapping as command-line words, which argparse converts and checks like flags."""
    words = []
    for name, value in content.items():
        if name not in names:
            raise ValueError(f"config: {path} has an unknown key {name!r}{nearest(str(name), names)}")
        if value is None:  # as if it were not there
            continue
        if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}"]
    return words


def _hide_rare(parser: HfArgumentParser) -> None:
    ours = {item.name for item in fields(NemotronHTrainingArguments)} - {
        item.name for item in fields(TrainingArguments)
    }
    theirs = {item.name for item in fields(TrainingArguments)} - ours - set(COMMON_FIELDS)
    for action in parser._actions:
        if action.dest in theirs:
            action.help = SUPPRESS
