"""Fine-tune a Nemotron-H model on conversations, prompts with completions, or plain text; whole, or with LoRA adapters.

    nemotron-h sft --data chats.jsonl --model path/to/checkpoint --output_dir runs/sft
    nemotron-h sft --data tasks.jsonl --eval_data held_out.jsonl --sequence_length 512 --max_steps 100   # the embedded model
    nemotron-h sft --data chats.jsonl --lora_rank 16 --learning_rate 2e-4                # adapters on every projection
    nemotron-h sft --data chats.jsonl --lora_rank 16 --load_in_4bit --bf16 true          # QLoRA, on one GPU
    nemotron-h sft --config run.yaml                                                     # all flags in a file
    accelerate launch -m nemotron_h_hf.scripts.sft --config run.yaml                     # on several GPUs; FSDP by its config

Each line of a data file is one record:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}   loss on the assistant
    {"prompt": "...", "completion": "..."}                                                          loss on the completion
    {"text": "..."}                                                                                 loss on everything

A vision-language model (`nemotron-h make-vl`) is trained alike, on records with pictures (data/pictures.py):

    nemotron-h sft --data pairs.jsonl --model new-model --train projector --learning_rate 1e-4         # first stage
    nemotron-h sft --data chats.jsonl --model runs/first/model --train all                             # second stage
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["cat.png"]}

Its records are not packed. All others are packed into rows of --sequence_length tokens, never cut; the model keeps the
records of a row apart.
The same command given again resumes from the last whole checkpoint, at the next row. In OUTPUT_DIR: checkpoint-N/,
metrics.jsonl, held_out.json, and at the end model/, an ordinary checkpoint, or adapter/, which `nemotron-h merge` joins
with its base.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin, set_seed
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHVLConfig
from nemotron_h_hf.cost import adapter_training_flops_per_token, training_flops_per_token
from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.data.packing import Rows
from nemotron_h_hf.data.pictures import PictureCollator, PictureRows
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.elastic.budgets import mark_untrained
from nemotron_h_hf.errors import require
from nemotron_h_hf.hub import upload_folder
from nemotron_h_hf.model.processing_nemotron_h_vl import CHAT_PREAMBLE
from nemotron_h_hf.training.adapters import (
    AdapterArguments,
    add_adapters,
    check_four_bit,
    four_bit_loading,
    trained_adapters,
)
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse
from nemotron_h_hf.training.checkpoints import writing_run
from nemotron_h_hf.training.data_arguments import DataArguments, LongContextArguments, set_chat_template
from nemotron_h_hf.training.held_out_loss import evaluate_every, tell_before, tell_held_out
from nemotron_h_hf.training.rows import make_rows, pad_token, record_encoder, set_steps
from nemotron_h_hf.training.starting_point import load_model, load_tokenizer
from nemotron_h_hf.training.trained_folder import save_finished, take_push
from nemotron_h_hf.training.trainer import NemotronHTrainer
from nemotron_h_hf.training.vision import VisionArguments, choose_stage, freeze

DEFAULTS = {"output_dir": "runs/sft", "learning_rate": 2e-5, "weight_decay": 0.0, "warmup_tokens": "3%"}


def main(argv: Sequence[str] | None = None) -> int:
    """Train (or resume), save, and push if asked to."""
    data, packing, adapters, vision, start, training = parse(
        (DataArguments, LongContextArguments, AdapterArguments, VisionArguments, ModelArguments, NemotronHTrainingArguments),
        argv, __doc__, "nemotron-h sft", **DEFAULTS,
    )  # fmt: skip
    check(adapters, start, training)
    evaluate_every(data, training)
    repo_id = take_push(training)
    with writing_run(training, start.model):
        return run(data, packing, adapters, vision, start, training, repo_id)


def run(
    data: DataArguments,
    packing: LongContextArguments,
    adapters: AdapterArguments,
    vision: VisionArguments,
    start: ModelArguments,
    training: NemotronHTrainingArguments,
    repo_id: str | None,
) -> int:
    """The work, in a folder that no other run writes to."""
    disable_progress_bar()
    set_seed(training.seed)
    model = make_model(adapters, vision, start, training)
    tokenizer = load_tokenizer(start, EMBEDDED_MODEL, model.config.get_text_config().vocab_size)
    processor = collator = None
    if isinstance(model.config, NemotronHVLConfig):
        processor = AutoProcessor.from_pretrained(start.tokenizer or start.model)
        tokenizer = processor.tokenizer
        if data.chat_template is not None:
            set_chat_template(tokenizer, data.chat_template)
            tokenizer.chat_template = processor.chat_template = CHAT_PREAMBLE + tokenizer.chat_template
        rows, held_out = make_picture_rows(data, packing.long_context, training, processor)
        collator = PictureCollator(pad_token(tokenizer))
    else:
        set_chat_template(tokenizer, data.chat_template)
        rows, held_out = rows_of(data, packing.long_context, training, tokenizer)
    trainer = NemotronHTrainer(
        model, training, collator, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer,
        flops_per_token=count_flops(adapters, model, training.sequence_length),
    )  # fmt: skip
    tell_before(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)
    tell_left_out(rows.documents.left_out() if processor is None else {"data": rows.bad.counts})
    folder = save_finished(trainer, tokenizer, "adapter" if adapters.lora_rank else "model", processor)
    tell_held_out(trainer, "after")
    if repo_id is not None and folder is not None:
        print(upload_folder(folder, repo_id, bool(training.hub_private_repo)))
    return 0


def check(adapters: AdapterArguments, start: ModelArguments, training: NemotronHTrainingArguments) -> None:
    """Refuse flags that contradict each other."""
    weight = training.mtp_loss_weight
    require(not (adapters.lora_rank and weight), "mtp_loss_weight", weight, "0 with --lora_rank")
    if adapters.load_in_4bit:
        require(
            adapters.lora_rank > 0, "load_in_4bit", True, "only with --lora_rank: weights in 4 bits are not trained"
        )
        require(start.init == "weights", "load_in_4bit", True, "with --init weights")
        require(not start.fp8, "load_in_4bit", True, "without --fp8")


def rows_of(
    data: DataArguments, long_context: bool, training: NemotronHTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, list | None]:
    """Training rows for the whole run, and held-out rows; sets `training.max_steps` from the epochs if it is not given."""
    if not long_context:
        set_steps(data, training, tokenizer)
        return make_rows(data, training, tokenizer, split_documents=False)
    require(
        training.max_steps > 0, "max_steps", training.max_steps, "with --long_context: --max_steps or --total_tokens"
    )
    encode = record_encoder(tokenizer)

    def encode_with_messages(record: Any) -> Mapping[str, Any]:
        if not isinstance(record, Mapping) or "messages" not in record:
            raise ValueError("the record has no messages; --long_context allows only conversations")
        return {**encode(record), "messages": record["messages"], "tools": record.get("tools")}

    def join(messages: Sequence[Mapping], tools: Sequence[Any] | None) -> Mapping[str, list[int]]:
        return encode({"messages": messages, "tools": tools})

    return make_rows(data, training, tokenizer, encode_with_messages, split_documents=False, join=join)


def make_picture_rows(
    data: DataArguments, long_context: bool, training: NemotronHTrainingArguments, processor: ProcessorMixin
) -> tuple[PictureRows, list | None]:
    """As `rows_of`, of records with pictures, each a row alone."""
    require(not long_context, "long_context", True, "none for a vision-language model")
    require(bool(data.data), "sources", data.sources, "none for a vision-language model; --data")
    source, length = Source("data", path=list(data.data), column=None), training.sequence_length
    rows = PictureRows(source, processor, length, training.seed_of_data, data.on_bad_data)
    if training.max_steps <= 0:
        num_rows = sum(1 for _ in rows.once())
        require(num_rows > 0, "data", data.data, f"files with usable records; {rows.bad.last}")
        training.max_steps = math.ceil(training.num_train_epochs * num_rows * length / training.tokens_per_step)
        print(f"{num_rows:,} records in an epoch, {training.max_steps:,} steps", file=sys.stderr)
    if not data.eval_data:
        return rows, None
    held_out = Source("eval_data", path=data.eval_data, column=None, shuffle_window=0)
    return rows, list(PictureRows(held_out, processor, length, on_bad_data=data.on_bad_data).once())


def make_model(
    adapters: AdapterArguments, vision: VisionArguments, start: ModelArguments, training: NemotronHTrainingArguments
) -> nn.Module:
    """The model to train, in the form the flags ask for."""
    loading = four_bit_loading(training.use_cpu) if adapters.load_in_4bit else {}
    model = load_model(start, EMBEDDED_MODEL, NemotronHConfig.from_preset, may_see=True, **loading)
    mark_untrained(model.config.get_text_config())
    if (stage := choose_stage(vision, adapters, isinstance(model.config, NemotronHVLConfig))) is not None:
        freeze(model, stage)
    if adapters.load_in_4bit:
        print(check_four_bit(model), file=sys.stderr)
    if not adapters.lora_rank:
        return model
    return add_adapters(model, adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout, adapters.lora_targets)


def count_flops(adapters: AdapterArguments, model: nn.Module, sequence_length: int) -> float:
    """Of training, per token; of a vision-language model the language model's."""
    config = model.config.get_text_config()
    if not adapters.lora_rank:
        return training_flops_per_token(config, sequence_length)
    return adapter_training_flops_per_token(config, sequence_length, *trained_adapters(model))


if __name__ == "__main__":
    sys.exit(main())
