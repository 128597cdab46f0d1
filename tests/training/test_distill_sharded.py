"""Distillation on two processes (gloo): student and teacher sharded give the loss of one process; a cache is begun once;
a teacher that one process loads is the same on both."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.model import loss as loss_module
from nemotron_h_hf.training import teacher_cache
from nemotron_h_hf.training.distillation import shard_teacher
from nemotron_h_hf.training.losses import LiveTeacher, distillation_loss
from nemotron_h_hf.training.one_copy import device_to_load_on
from nemotron_h_hf.training.teacher_cache import TeacherCache, teacher_hidden_states, write_cache


def loss_of(student: nn.Module, teacher: nn.Module, ids: torch.Tensor, num_items: int) -> torch.Tensor:
    """As DistillationTrainer asks for it; several chunks."""
    live = LiveTeacher(teacher_hidden_states(teacher, ids), teacher.get_output_embeddings())

    def loss_from_hidden(hidden_states, lm_head):
        return distillation_loss(hidden_states, lm_head, ids, 97, live, num_items_in_batch=num_items).loss

    return student(input_ids=ids, loss_from_hidden=loss_from_hidden).loss


def work() -> None:
    """In each of two processes: half of the rows, twice (the second step finds what the first left gathered)."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    loss_module.LOGITS_PER_CHUNK = 97 * 8
    student, teacher = tiny_model("square", seed=3).train(), tiny_model().requires_grad_(False)
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    shard_teacher(teacher)
    assert isinstance(teacher.model.layers[0].mixer.in_proj.weight, DTensor)
    ids = prompt(4, 21)
    for _ in range(2):
        student.zero_grad()
        loss = loss_of(student, teacher, ids[2 * rank : 2 * rank + 2], num_items=4 * 20)
        loss.backward()
    torch.distributed.all_reduce(loss)
    gradients = {name: 2 * p.grad.full_tensor() for name, p in student.named_parameters()}  # FSDP2 takes the mean
    assert all(p.grad is None for p in teacher.parameters())
    if rank == 0:
        reference, whole = tiny_model("square", seed=3).train(), tiny_model()
        expected = loss_of(reference, whole, ids, num_items=4 * 20)
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-5)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=2e-5)
        print("same loss and gradients")
    torch.distributed.destroy_process_group()


def load_once(folder: Path) -> None:
    """In each of two processes: a teacher with experts, mtp and mixed dtypes, whose weights the first alone has."""
    whole = NemotronHForCausalLM.from_pretrained(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    teacher = NemotronHForCausalLM.from_pretrained(folder, device_map=device_to_load_on())
    assert all(tensor.is_meta == (rank == 1) for tensor in teacher.state_dict().values())
    angles = torch.arange(4.0) if rank == 0 else torch.empty(4, device="meta")  # as other models have, in no state dict
    teacher.model.register_buffer("angles", angles, persistent=False)
    shard_teacher(teacher.requires_grad_(False))
    assert torch.equal(teacher.model.angles, torch.arange(4.0)) and "model.angles" not in teacher.state_dict()
    assert all(isinstance(parameter, DTensor) and not parameter.requires_grad for parameter in teacher.parameters())
    for (name, tensor), expected in zip(teacher.state_dict().items(), whole.state_dict().values(), strict=True):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    ids = prompt(2, 21)
    hidden = teacher_hidden_states(teacher, ids)
    torch.testing.assert_close(teacher.lm_head(hidden), whole(ids).logits)
    print("same teacher")
    torch.distributed.destroy_process_group()


def write_biased(source: Path, folder: Path) -> Path:
    """A checkpoint whose experts' selection biases, buffers that begin as zeros, are others; its tokenizer goes along."""
    shutil.copytree(source, folder)
    model = NemotronHForCausalLM.from_pretrained(source)
    for name, bias in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        bias.copy_(torch.linspace(-0.2, 0.3, len(bias)))
    model.save_pretrained(folder)
    return folder


def begin_caches(folder: Path) -> None:
    """In each of two processes, while the first is slow to write: a new cache, that cache again, and a foreign folder."""
    torch.distributed.init_process_group("gloo")
    rank, teacher, write_json = torch.distributed.get_rank(), tiny_model(), teacher_cache.write_json

    def slowly(path: Path, content: object) -> None:
        part = path.with_name(f".{path.name}.part")
        part.touch()
        time.sleep(1)
        part.unlink()
        write_json(path, content)

    teacher_cache.write_json = slowly
    rows = [{"input_ids": ids} for ids in prompt(6, 11).split(1)]
    for _ in range(2):
        write_cache(folder / "new", teacher, rows[rank::2], k=4, process_index=rank)
        torch.distributed.barrier()
        assert len(TeacherCache(folder / "new")) == 6
    for wrong, message in ((folder, "cache.json"), (folder / "new", "k=4, this run has 5")):
        with pytest.raises(ValueError, match=message):
            write_cache(wrong, teacher, rows[rank::2], k=5, process_index=rank)
    print("one cache")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradients_of_one():
    assert "same loss and gradients" in on_two_processes(29617)


@pytest.mark.slow
def test_two_processes_begin_one_cache(tmp_path):
    assert on_two_processes(29618, str(tmp_path)).count("one cache") == 2


@pytest.mark.slow
def test_a_teacher_that_one_process_loads_is_whole_on_two(tmp_path):
    model = tiny_model("latent", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    model.bfloat16()
    model.model.layers[0].mixer.A_log.data = model.model.layers[0].mixer.A_log.data.float()
    model.save_pretrained(tmp_path)
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert on_two_processes(29619, str(tmp_path), "load", **settings).count("same teacher") == 2


def on_two_processes(port: int, *arguments: str, **variables: str) -> str:
    """What this file prints when it is run by two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run(
        [*command, __file__, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_tied_teacher_is_not_sharded():
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        shard_teacher(tiny_model(tie_word_embeddings=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (load_once if "load" in sys.argv else begin_caches)(Path(sys.argv[1]))
    else:
        work()
