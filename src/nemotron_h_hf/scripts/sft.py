"""Fine-tune a Nemotron-H model on conversations, prompts with completions, or plain text; whole, or with LoRA adapters.

    nemotron-h sft --data chats.jsonl --model path/to/checkpoint --output_dir runs/sft
    nemotron-h sft --data tasks.jsonl --eval_data held_out.jsonl --sequence_length 512 --max_steps 100   # the model in the box
    nemotron-h sft --data chats.jsonl --lora_rank 16 --learning_rate 2e-4                # adapters on every projection
    nemotron-h sft --data chats.jsonl --lora_rank 16 --load_in_4bit --bf16 true          # QLoRA, on one GPU
    nemotron-h sft --config run.yaml                                                     # all flags in a file
    accelerate launch -m nemotron_h_hf.scripts.sft --config run.yaml                     # on several GPUs; FSDP by its config

Each line of a data file is one record:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}   loss on the assistant
    {"prompt": "...", "completion": "..."}                                                          loss on the completion
    {"text": "..."}                                                                                 loss on everything

Records are packed into rows of --sequence_length tokens, never cut; the model keeps the records of a row apart.
The same command again goes on from the last whole checkpoint, with the very next row. In OUTPUT_DIR: checkpoint-N/,
metrics.jsonl, held_out.json, and at the end model/, an ordinary checkpoint, or adapter/, which `nemotron-h merge` makes
one of.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.data.finetuning import packed_blend, rows_of_one_round, sources_and_phases
from nemotron_h_hf.data.packing import PackedRows
from nemotron_h_hf.data.records import encode_record
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.hub import plan_adapter_upload, plan_upload, save_tokenizer, upload
from nemotron_h_hf.model.cost import adapter_training_flops_per_token, training_flops_per_token
from nemotron_h_hf.training.adapters import add_adapters, four_bit_loading, trained_adapters
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse, require
from nemotron_h_hf.training.checkpoints import last_whole_checkpoint
from nemotron_h_hf.training.data_arguments import DataArguments
from nemotron_h_hf.training.finished import save_finished
from nemotron_h_hf.training.starting_point import load_model, load_tokenizer
from nemotron_h_hf.training.trainer import NemotronHTrainer
from nemotron_h_hf.whole_files import write_json

DEFAULTS = {"output_dir": "runs/sft", "learning_rate": 2e-5, "weight_decay": 0.0, "warmup_tokens": "3%"}


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class LongContextArguments:
    """How conversations fill a row."""

    _argument_group_name = "long context"

    long_context: bool = _flag(
        False, "join conversations up to sequence_length, with synthetic turns that ask for something said far back"
    )


@dataclass
class AdapterArguments:
    """LoRA: 0 as rank trains the whole model."""

    _argument_group_name = "adapters"

    lora_rank: int = _flag(
        0, "rank of LoRA adapters; 0 trains all weights. Adapters want a higher --learning_rate, about 2e-4"
    )
    lora_alpha: float = _flag(32.0, "adapters are scaled by alpha / rank")
    lora_dropout: float = _flag(0.0, "on the input of the adapters")
    lora_targets: str = _flag(
        "all", "all, mamba, attention, mlp, experts (all and the routed experts), or names with commas"
    )
    load_in_4bit: bool = _flag(False, "keep the base in 4 bits (QLoRA); needs bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Train or go on, save, and push if asked to."""
    data, packing, adapters, start, training = parse(
        (DataArguments, LongContextArguments, AdapterArguments, ModelArguments, NemotronHTrainingArguments), argv,
        __doc__, "nemotron-h sft", **DEFAULTS,
    )  # fmt: skip
    check(adapters, start, training)
    disable_progress_bar()
    set_seed(training.seed)
    model = make_model(adapters, start, training)
    tokenizer = load_tokenizer(start, EMBEDDED_MODEL, model.config.vocab_size)
    if data.chat_template is not None:
        tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
    rows, held_out = make_rows(data, packing.long_context, training, tokenizer)
    push, training.push_to_hub = training.push_to_hub, False  # the finished model, once, and not every checkpoint
    trainer = NemotronHTrainer(
        model, training, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer,
        flops_per_token=count_flops(adapters, model, training.sequence_length),
    )  # fmt: skip
    if held_out and last_whole_checkpoint(training.output_dir) is None:
        trainer.add_callback(TellBefore(trainer))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)
    tell_left_out(rows.documents.left_out())
    folder = save(trainer, tokenizer, "adapter" if adapters.lora_rank else "model")
    if held_out:
        tell_held_out(trainer, "after")
    if push and trainer.is_world_process_zero():
        print(push_folder(folder, training.hub_model_id, bool(training.hub_private_repo)))
    return 0


