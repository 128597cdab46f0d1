"""Weights in several places: split over two processes by the tensor-parallel plan, or offloaded to disk."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import AutoModelForCausalLM
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM

EVEN_VOCAB = {"vocab_size": 98}  # transformers 5.17 splits lm_head only into equal parts


def test_every_style_of_the_plans_exists():
    plan = NemotronHConfig.base_model_tp_plan | NemotronHForCausalLM._tp_plan
    assert set(plan.values()) <= set(ALL_PARALLEL_STYLES.keys())


@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_the_plan_splits_every_mixer(shape):
    """Every matrix of the model but the router, the convolution and the latent projections has a rule."""
    model = tiny_model(shape, n_shared_experts=1)
    rules = [f"model.{rule}" for rule in NemotronHConfig.base_model_tp_plan] + list(NemotronHForCausalLM._tp_plan)
    whole = set()
    for name, parameter in model.named_parameters():
        generic = ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))
        if parameter.dim() > 1 and generic not in rules:
            whole.add(generic.split("mixer.")[-1])
    assert whole == {"conv1d"} | ({"gate", "fc1_latent_proj", "fc2_latent_proj"} if shape == "latent" else set())


WORKER = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import nemotron_h_hf
from tiny import prompt
for folder in sys.argv[1:]:
    ids = prompt(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = AutoModelForCausalLM.from_pretrained(folder)
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    num_local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in split.parameters())
    num_whole = sum(p.numel() for p in whole.parameters())
    assert num_local < 0.6 * num_whole, (num_local, num_whole)
    error = (split(ids, attention_mask=mask).logits - whole(ids, attention_mask=mask).logits).abs().max()
    assert error < 1e-5, error
    new = dict(max_new_tokens=6, do_sample=False, attention_mask=mask)
    assert split.generate(ids, **new).tolist() == whole.generate(ids, **new).tolist()
    for model in (whole, split):
        model.train()
        model(ids, labels=ids).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        gradient = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(full, gradients[name].grad, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    print("equal", folder, dist.get_rank(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    """Logits, generated text and gradients, with left padding, for dense, MoE and latent models, and experts and a window by layer."""
    by_layer = {"moe_intermediate_size": [16, 24], "num_experts_per_tok": [1, 3], "sliding_window": 5}
    shapes = {"dense": {}, "moe": {}, "latent": {}, "puzzle": {"shape": "moe", **by_layer}}
    folders = []
    for name, more in shapes.items():
        folders.append(str(tmp_path / name))
        tiny_model(**{"shape": name, **EVEN_VOCAB, **more}).save_pretrained(folders[-1])
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", str(worker)]
    done = subprocess.run(
        [sys.executable, *launcher, *folders], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("equal") == 2 * len(folders)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_offloaded_to_disk(shape, dtype, limit, tmp_path):
    """A hooked convolution is called as a module, which sums in another order."""
    whole = tiny_model(shape).to(dtype)
    whole.save_pretrained(tmp_path / "model")
    num_layers = len(whole.model.layers)
    places = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(num_layers)}
    places |= {"model.embeddings": "cpu", "model.norm_f": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=dtype, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert all(p.is_meta for p in model.model.layers[1].parameters())
    ids = prompt(2, 15)
    with torch.no_grad():
        expected = whole(ids).logits
        assert (model(ids).logits - expected).abs().max() < limit * expected.abs().max()
    new = {"max_new_tokens": 5, "do_sample": False}
    assert model.generate(ids, **new).tolist() == whole.generate(ids, **new).tolist()


@pytest.mark.parametrize("part", ["model", "mtp"])
def test_automatic_placement_keeps_blocks_whole(part, tmp_path):
    """The limit lies in the middle of the stack, or of a block of multi-token prediction."""
    more = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*-"} if part == "mtp" else {}
    whole = tiny_model("dense", **more)
    whole.save_pretrained(tmp_path / "model")
    sizes = {name: weight.nbytes for name, weight in whole.named_parameters()}
    room = sum(nbytes for name, nbytes in sizes.items() if not name.startswith("mtp.layers."))
    room = 200_000 if part == "model" else room + sizes["mtp.layers.0.eh_proj.weight"] * 3 // 2
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} <= {str(place) for place in model.hf_device_map.values()}
    assert not any("layers." in name and name.partition("layers.")[2].count(".") for name in model.hf_device_map)
    with torch.no_grad():
        expected = whole(prompt()).logits
        assert (model(prompt()).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe", "latent"])
def test_the_plan_names_only_what_is_there(shape):
    model = tiny_model(shape)
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for rule in model.tp_plan:
        pattern = re.escape(rule).replace(r"\*", r"\d+")
        assert any(re.fullmatch(pattern, name) for name in names), rule
    assert any("in_proj" in rule for rule in model.tp_plan)
