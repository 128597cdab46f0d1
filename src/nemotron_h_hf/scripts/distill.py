"""Train a student on what a teacher predicts: T^2 * KL(softmax(z_T / T) || softmax(z_S / T)), after Nemotron-H-47B.

    nemotron-h distill --data text/ --teacher path/to/56b --model path/to/pruned --output_dir runs/kd --total_tokens 7B
    nemotron-h distill --data text/ --init random --config_overrides '{hybrid_override_pattern: M-*-}'    # of the embedded model
    nemotron-h distill --data text/ --teacher big --model nemotron-h-4b --init random --tokenizer big

A teacher that is too slow or too large to run next to the student runs first. Any number of students read its logits later:

    nemotron-h distill --data text/ --total_tokens 10M --teacher big --cache_teacher cache --top_k 64
    nemotron-h distill --data text/ --total_tokens 10M --teacher_cache cache --model small

The first command may be interrupted and repeated. The k largest logits take 8 k bytes of disk per token, 512 MB per million
tokens for k = 64; all other tokens together are one more outcome. Give the second command the same data, tokenizer (by
default that of --model), sequence_length and seed: it stops at a row that is not in the cache.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml -m nemotron_h_hf.scripts.distill --config run.yaml

The loss is that of the teacher alone; --cross_entropy_weight w makes it (1 - w) * KL + w * cross-entropy with the data.
Records are those of `nemotron-h sft`, cut at the end of a row unless --whole_documents. The same command given again resumes
from the last whole checkpoint. In OUTPUT_DIR: checkpoint-N/, metrics.jsonl with both parts of the loss,
held_out.json (with --eval_data: the loss before and after), and at the end model/, the student.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_fsdp_enabled
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.cost import training_flops_per_token
from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.elastic.budgets import mark_untrained
from nemotron_h_hf.errors import require
from nemotron_h_hf.hub import upload_folder
from nemotron_h_hf.output_folders import writing
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse
from nemotron_h_hf.training.checkpoints import writing_run
from nemotron_h_hf.training.data_arguments import DataArguments, RowArguments, set_chat_template
from nemotron_h_hf.training.distillation import DistillationArguments, DistillationTrainer
from nemotron_h_hf.training.held_out_loss import evaluate_every, tell_before, tell_held_out
from nemotron_h_hf.training.one_copy import device_to_load_on
from nemotron_h_hf.training.rows import make_rows
from nemotron_h_hf.training.starting_point import load_model, load_tokenizer, load_weights
from nemotron_h_hf.training.teacher_cache import TeacherCache, fingerprint, write_cache
from nemotron_h_hf.training.trained_folder import save_finished, take_push

DEFAULTS = {"output_dir": "runs/distill", "learning_rate": 1e-4}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the teacher's cache; or train the student (or resume), and save it."""
    data, dealt, knowledge, start, training = parse(
        (DataArguments, RowArguments, DistillationArguments, ModelArguments, NemotronHTrainingArguments), argv, __doc__,
        "nemotron-h distill", **DEFAULTS,
    )  # fmt: skip
    require(training.max_steps > 0, "total_tokens", training.total_tokens, "a number of tokens, for instance 2M")
    whole = "none with whole_documents, which are not split into rows"
    require(not (dealt.shuffle_rows and knowledge.whole_documents), "shuffle_rows", dealt.shuffle_rows, whole)
    evaluate_every(data, training)
    repo_id = take_push(training)
    disable_progress_bar()
    set_seed(training.seed)
    sources = (start.model, knowledge.teacher, knowledge.teacher_cache)
    if knowledge.cache_teacher is not None:
        first = training.process_index == 0
        with writing(knowledge.cache_teacher, *sources) if first else nullcontext():
            return cache(data, dealt.shuffle_rows, knowledge, start, training)
    with writing_run(training, *sources):
        return run(data, dealt, knowledge, start, training, repo_id)


