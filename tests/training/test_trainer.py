"""NemotronHTrainer: resuming exactly, stopping without loss, and options that must leave the loss as it is."""

import errno
import itertools
import json
import math
import shutil
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import prompt, tiny_model
from tiny_run import (
    LENGTH,
    STEPS,
    TOKENS_PER_STEP,
    fresh_model,
    make_arguments,
    make_rows,
    make_trainer,
    read_metrics,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.data.packing import SplitRows
from nemotron_h_hf.training import checkpoints
from nemotron_h_hf.training.checkpoints import last_whole_checkpoint, whole_checkpoints
from nemotron_h_hf.training.distillation import DistillationTrainer
from nemotron_h_hf.training.trainer import EndlessRows, NemotronHTrainer, TrainingStopped
from nemotron_h_hf.training.z_loss import next_token_loss_with_z


class StopAt(TrainerCallback):
    """Ends the run after a step, as somebody pressing a key would, with or without a checkpoint."""

    def __init__(self, step: int, save: bool = True):
        self.step, self.save = step, save

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop, control.should_save = True, self.save


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("saved", [True, False])
def test_resumed_run_equals_one_that_was_never_stopped(texts, tmp_path, optimizer, saved):
    """Stopped at step 5, in the second phase of the data; without a save there it goes back to step 3, in the first."""
    whole = make_trainer(texts, tmp_path / "whole", optimizer=optimizer)
    whole.train()
    first = make_trainer(texts, tmp_path / "parts", optimizer=optimizer, callbacks=(StopAt(5, saved),))
    first.train()
    second = make_trainer(texts, tmp_path / "parts", optimizer=optimizer)
    second.train(resume_from_checkpoint=True)
    done = 5 if saved else 3
    assert len(first.seen) == 10 and len(second.seen) == 2 * (STEPS - done)
    assert all(torch.equal(a, b) for a, b in zip([*first.seen[: 2 * done], *second.seen], whole.seen, strict=True))
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    states = [checkpoints.last_whole_checkpoint(tmp_path / run) / "data_state.json" for run in ("whole", "parts")]
    assert states[0].read_text() == states[1].read_text()


def test_what_a_run_writes(texts, tmp_path):
    trainer = make_trainer(texts, tmp_path, save_total_limit=2)
    trainer.monitor.flops_per_token = 1e6
    trainer.train()
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [step * TOKENS_PER_STEP for step in range(1, STEPS + 1)]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"} <= lines[3].keys()
    assert lines[3]["mfu"] == pytest.approx(lines[3]["tokens_per_second"] * 1e6 / trainer.monitor.matrix_rate)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    ids = prompt()
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_learning_rate_follows_the_schedule_and_flags_win_on_resume(texts, tmp_path):
    make_trainer(texts, tmp_path, callbacks=(StopAt(3),)).train()
    trainer = make_trainer(texts, tmp_path, learning_rate=1e-3, weight_decay=0.25, decay_tokens="50%", save_steps=5)
    trainer.train(resume_from_checkpoint=True)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path)]
    warmup = 0.2 * STEPS * TOKENS_PER_STEP
    assert rates[:3] == pytest.approx([4e-3 * min(1, step * TOKENS_PER_STEP / round(warmup)) for step in (1, 2, 3)])
    assert rates[3:] == pytest.approx([1e-3 * (1 - 0.99 * max(0, step - 4) / 4) for step in (4, 5, 6, 7, 8)])
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5", "checkpoint-8"]


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    "fields, factors",
    [
        ({"warmup_tokens": "25%"}, [0, 1 / 2, *(cosine(step / 6) for step in range(6))]),
        ({"warmup_tokens": 4 * TOKENS_PER_STEP}, [0, 1 / 4, 1 / 2, 3 / 4, *(cosine(step / 4) for step in range(4))]),
        ({"warmup_tokens": None, "warmup_steps": 0.25}, [0, 1 / 2, *(cosine(step / 6) for step in range(6))]),
        ({"warmup_tokens": "25%", "warmup_steps": 0}, [cosine(step / 8) for step in range(8)]),
        ({"warmup_tokens": "50%", "lr_scheduler_type": "constant"}, [0, 1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1]),
    ],
)
def test_other_schedules_warm_up_too(texts, tmp_path, fields, factors):
    """transformers begins at 0 in the first step."""
    fields = {"lr_scheduler_type": "cosine", "decay_tokens": None, "save_strategy": "no", **fields}
    make_trainer(texts, tmp_path, **fields).train()
    assert [row["learning_rate"] for row in read_metrics(tmp_path)] == pytest.approx([4e-3 * f for f in factors])


