"""The formulas of experiments/scaling against small runs: what autograd keeps, what ranks hold, what they send."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import table
import torch
from formulas import (
    Plan,
    activation_bytes,
    fsdp_bytes_sent,
    fsdp_groups,
    kept_bytes,
    mixer_bytes,
    rank_elements,
    state_bytes,
    tensor_parallel_bytes_sent,
    tensor_parallel_shapes,
    tensor_parallel_traffic,
    working_bytes,
)
from tiny import prompt, tiny_config, tiny_model

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.model import loss

DTYPES = {"float32": 4, "bfloat16": 2}
DOC = Path(__file__).parents[2] / "docs" / "scaling.md"


class Kept:
    """Bytes of the storages that autograd keeps, each once, parameters and `known` tensors left out."""

    def __init__(self, known=()):
        self.known, self.storages = {tensor.untyped_storage().data_ptr() for tensor in known}, {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, which keeps addresses unique
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.storages.values())


def run_keeping(config: NemotronHConfig, length: int, dtype: str, checkpointing: bool) -> int:
    """Bytes kept between forward and backward of one row."""
    model = NemotronHForCausalLM(config).to(getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept, ids = Kept(model.parameters()), prompt(1, length)
    with kept.hooks:
        model(ids, labels=ids, skip_logits=True)
    return kept.bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", ["M", "*", "-", "M-M*-"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_activations_are_those_that_autograd_keeps(pattern, checkpointing, dtype):
    """To the byte, but for two numbers of the loss; at two lengths, to check the slope as well."""
    config = tiny_config(hybrid_override_pattern=pattern, intermediate_size=80)
    plan = Plan(checkpointing=checkpointing, element_bytes=DTYPES[dtype], fused_norm=False)
    measured = [run_keeping(config, length, dtype, checkpointing) for length in (64, 160)]
    expected = [activation_bytes(config, plan, length) for length in (64, 160)]
    assert [a - b for a, b in zip(measured, expected)] == [12, 12]  # the loss's sum and its count


def test_activations_of_a_loss_in_chunks(monkeypatch):
    """Logits are not kept once there are too many of them."""
    config = tiny_config()
    for module in (loss, sys.modules[activation_bytes.__module__]):
        monkeypatch.setitem(module.CHUNKS_AT_ONCE, "cuda", 1)
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 32 * config.vocab_size)
        monkeypatch.setattr(module, "KEPT_LOGITS", 32 * config.vocab_size)
    plan = Plan(checkpointing=False, fused_norm=False)
    for length in (32, 33, 128):
        measured = run_keeping(config, length, "bfloat16", False)
        chunks = 0 if length <= 32 else -(-length // 32)
        assert 0 <= measured - activation_bytes(config, plan, length) <= 12 + 16 * chunks


def test_the_inside_of_a_mixer():
    """Long rows: the slope to the byte, the whole within a thousandth (weights in fp32 come on top)."""
    config = tiny_config(hybrid_override_pattern="M")
    mixer = NemotronHForCausalLM(config).to(torch.bfloat16).model.layers[0].mixer
    plan, measured = Plan(), []
    for length in (2560, 4096):
        projected = torch.randn(1, length, sum(mixer.in_proj_sizes), dtype=torch.bfloat16, requires_grad=True)
        kept = Kept([projected, *mixer.parameters()])
        with kept.hooks:
            mixer._mix(projected, None, None)
        measured.append(kept.bytes)
    expected = [mixer_bytes(config, plan, length) for length in (2560, 4096)]
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured[1] - measured[0] == expected[1] - expected[0]
    with pytest.raises(ValueError, match="tokens is 100"):
        mixer_bytes(config, plan, 100)


def test_working_memory_is_that_of_the_larger():
    """A wide MLP, the inside of a Mamba mixer or a chunk of logits, whichever needs most."""
    plan, tokens = Plan(), 4096
    mamba = tiny_config(hybrid_override_pattern="M-", intermediate_size=8, vocab_size=1000)
    inside = tokens * kept_bytes(mamba, "linear_attention", 0, plan) + mixer_bytes(mamba, plan, tokens)
    wide = tiny_config(hybrid_override_pattern="M-", intermediate_size=10**5)
    assert working_bytes(mamba, plan, tokens) == max(inside, 1000 * tokens * 16)
    assert working_bytes(wide, plan, tokens) == tokens * kept_bytes(wide, "mlp", 10**5, plan)


@pytest.mark.parametrize("preset", ["nemotron-h-8b", "nemotron-h-56b"])
def test_states_of_the_released_sizes(preset):
    """16 bytes per parameter over all GPUs: every first dimension divides by 8."""
    config = NemotronHConfig.from_preset(preset)
    assert rank_elements(config, Plan()) == num_parameters(config)
    assert sum(state_bytes(config, Plan(data_parallel=8)).values()) == 2 * num_parameters(config)
    kept = state_bytes(config, Plan(data_parallel=8, reduce_each_pass=False))
    assert kept["gradients"] == 2 * num_parameters(config)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_hold_everything_once(ranks):
    """Data-parallel ranks together hold each parameter once; so do tensor-parallel ones but for what is replicated."""
    config = tiny_config()
    whole = num_parameters(config)
    assert sum(rank_elements(config, Plan(data_parallel=ranks), rank) for rank in range(ranks)) == whole
    held = [list(tensor_parallel_shapes(config, ranks, rank)) for rank in range(ranks)]
    replicated = sum(tensor.num_elements for tensor, shape in held[0] if shape == tensor.shape)
    total = sum(rank_elements(config, Plan(tensor_parallel=ranks), tensor_rank=rank) for rank in range(ranks))
    assert total == whole + (ranks - 1) * replicated
    assert 0 < replicated < 0.05 * whole


def test_what_is_refused():
    with pytest.raises(ValueError, match="data_parallel=1024"):
        Plan(data_parallel=1024).passes  # noqa: B018
    with pytest.raises(ValueError, match="allowed are M"):
        rank_elements(tiny_config("moe"), Plan())


def test_the_document_holds_the_tables(capsys):
    assert table.main([]) == 0
    printed = capsys.readouterr().out
    tables = [line for line in DOC.read_text().splitlines() if line.startswith("| ") and line.count("|") > 10]
    assert tables == [line for line in printed.splitlines() if line.startswith("| ")]


def test_the_document_has_the_host_memory_of_loading():
    paragraph = next(part for part in DOC.read_text().split("\n\n") if part.startswith("**Host memory**"))
    small, large = (num_parameters(NemotronHConfig.from_preset(f"nemotron-h-{name}")) / 1e9 for name in ("8b", "56b"))
    text = " ".join(paragraph.split())
    assert f"{4 * small:.0f} GB for the 8B and {4 * large:.0f} GB for the 56B" in text
    assert f"{8 * 4 * small:,.0f} GB and {8 * 4 * large:,.0f} GB on a machine of 8 GPUs" in text
    assert f"bfloat16: {2 * small:.0f} GB and {2 * large:.0f} GB" in text


COUNTING = """
import json
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    "Bytes that go into each kind of collective on this rank; for gathering, those that come out."

    def __init__(self):
        super().__init__()
        self.bytes = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation).replace("allgather", "all_gather").replace("allreduce", "all_reduce")
        for kind in self.bytes:
            if "c10d" in name and kind in name:
                tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
                self.bytes[kind] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write(folder, content):
    with open(f"{folder}/{dist.get_rank()}.json", "w") as file:
        json.dump(content, file)