def run(
    data: DataArguments,
    dealt: RowArguments,
    knowledge: DistillationArguments,
    start: ModelArguments,
    training: NemotronHTrainingArguments,
    repo_id: str | None,
) -> int:
    """Training, in a folder that no other run writes to."""
    model = load_model(start, EMBEDDED_MODEL, NemotronHConfig.from_preset)
    mark_untrained(model.config)
    teacher = find_teacher(knowledge)
    tokenizer = find_tokenizer(start, knowledge, data, model.config.vocab_size)
    whole = knowledge.whole_documents
    rows, held_out = make_rows(data, training, tokenizer, split_documents=not whole, shuffle_rows=dealt.shuffle_rows)
    trainer = DistillationTrainer(
        model, training, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer,
        flops_per_token=training_flops_per_token(model.config, training.sequence_length),
        teacher=teacher, temperature=knowledge.temperature,
        cross_entropy_weight=knowledge.cross_entropy_weight,
    )  # fmt: skip
    tell_before(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)
    tell_left_out(rows.documents.left_out())
    folder = save_finished(trainer, tokenizer)
    tell_held_out(trainer, "after")
    if repo_id is not None and folder is not None:
        print(upload_folder(folder, repo_id, bool(training.hub_private_repo)))
    return 0


def find_tokenizer(
    start: ModelArguments, knowledge: DistillationArguments, data: DataArguments, vocab_size: int
) -> PreTrainedTokenizerBase:
    """The one named, or the teacher's, because the student must use the same tokens; with a cache alone, the student's."""
    of_student = start.model if knowledge.teacher_cache is not None and start.init == "weights" else None
    name = start.tokenizer or knowledge.teacher or of_student or EMBEDDED_MODEL
    tokenizer = load_tokenizer(replace(start, tokenizer=name), EMBEDDED_MODEL, vocab_size)
    set_chat_template(tokenizer, data.chat_template)
    return tokenizer


def find_teacher(knowledge: DistillationArguments) -> PreTrainedModel | TeacherCache:
    """The teacher, or its cache; a teacher given with a cache must be the one that wrote it."""
    if knowledge.teacher_cache is None:
        return load_teacher(knowledge, device_to_load_on())
    cached = TeacherCache(knowledge.teacher_cache)
    if knowledge.teacher is not None:
        of_teacher = [fingerprint(load_teacher(knowledge)) if PartialState().is_main_process else None]
        cached.check(teacher=broadcast_object_list(of_teacher)[0])
    return cached


def load_teacher(knowledge: DistillationArguments, device: str | None = None) -> PreTrainedModel:
    """The teacher in eval mode, its weights as they are stored unless told otherwise; on the meta device it has none."""
    dtype = knowledge.teacher_dtype if knowledge.teacher_dtype == "auto" else getattr(torch, knowledge.teacher_dtype)
    name = knowledge.teacher or EMBEDDED_MODEL
    return load_weights(name, "teacher", dtype=dtype, device_map=device).eval()


def cache(
    data: DataArguments,
    shuffle_rows: int,
    knowledge: DistillationArguments,
    start: ModelArguments,
    training: NemotronHTrainingArguments,
) -> int:
    """Run the teacher on every row of the run and every held-out row, each process on its share.

    Raises:
        ValueError: where only the first process would load it.
    """
    if is_fsdp_enabled():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=true: allowed with cache_teacher is a launch without it "
            "(examples/accelerate/multi_gpu.yaml), as every process runs the whole teacher"
        )
    vocab_size = AutoConfig.from_pretrained(knowledge.teacher or EMBEDDED_MODEL).vocab_size
    tokenizer, whole = find_tokenizer(start, knowledge, data, vocab_size), knowledge.whole_documents
    rows, held_out = make_rows(data, training, tokenizer, split_documents=not whole, shuffle_rows=shuffle_rows)
    count = training.max_steps * training.tokens_per_step // training.sequence_length
    mine = slice(training.process_index, None, training.world_size)
    share = islice(islice(rows, count), mine.start, mine.stop, mine.step)
    batches = batched((held_out or [])[mine], share, size=training.per_device_train_batch_size)
    teacher = load_teacher(knowledge).to(training.device)
    folder = knowledge.cache_teacher
    write_cache(folder, teacher, batches, knowledge.top_k, knowledge.temperature, process_index=training.process_index)
    PartialState().wait_for_everyone()
    tell_left_out(rows.documents.left_out())
    if training.process_index == 0:
        print(
            f"{folder} holds {len(TeacherCache(folder)):,} rows of {training.sequence_length:,} tokens", file=sys.stderr
        )
    return 0


def batched(*rows: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Rows of several iterables one after another, `size` at a time."""
    for part in rows:
        iterator = iter(part)
        while batch := list(islice(iterator, size)):
            yield {name: torch.stack([row[name] for row in batch]) for name in ("input_ids", "position_ids")}


if __name__ == "__main__":
    sys.exit(main())
