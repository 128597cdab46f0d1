"""Elastic training on two processes (FSDP2, gloo): losses, gradients and router of one process, layers left out together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from nemotron_h_hf.conversion.sharded_run import export_run
from safetensors import safe_open
from safetensors.torch import load_file
from test_elastic_train import write_parent
from test_fsdp import ONE_COPY, held
from tiny import prompt, tiny_model
from tiny_run import read_metrics, write_texts
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.elastic.train.choices import axes_of
from nemotron_h_hf.elastic.train.curriculum import draw
from nemotron_h_hf.elastic.train.expected_cost import ExpectedCost
from nemotron_h_hf.elastic.train.routed_model import Route, RoutedModel
from nemotron_h_hf.elastic.train.router import RouterSettings
from nemotron_h_hf.training.checkpoints import last_whole_checkpoint

pytestmark = pytest.mark.slow
CHOICES = {"hidden_size": [32], "intermediate_size": [48], "mamba_num_heads": [4], "layers": [7, 5]}


def routed_model() -> RoutedModel:
    model = tiny_model("dense", seed=3).train()
    axes = axes_of(model.config, CHOICES, ["intermediate_size"])
    cost = ExpectedCost(model.config, axes, layer_order=[3, 6, 1, 0, 2, 5, 4])
    targets = {"all": cost.full, "half": 0.5 * cost.full}
    torch.manual_seed(0)
    return RoutedModel(model, Route(axes, cost, targets, [3, 6, 1, 0, 2, 5, 4], RouterSettings(width=16)))


def step(routed: RoutedModel, ids: torch.Tensor, num_items: int, share: float) -> torch.Tensor:
    """Three micro-steps, the second and third with hard choices; the loss of these rows."""
    total = 0.0
    for micro_step in range(3):
        routed.sample(draw((0.2, 0.8), routed.route.axes, float(micro_step > 0), 0, 0, micro_step), 0.5)

        def loss_from_hidden(hidden_states, lm_head):
            logits = lm_head(hidden_states)[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / num_items
            return loss + share * routed.router_loss.float()

        loss = routed.model(input_ids=ids, loss_from_hidden=loss_from_hidden).loss
        loss.backward()
        total = total + loss.detach()
    return total


def work() -> None:
    """In each of two processes: half of the rows, as Accelerate shards: blocks, then the root, where the router is."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ids = prompt(4, 21)
    routed = routed_model()
    blocks = routed.model.model.layers
    assert len({type(block) for block in blocks}) == 1  # a policy by class finds all of them
    ran = []
    for layer, block in enumerate(blocks):
        block.mixer.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        fully_shard(block)
    fully_shard(routed.model)
    assert all(isinstance(p, DTensor) for p in routed.router.parameters())
    loss = step(routed, ids[2 * rank : 2 * rank + 2], 4 * 20, 0.5)
    torch.distributed.all_reduce(loss)
    gradients = {
        name: None if p.grad is None else 2 * p.grad.full_tensor() for name, p in routed.model.named_parameters()
    }
    logits = routed.logits(routed.route.targets["half"])
    assert len(ran) < 2 * 3 * 7  # some layers did not run
    if rank == 0:
        alone = routed_model()
        expected = step(alone, ids, 4 * 20, 1.0)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=2e-5)
        assert all(p.grad.abs().sum() > 0 for name, p in alone.router.named_parameters() if "weight" in name)
        for field, found in alone.logits(alone.route.targets["half"]).items():
            torch.testing.assert_close(logits[field], found)
        print("same losses, gradients and router")
    torch.distributed.destroy_process_group()


def run(command: list[str], crash_after: int = -1, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1",
                   "COMMAND": "elastic_train", "CRASH_AFTER": str(crash_after), **more}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode == 0) == (crash_after < 0), done.stderr[-4000:]
    return done.stdout


def test_two_processes_give_the_losses_gradients_and_router_of_one():
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29631",
        __file__,
    ]
    assert "same losses, gradients and router" in run(launch)


@pytest.mark.timeout(900)  # four launches
def test_command_on_two_processes(tmp_path):
    """As on one: losses, router, budgets; an ordinary checkpoint, and a crash in between that is made good.

    The first process alone has parent, router and teacher before they are sharded.
    """
    texts, parent = write_texts(tmp_path / "texts"), write_parent(tmp_path / "parent")
    settings = {
        "model": str(parent), "data": [str(texts / "low" / "*.txt")], "eval_data": [str(texts / "high" / "0*.txt")],
        "budgets": {"full": 1.0, "half": 0.6}, "choices": {**CHOICES, "layers": [7, 6]}, "hard_share": 0.5,
        "sequence_length": 32, "max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, "router_warmup_steps": 2,
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    one = ["-m", "nemotron_h_hf.scripts.elastic_train", f"--config={config}", f"--output_dir={tmp_path / 'one'}"]
    run([sys.executable, *one, "--per_device_train_batch_size=4"])
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text(yaml.safe_dump({**ONE_COPY, "num_processes": 2}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate), "--main_process_port",
              "0", str(Path(__file__).parents[1] / "fsdp_on_cpu.py"), f"--config={config}",
              f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=2"]  # fmt: skip
    run(launch, crash_after=4, HELD=str(tmp_path))
    assert [held(tmp_path, name)[1] for name in ("model", "teacher")] == [0, 0]
    run(launch)
    rows = [[row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == list(range(1, 7))
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys()
        for name in ("loss", "kl", "size_half", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=5e-3, abs=1e-5), name
    routers = [load_file(tmp_path / name / "router.safetensors") for name in ("one", "two")]
    for name, weights in routers[0].items():
        torch.testing.assert_close(routers[1][name], weights, rtol=0, atol=2e-3)
    configs = [
        json.loads((tmp_path / name / "model" / "config.json").read_text())["elastic"] for name in ("one", "two")
    ]
    assert configs[0]["budgets"]["half"]["loss"] == pytest.approx(configs[1]["budgets"]["half"]["loss"], rel=1e-2)
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "two" / "model")
    checkpoint = last_whole_checkpoint(tmp_path / "two")
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    export_run(checkpoint, tmp_path / "exported")
    exported = NemotronHForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(map(torch.equal, exported.state_dict().values(), model.state_dict().values()))
    with safe_open(tmp_path / "two" / "model" / "model.safetensors", "pt") as file:
        assert not any("router" in name for name in file.keys())


if __name__ == "__main__":
    work()
