"""Pretrain a Nemotron-H model on a blend of sources.

    nemotron-h pretrain --sources '{code: {path: "src/**/*.py"}}' --total_tokens 2M       # continues the embedded model
    nemotron-h pretrain --config run.yaml                                                # everything in a file
    nemotron-h pretrain --config run.yaml --learning_rate 4e-4                           # flags win over the file
    nemotron-h pretrain --config run.yaml --model nemotron-h-8b --init random --tokenizer FOLDER
    accelerate launch -m nemotron_h_hf.scripts.pretrain --config run.yaml                # many GPUs or machines
    accelerate launch --config_file examples/accelerate/fsdp2.yaml -m nemotron_h_hf.scripts.pretrain --config run.yaml

run.yaml, with weights that change on the way (a phase without `until` or `last` fills what is left):

    output_dir: runs/blend
    total_tokens: 100M
    sources:
      web:  {path: data/web/*.jsonl}             # JSONL or parquet with a column `text`, or text files
      code: {path: data/code/**/*.py}
      wiki: {dataset: owner/name, split: train}  # streamed from the hub
    phases:
      - {until: 60%, weights: {web: 0.6, code: 0.3, wiki: 0.1}}
      - {weights: {web: 0.3, code: 0.3, wiki: 0.4}}

Texts are tokenised as they are read, by every process, in the order of the blend. If that is the bottleneck, tokenise
beforehand: a column of token ids, each document with its end tokens, is used as it is (column: input_ids).

A long document fills consecutive rows. With few rows per step a batch is then one document. --shuffle_rows N makes N rows at
once and deals them out in random order. With as many as the data has, a run shorter than an epoch sees pieces of all
documents instead of a few whole ones.

The same command given again resumes from the last whole checkpoint, at the next row. In OUTPUT_DIR: checkpoint-N/ while
it runs, metrics.jsonl (see `nemotron-h plot`), and at the end model/, which from_pretrained loads and --push_to_hub with
--hub_model_id sends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.cost import training_flops_per_token
from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.data.documents import document_encoder
from nemotron_h_hf.elastic.budgets import mark_untrained
from nemotron_h_hf.errors import require
from nemotron_h_hf.hub import upload_folder
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse
from nemotron_h_hf.training.checkpoints import writing_run
from nemotron_h_hf.training.data_arguments import PretrainDataArguments
from nemotron_h_hf.training.rows import make_rows
from nemotron_h_hf.training.starting_point import load_model, load_tokenizer
from nemotron_h_hf.training.trained_folder import save_finished, take_push
from nemotron_h_hf.training.trainer import NemotronHTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Load, train (or resume), save."""
    model_arguments, data, training = parse(
        (ModelArguments, PretrainDataArguments, NemotronHTrainingArguments), argv, __doc__, "nemotron-h pretrain",
        output_dir="runs/pretrain",
    )  # fmt: skip
    require(bool(data.sources), "sources", data.sources, "a mapping from names to path or dataset")
    require(training.max_steps > 0, "total_tokens", training.total_tokens, "a number of tokens, for instance 2M")
    require(training.eval_steps is None, "eval_steps", training.eval_steps, "none: there is no held-out text here")
    repo_id = take_push(training)
    with writing_run(training, model_arguments.model):
        return run(model_arguments, data, training, repo_id)


def run(
    model_arguments: ModelArguments,
    data: PretrainDataArguments,
    training: NemotronHTrainingArguments,
    repo_id: str | None,
) -> int:
    """The work, in a folder that no other run writes to."""
    disable_progress_bar()
    torch.set_flush_denormal(True)
    set_seed(training.seed)
    model = load_model(model_arguments, EMBEDDED_MODEL, NemotronHConfig.from_preset)
    mark_untrained(model.config)
    tokenizer = load_tokenizer(model_arguments, EMBEDDED_MODEL, model.config.vocab_size)
    trainer = NemotronHTrainer(
        model,
        training,
        train_dataset=make_rows(data, training, tokenizer, document_encoder(tokenizer), shuffle_rows=data.shuffle_rows)[
            0
        ],
        processing_class=tokenizer,
        flops_per_token=training_flops_per_token(model.config, training.sequence_length),
    )
    if trainer.is_world_process_zero():
        print(describe(model, training), file=sys.stderr)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)
    tell_left_out(trainer.rows.documents.left_out())
    folder = save_finished(trainer, tokenizer)
    if repo_id is not None and folder is not None:
        print(upload_folder(folder, repo_id, bool(training.hub_private_repo)))
    return 0


def describe(model: torch.nn.Module, training: NemotronHTrainingArguments) -> str:
    """The run in two lines."""
    count = sum(parameter.numel() for parameter in model.parameters())
    processes = "1 process" if training.world_size == 1 else f"{training.world_size} processes"
    return (
        f"{count:,} parameters, {model.config.hybrid_override_pattern}; rows of {training.sequence_length:,} tokens\n"
        f"{training.max_steps:,} steps of {training.tokens_per_step:,} tokens on {processes}; "
        f"output in {training.output_dir}"
    )


if __name__ == "__main__":
    sys.exit(main())