"""

FSDP_WORKER = (
    COUNTING
    + """
from types import SimpleNamespace
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from nemotron_h_hf import NemotronHForCausalLM
from tiny import prompt, tiny_config
dist.init_process_group("gloo")
wrap = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
)
wrap.set_mixed_precision("bf16")
accelerator = SimpleNamespace(  # accelerate shards on GPUs only; this is its own function for that
    state=SimpleNamespace(fsdp_plugin=wrap), mixed_precision="bf16", is_main_process=False, device=torch.device("cpu")
)
model = fsdp2_prepare_model(accelerator, NemotronHForCausalLM(tiny_config(hybrid_override_pattern="M-M*-")).train())
optimizer = torch.optim.AdamW(model.parameters())
ids = prompt(1, 24)
seen = []
for passes, each in ((1, True), (3, True), (3, False)):  # the first also steps once, to have moments
    sent = Sent()
    with sent:
        for number in range(passes):
            model.set_requires_gradient_sync(each or number == passes - 1)
            model(input_ids=ids, labels=ids).loss.backward()
            if not each and number == 0:  # FSDP2 has whole gradients now
                groups = [group for module in model.modules() if isinstance(module, FSDPModule)
                          for group in module._get_fsdp_state()._fsdp_param_groups]
                whole = [param._unsharded_param.grad for group in set(groups) for param in group.fsdp_params]
                whole = sum(gradient.numel() * gradient.element_size() for gradient in whole)
    seen.append(sent.bytes)
    gradients = sum(local(p.grad).numel() * p.grad.element_size() for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
size = lambda tensors: sum(local(t).numel() * t.element_size() for t in tensors)
held = {"weights": size(model.parameters()), "gradients": gradients, "moments": size(states), "whole_gradients": whole}
write(sys.argv[1], {"sent": seen, **held})
"""
)

TP_WORKER = (
    COUNTING
    + """
from transformers import AutoModelForCausalLM
import nemotron_h_hf
from test_scaling import Kept
from tiny import prompt
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16).train()
    ids, sent, kept = prompt(1, 40), Sent(), Kept([local(p) for p in model.parameters()])
    kept.keep = None
    keep = lambda t: (Kept.keep(kept, local(t)), t)[1]
    with sent:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = model(ids, labels=ids)
        output.loss.backward()
    held = sum(local(p).numel() for p in model.parameters())
    found[folder] = {"sent": sent.bytes, "held": held, "kept": kept.bytes}