def check(adapters: AdapterArguments, start: ModelArguments, training: NemotronHTrainingArguments) -> None:
    """Refuse flags that contradict each other."""
    require(adapters.lora_rank >= 0, "lora_rank", adapters.lora_rank, "0 (the whole model) or more")
    if adapters.load_in_4bit:
        require(
            adapters.lora_rank > 0, "load_in_4bit", True, "together with --lora_rank: weights in 4 bits are not trained"
        )
        require(start.init == "weights", "load_in_4bit", True, "with --init weights")
        require(not start.fp8, "load_in_4bit", True, "without --fp8")
    if training.push_to_hub:
        require(training.hub_model_id is not None, "hub_model_id", None, "owner/name, with --push_to_hub")


def make_rows(
    data: DataArguments, long_context: bool, training: NemotronHTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackedRows, list | None]:
    """Training rows for the whole run, and held-out rows; sets `training.max_steps` from the epochs if it is not given."""
    sources, phases = sources_and_phases(data.data, data.sources, data.phases)
    length, pad = training.sequence_length, tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad

    def encode(record: Any) -> Mapping[str, list[int]]:
        return encode_record(record, tokenizer)

    def encode_with_messages(record: Any) -> Mapping[str, Any]:
        if not isinstance(record, Mapping) or "messages" not in record:
            raise ValueError("the record has no messages; --long_context allows conversations alone")
        return {**encode(record), "messages": record["messages"], "tools": record.get("tools")}

    def join(messages: Sequence[Mapping], tools: Sequence[Any] | None) -> Mapping[str, list[int]]:
        return encode({"messages": messages, "tools": tools})

    if training.max_steps <= 0:
        require(not long_context, "max_steps", training.max_steps, "with --long_context: --max_steps or --total_tokens")
        require(
            len(sources) == 1, "max_steps", training.max_steps, "with several sources: --max_steps or --total_tokens"
        )
        num_rows = len(rows_of_one_round(sources[0], encode, length, pad, on_bad_data=data.on_bad_data))
        training.max_steps = math.ceil(training.num_train_epochs * num_rows * length / training.tokens_per_step)
        print(f"{num_rows:,} rows of {length:,} tokens in an epoch, {training.max_steps:,} steps", file=sys.stderr)
    total = training.max_steps * training.tokens_per_step
    rows = packed_blend(
        sources, phases, encode_with_messages if long_context else encode, total, length, pad, training.seed,
        on_bad_data=data.on_bad_data, join=join if long_context else None,
    )  # fmt: skip
    if not data.eval_data:
        return rows, None
    held_out = Source("eval_data", path=data.eval_data, column=None, shuffle_window=0)
    return rows, rows_of_one_round(held_out, encode, length, pad, on_bad_data=data.on_bad_data)


def make_model(adapters: AdapterArguments, start: ModelArguments, training: NemotronHTrainingArguments) -> nn.Module:
    """The model to train, in the form the flags ask for."""
    loading = four_bit_loading(training.use_cpu) if adapters.load_in_4bit else {}
    model = load_model(start, EMBEDDED_MODEL, NemotronHConfig.from_preset, **loading)
    if not adapters.lora_rank:
        return model
    return add_adapters(model, adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout, adapters.lora_targets)


def count_flops(adapters: AdapterArguments, model: nn.Module, sequence_length: int) -> float:
    """Of training, per token."""
    if not adapters.lora_rank:
        return training_flops_per_token(model.config, sequence_length)
    return adapter_training_flops_per_token(model.config, sequence_length, *trained_adapters(model))


class TellBefore(TrainerCallback):
    """Evaluates when training begins: under FSDP2 a model is ready only once it has been prepared with its optimizer."""

    def __init__(self, trainer: NemotronHTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        tell_held_out(self.trainer, "before")


def tell_held_out(trainer: NemotronHTrainer, when: str) -> None:
    """Evaluate, print, and keep the loss in OUTPUT_DIR/held_out.json, beside what is there already."""
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "held_out.json")
        losses = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, losses | {when: loss})
        print(f"held-out loss {when}: {loss:.4f}", file=sys.stderr)


def save(trainer: NemotronHTrainer, tokenizer: PreTrainedTokenizerBase, name: str) -> Path:
    """The model or adapters with the tokenizer in a folder of OUTPUT_DIR."""
    folder = Path(trainer.args.output_dir, name)
    if save_finished(trainer, folder):
        save_tokenizer(tokenizer, folder)
        print(f"{folder} holds the trained {name}", file=sys.stderr)
    return folder


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a checkpoint or adapters; the address."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return upload(plan_adapter_upload(folder) if is_adapter else plan_upload(folder, repo_id), repo_id, private)


if __name__ == "__main__":
    sys.exit(main())