def test_a_warm_up_beyond_the_run_is_refused(texts, tmp_path):
    trainer = make_trainer(texts, tmp_path, lr_scheduler_type="cosine", decay_tokens=None, warmup_tokens="9K")
    with pytest.raises(ValueError, match="warmup_tokens=9,000: allowed is 0 to the run's total of 1,024"):
        trainer.train()


def test_losses_are_those_of_the_model_on_the_rows(texts, tmp_path):
    """The first step's loss against a forward pass over its four rows at once."""
    make_trainer(texts, tmp_path, steps=1, save_strategy="no").train()
    batch = {
        name: torch.stack([row[name] for row in first_rows(texts, 4)])
        for name in ("input_ids", "labels", "position_ids")
    }
    model = fresh_model()
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(model(**batch, use_cache=False).loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
)
def test_loss_does_not_depend_on(texts, tmp_path, fields):
    """Rows have different numbers of labels (documents, padding), so a mean of means would show."""
    losses = []
    for name, more in (("plain", {}), ("changed", fields)):
        trainer = make_trainer(texts, tmp_path / name, steps=3, save_strategy="no", **more)
        trainer.train()
        losses.append([(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=2e-4, rtol=1e-3)
    assert losses[0][0][0] == pytest.approx(losses[1][0][0], abs=1e-5)


@pytest.mark.slow
def test_loss_does_not_depend_on_compilation(texts, tmp_path):
    rows = []
    for name, fields in (("plain", {}), ("compiled", {"torch_compile": True})):
        make_trainer(texts, tmp_path / name, steps=4, save_strategy="no", **fields).train()
        rows.append(read_metrics(tmp_path / name))
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows[0]] == pytest.approx([row[name] for row in rows[1]], rel=2e-3), name


def test_accumulated_batches_of_unequal_labels(tmp_path):
    """The items of all micro-batches divide the sum, not those of each: here one has 3 labels, the other 31."""
    ids = prompt(2, LENGTH)
    labels = ids.clone()
    labels[0, 4:] = -100
    rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(2)]
    arguments = make_arguments(
        tmp_path, per_device_train_batch_size=1, max_steps=1, save_strategy="no", train_sampling_strategy="sequential"
    )
    model = fresh_model()
    expected = model(ids, labels=labels).loss.item()
    NemotronHTrainer(model, arguments, train_dataset=rows).train()
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [NemotronHTrainer, DistillationTrainer])
def test_steps_without_a_label_change_nothing_and_go_on(tmp_path, kind):
    """Long prompts that are split over rows; the first steps with a label are no jump of the loss."""
    prompts = [{"input_ids": list(range(3, 3 + 5 * LENGTH // 2)) * 2} for _ in range(2)]
    for document in prompts:
        document["labels"] = [-100] * (5 * LENGTH - 4) + document["input_ids"][-4:]
    arguments = make_arguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=10, weight_decay=0.0,
        warmup_tokens=0, save_steps=7,
    )  # fmt: skip
    model = tiny_model(
        hybrid_override_pattern="M-*", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="-"
    ).train()
    more = {"teacher": tiny_model(seed=1)} if kind is DistillationTrainer else {}
    model.mtp.requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    still = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            still.append(all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()))

    arguments.mtp_loss_weight = 0.3
    kind(model, arguments, train_dataset=SplitRows(prompts, LENGTH), callbacks=[Look()], **more).train()
    rows = read_metrics(tmp_path)
    assert [row["loss"] > 0 for row in rows] == [row["grad_norm"] > 0 for row in rows] == ([False] * 4 + [True]) * 2
    assert still == [True] * 4 + [False] * 6


# Stopping


class Poison(TrainerCallback):
    """From a step on, multiplies the logits."""

    def __init__(self, step: int, factor: float):
        self.step, self.factor = step, factor

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            model.lm_head.register_forward_hook(lambda module, inputs, output: output * self.factor)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_loses_nothing(texts, tmp_path, factor):
    trainer = make_trainer(texts, tmp_path / "run", save_total_limit=1, callbacks=(Poison(6, factor),))
    with pytest.raises(TrainingStopped, match=r"step 6: the loss is .*checkpoint-5.*learning_rate"):
        trainer.train()
    assert [folder.name for folder in whole_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-5"]
    make_trainer(texts, tmp_path / "run").train(resume_from_checkpoint=True)
    make_trainer(texts, tmp_path / "whole").train()
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_a_jump_of_the_loss_stops(texts, tmp_path):
    """The steps before it are kept, and the same batch stops the run again, until something else is asked for."""
    message = r"step 5: the loss is .*max_loss_jump=4.0; .*checkpoint-4\. .*a higher max_loss_jump \(0"
    for _ in range(2):
        trainer = make_trainer(texts, tmp_path / "run", callbacks=(Poison(5, 1000.0),))
        with pytest.raises(TrainingStopped, match=message):
            trainer.train(resume_from_checkpoint=True)
        assert [folder.name for folder in whole_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    make_trainer(texts, tmp_path / "off", callbacks=(Poison(5, 1000.0),), max_loss_jump=0.0).train()
    make_trainer(texts, tmp_path / "run").train(resume_from_checkpoint=True)
    make_trainer(texts, tmp_path / "whole").train()
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_no_space_for_a_checkpoint(texts, tmp_path, monkeypatch):
    """Refused before the first byte is written, with what is needed and what is there."""
    trainer = make_trainer(texts, tmp_path, callbacks=(StopAt(3),))
    trainer.train()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(
        OSError, match=r"step 6 could not be written.*1 MiB free.*last whole checkpoint is .*checkpoint-3"
    ):
        make_trainer(texts, tmp_path).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_disk_full_in_the_middle_of_a_checkpoint(texts, tmp_path, monkeypatch, error):
    """torch.save fails at the optimizer's state, in either way it has; the half-written folder goes."""
    save = torch.save

    def failing(content, path, *others, **named):
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise error
        save(content, path, *others, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(OSError, match=r"step 6 could not be written.*checkpoint-3"):
            make_trainer(texts, tmp_path / "run", save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-3"]
    make_trainer(texts, tmp_path / "run").train(resume_from_checkpoint=True)
    make_trainer(texts, tmp_path / "whole").train()
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_unfinished_and_damaged_checkpoints(texts, tmp_path):
    make_trainer(texts, tmp_path, callbacks=(StopAt(5),)).train()
    unfinished = tmp_path / "checkpoint-7"
    checkpoints.begin(unfinished)
    (unfinished / "model.safetensors").write_bytes(b"half")
    somebody_elses = tmp_path / "checkpoint-99"
    somebody_elses.mkdir()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-5"
    with pytest.raises(ValueError, match=r"checkpoint-7 is no whole checkpoint"):
        make_trainer(texts, tmp_path).train(resume_from_checkpoint=str(unfinished))
    assert somebody_elses.is_dir() and not unfinished.is_dir()
    shard = tmp_path / "checkpoint-5" / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"model.safetensors has {size - 1} bytes, it was written with {size}"):
        make_trainer(texts, tmp_path).train(resume_from_checkpoint=True)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing.*remove .*checkpoint-5 to resume"):
        make_trainer(texts, tmp_path).train(resume_from_checkpoint=True)


def test_sharded_files_on_other_disks_are_missed(tmp_path):
    """The index is written by the first process for all; a machine that does not share its disk keeps its own files."""
    folder = tmp_path / "checkpoint-3"
    checkpoints.begin(folder)
    shards = folder / "pytorch_model_fsdp_0"
    dcp.save({"a": torch.ones(3)}, checkpoint_id=shards, no_dist=True)
    (own,) = shards.glob("*.distcp")
    content = own.read_bytes()
    own.unlink()
    with pytest.raises(
        OSError, match=rf"output_dir='{tmp_path}': allowed is .* that all processes see: 1 of the 1 .*{own.name}"
    ):
        checkpoints.mark_whole(folder, {"step": 3})
    assert last_whole_checkpoint(tmp_path) is None
    own.write_bytes(content)
    checkpoints.mark_whole(folder, {"step": 3})
    assert last_whole_checkpoint(tmp_path) == folder


def test_nothing_left_to_train(texts, tmp_path):
    done = make_trainer(texts, tmp_path, steps=3)
    done.train()
    again = make_trainer(texts, tmp_path, steps=3)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), again.model.parameters()))
    assert len(read_metrics(tmp_path)) == 3


def test_another_batch_size_is_refused_on_resume(texts, tmp_path):
    make_trainer(texts, tmp_path, steps=3).train()
    with pytest.raises(ValueError, match=r"tokens per step=64: allowed is what .*checkpoint-3 was trained with, 128"):
        make_trainer(texts, tmp_path, gradient_accumulation_steps=1).train(resume_from_checkpoint=True)
    same = make_trainer(texts, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == STEPS


def test_one_process_takes_one_of_several_gpus(texts, tmp_path, monkeypatch, caplog):
    """By torch's DataParallel a step would have twice the rows that a checkpoint says were read."""
    found = TrainingArguments._setup_devices.func

    def with_two(arguments):
        device = found(arguments)
        arguments._n_gpu = 2
        return device

    two = cached_property(with_two)
    two.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", two)
    trainer = make_trainer(texts, tmp_path, steps=3)
    trainer.train()
    read = json.loads((tmp_path / "checkpoint-3" / "data_state.json").read_text())["rows"]
    assert sum(map(len, trainer.seen)) == read == 3 * 4
    assert "accelerate launch takes all" in caplog.text


def test_rows_that_end_too_early_stop(texts, tmp_path):
    trainer = NemotronHTrainer(fresh_model(), make_arguments(tmp_path), train_dataset=make_rows(texts, steps=5))
    with pytest.raises(TrainingStopped, match=r"rows end at step 5 of max_steps 8.*checkpoint-3"):
        trainer.train()


def test_rows_of_a_list_go_round(tmp_path):
    """Batches run over the end of a round: 5 rows, 4 in a step."""
    documents = [prompt(1, LENGTH, seed=seed)[0] for seed in range(5)]
    trainer = NemotronHTrainer(fresh_model(), make_arguments(tmp_path), train_dataset=SplitRows(documents, LENGTH))
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-8" / "data_state.json").read_text())["rows"] == 4 * STEPS


def test_states_of_steps_outlast_reading_ahead():
    """Steps of 700 rows, as on hundreds of GPUs, read 300 rows too far: the state of each step is that of its last row."""
    documents = [torch.arange(3, 3 + length) for length in range(1, 90)]
    rows = EndlessRows(SplitRows(documents, 4), rows_per_step=700)
    taken = list(itertools.islice(rows, 1700))
    assert list(rows.states) == [700, 1400]
    again = SplitRows(documents, 4)
    again.load_state_dict(json.loads(json.dumps(rows.states[700])))
    following = list(itertools.islice(EndlessRows(again, 700), 1000))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(following, taken[700:], strict=True))


def test_data_loader_workers_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="dataloader_num_workers=1: allowed is 0"):
        make_trainer(texts, tmp_path, dataloader_num_workers=1)


def test_transformers_own_trainer_resumes_too(tmp_path):
    """Its load_state_dict takes the saved file as it is: names must fit or it continues with fresh weights."""
    rows = [{"input_ids": row, "labels": row} for row in prompt(8, LENGTH)]
    losses = []
    for _ in range(2):
        arguments = make_arguments(tmp_path, max_steps=2 + 2 * len(losses), save_steps=2)
        trainer = Trainer(fresh_model(), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=bool(losses))
        losses += [row["loss"] for row in trainer.state.log_history if "loss" in row][len(losses) :]
    assert losses[2] < losses[0]
    saved = NemotronHForCausalLM.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


# Evaluating


def rows_of_unequal_documents() -> list[dict]:
    """Padded to one length; one row has no label at all."""
    ids, labels = prompt(8, LENGTH), torch.full((8, LENGTH), -100)
    for row, length in enumerate((2, 31, 5, 32, 0, 17, 3, 9)):
        labels[row, :length] = ids[row, :length]
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_held_out_loss_is_per_token_whatever_the_batch_size(tmp_path, batch_size):
    model, rows = tiny_model(), rows_of_unequal_documents()
    arguments = make_arguments(tmp_path, per_device_eval_batch_size=batch_size)
    found = NemotronHTrainer(model, arguments, train_dataset=rows, eval_dataset=rows).evaluate()["eval_loss"]
    model, total, count = model.double(), 0.0, 0
    for row in rows:
        document = row["labels"][row["labels"] != -100]
        if len(document):
            logits = model(document[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum").item()
            count += len(document) - 1
    assert found == pytest.approx(total / count, abs=1e-5)


def test_evaluation_makes_logits_only_for_metrics(tmp_path):
    rows, seen = rows_of_unequal_documents(), []

    class Watching(NemotronHTrainer):
        def compute_loss(self, *others, **named):
            loss, outputs = super().compute_loss(*others, **named)
            seen.append("logits" in outputs)
            return loss, outputs

    def predicted(prediction):
        return {"shape": prediction.predictions.shape}

    arguments = make_arguments(tmp_path)
    losses = [
        Watching(tiny_model(), arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics).evaluate()
        for metrics in (None, predicted)
    ]
    assert seen == [False, True] and losses[1]["eval_shape"] == (8, LENGTH, 97)
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], abs=1e-6)


def test_an_evaluation_before_the_first_step_is_logged_once(texts, tmp_path):
    for _ in range(2):  # the second starts over
        arguments = make_arguments(tmp_path, max_steps=1, eval_on_start=True, save_strategy="no")
        rows = rows_of_unequal_documents()
        NemotronHTrainer(fresh_model(), arguments, train_dataset=make_rows(texts), eval_dataset=rows).train()
    assert [(row["step"], "eval_loss" in row) for row in read_metrics(tmp_path)] == [(0, True), (1, False)]


class Clock(TrainerCallback):
    """Two seconds a step, 50 an evaluation."""

    def __init__(self):
        self.now = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += 2

    def on_prediction_step(self, args, state, control, **kwargs):
        self.now += 50


@pytest.mark.parametrize("logging_steps, eval_steps", [(1, 1), (2, 3)])
def test_tokens_per_second_are_without_evaluations(texts, tmp_path, monkeypatch, logging_steps, eval_steps):
    clock = Clock()
    monkeypatch.setattr("nemotron_h_hf.training.monitor.time", SimpleNamespace(perf_counter=lambda: clock.now))
    arguments = make_arguments(
        tmp_path, eval_strategy="steps", eval_steps=eval_steps, logging_steps=logging_steps, save_strategy="no"
    )
    rows = rows_of_unequal_documents()
    trainer = NemotronHTrainer(
        fresh_model(), arguments, train_dataset=make_rows(texts), eval_dataset=rows, callbacks=[clock]
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert clock.now >= 2 * STEPS + 50 * (STEPS // eval_steps)
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    assert speeds == [TOKENS_PER_STEP / 2] * (STEPS // logging_steps)


# z-loss and balance loss


def test_z_loss_against_its_formula():
    model, ids = tiny_model(), prompt(2, 13)
    labels = ids.clone()
    labels[0, 3:6] = -100
    logits, targets = model(ids).logits[:, :-1], labels[:, 1:]
    counted = targets != -100
    expected = model(ids, labels=labels).loss + 0.3 * logits.logsumexp(-1)[counted].square().mean()
    hidden = model.model(ids).last_hidden_state
    loss = next_token_loss_with_z(hidden, model.lm_head, labels, 97, 0.3)
    assert torch.allclose(loss, expected, atol=1e-5)
    summed = next_token_loss_with_z(hidden, model.lm_head, labels, 97, 0.3, num_items_in_batch=counted.sum())
    assert torch.allclose(summed, expected, atol=1e-5)


def test_z_loss_in_pieces(monkeypatch):
    model, ids = tiny_model().train(), prompt(2, 13)
    gradients = []
    for logits_per_chunk in (2**24, 97 * 5):
        monkeypatch.setattr("nemotron_h_hf.model.loss.LOGITS_PER_CHUNK", logits_per_chunk)
        model.zero_grad()
        next_token_loss_with_z(model.model(ids).last_hidden_state, model.lm_head, ids, 97, 0.3).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_z_loss_is_part_of_training_only_where_asked_for(texts, tmp_path):
    for name, weight in (("off", 0.0), ("on", 0.1)):
        make_trainer(texts, tmp_path / name, steps=1, save_strategy="no", z_loss=weight).train()
    off, on = (read_metrics(tmp_path / name)[0]["loss"] for name in ("off", "on"))
    rows = first_rows(texts, 4)
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    targets = torch.stack([row["labels"] for row in rows])[:, 1:]
    z = fresh_model()(**batch, use_cache=False).logits[:, :-1].logsumexp(-1)[targets != -100].square().mean()
    assert on - off == pytest.approx(0.1 * z.item(), rel=1e-3)


@pytest.mark.parametrize("teacher", [False, True])
def test_balance_loss_is_part_of_training_and_logged(texts, tmp_path, teacher):
    """Against the model's own loss of the rows of a step, whose formula has its own test."""
    rows, found = first_rows(texts, 4), []
    kind, more = (DistillationTrainer, {"teacher": fresh_model()}) if teacher else (NemotronHTrainer, {})
    for coefficient in (None, 0.5):
        model = tiny_model("moe").train()
        arguments = make_arguments(
            tmp_path / str(coefficient), per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=1,
            save_strategy="no", router_aux_loss_coef=coefficient, eval_on_start=True,
        )  # fmt: skip
        kind(model, arguments, train_dataset=make_rows(texts), eval_dataset=rows, **more).train()
        found.append(read_metrics(tmp_path / str(coefficient)))
        assert model.config.output_router_logits is False
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    balance = tiny_model("moe")(**batch, output_router_logits=True).aux_loss.item()
    (held_out, without), (held_out_too, with_balance) = found
    assert "balance_loss" not in without and with_balance["balance_loss"] == pytest.approx(balance, rel=1e-4)
    assert with_balance["loss"] - without["loss"] == pytest.approx(0.5 * balance, rel=1e-3)
    assert held_out["eval_loss"] == held_out_too["eval_loss"]


def test_balance_loss_is_the_mean_since_the_last_line(texts, tmp_path):
    """Zero turns off what the configuration asks for, and the figure is there all the same."""
    for name, steps, coefficient in (("each", 1, 0.0), ("every_other", 2, 0.0)):
        model = tiny_model("moe", output_router_logits=True, router_aux_loss_coef=0.5).train()
        arguments = make_arguments(
            tmp_path / name, logging_steps=steps, max_steps=4, save_strategy="no", router_aux_loss_coef=coefficient
        )
        NemotronHTrainer(model, arguments, train_dataset=make_rows(texts)).train()
    each, every_other = ([row["balance_loss"] for row in read_metrics(tmp_path / n)] for n in ("each", "every_other"))
    assert every_other == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-5)


def test_balance_loss_needs_experts(texts, tmp_path):
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1: allowed is for a model with experts"):
        make_trainer(texts, tmp_path, router_aux_loss_coef=0.1)


def first_rows(texts, count: int) -> list[dict]:
    rows = iter(make_rows(texts))
    return [next(rows) for _ in range(count)]