write(sys.argv[1], found)
"""
)


def run_on_two(code: str, folder: Path, *arguments: str) -> list[dict]:
    """Run a worker on two processes; what each wrote."""
    (folder / "worker.py").write_text(code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(folder / "worker.py"), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_of_fsdp(tmp_path):
    """As accelerate wraps the model: states to the byte on both ranks, and all that is gathered and reduced."""
    config, length = tiny_config("dense", hybrid_override_pattern="M-M*-"), 24
    ranks = run_on_two(FSDP_WORKER, tmp_path)
    for rank, found in enumerate(ranks):
        expected = state_bytes(config, Plan(2, 1, 2 * length, length), rank)
        assert {name: found[name] for name in expected} == expected
        for sent, (passes, each) in zip(found["sent"], ((1, True), (3, True), (3, False))):
            plan = Plan(2, 1, 2 * length * passes, length, reduce_each_pass=each)
            bytes_sent = fsdp_bytes_sent(config, plan)  # of two ranks, half of what is gathered or reduced
            assert {name: sent[name] // 2 for name in bytes_sent} == bytes_sent
        assert found["whole_gradients"] == state_bytes(config, plan, rank)["gradients"]
    assert ranks[0]["weights"] > ranks[1]["weights"]  # 97 rows of embeddings do not divide


@pytest.mark.slow
def test_two_ranks_of_tensor_parallelism(tmp_path):
    """For a model of one layer of each kind: parameters held, activations kept, numbers summed and gathered."""
    length, plan = 40, Plan(1, 2, 40, 40, checkpointing=False, fused_norm=False)
    folders = {pattern: tmp_path / f"model{number}" for number, pattern in enumerate(["M", "*", "-", "M-M*-"])}
    for pattern, folder in folders.items():
        tiny_model("dense", vocab_size=98, hybrid_override_pattern=pattern, intermediate_size=80).save_pretrained(
            folder
        )
    for rank, found in enumerate(run_on_two(TP_WORKER, tmp_path, *map(str, folders.values()))):
        for pattern, folder in folders.items():
            config, seen = NemotronHConfig.from_pretrained(folder), found[str(folder)]
            assert seen["held"] == rank_elements(config, plan, tensor_rank=rank), pattern
            assert seen["kept"] - activation_bytes(config, plan, length) == 12, pattern
            kinds = [*config.layers_block_type, "embeddings", "lm_head"]
            traffic = [tensor_parallel_traffic(config, kind) for kind in kinds]
            for name in ("all_reduce", "all_gather"):
                assert seen["sent"][name] == 2 * length * sum(numbers[name] for numbers in traffic), (pattern, name)
            sent = seen["sent"]["all_reduce"] + seen["sent"]["all_gather"] // 2  # a ring of two
            loss_again = 2 * length * config.vocab_size // 2  # chunks of long rows gather their logits twice
            assert tensor_parallel_bytes_sent(config, plan) == sent + loss_again


def test_groups_are_units_of_accelerate():
    """Embeddings, blocks, tail; each padded to whole rows on every rank."""
    groups = fsdp_groups(tiny_config(), Plan(data_parallel=2))
    assert [*groups][0] == "embeddings" and [*groups][-1] == "tail" and len(groups) == 9
    assert groups["embeddings"] == 98 * 48 and groups["tail"] == 98 * 48 + 48
