"""FP8 training: the modules converted, their arithmetic against an independent one, checkpoints, refusals, FSDP2."""

import copy
import os
import re
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AORecipeKwargs
from tiny import VOCAB, prompt, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM, NemotronHForSequenceClassification
from nemotron_h_hf.training import fp8
from nemotron_h_hf.training.arguments import NemotronHTrainingArguments
from nemotron_h_hf.training.fp8 import (
    convert_to_fp8,
    converted_modules,
    decoder_gemms,
    describe_fp8_modules,
    fp8_module_names,
    print_fp8_modules,
    refuse_double_conversion,
)
from nemotron_h_hf.training.trainer import NemotronHTrainer

# Sizes that real FP8 takes: Mamba's in_proj has 2 * 64 + 2 * 2 * 16 + 16 = 208 outputs.
EVEN = {"mamba_num_heads": 16, "mamba_head_dim": 4}
LINEAR = {"M": ["in_proj", "out_proj"], "*": ["q_proj", "k_proj", "v_proj", "o_proj"], "-": ["up_proj", "down_proj"]}


# Which modules


@pytest.mark.parametrize(("preset", "num_converted"), [("8b", 104), ("47b", 198), ("56b", 248)])
def test_released_models_keep_two_blocks_at_either_end(preset, num_converted):
    """Every Linear of the decoder but those of the first and last two layers, which are M- in all three: four GEMMs."""
    config = NemotronHConfig.from_preset(preset)
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    pattern, last = config.hybrid_override_pattern, config.num_hidden_layers - 1
    assert pattern.startswith("M-") and pattern.endswith("M-")
    edges = tuple(f"model.layers.{index}." for index in (0, 1, last - 1, last))
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = fp8_module_names(config)
    assert sorted(names) == sorted(name for name in linear if name != "lm_head" and not name.startswith(edges))
    assert names == fp8_module_names(model) and len(names) == num_converted
    expected = [f"model.layers.{i}.mixer.{name}" for i, kind in enumerate(pattern) for name in LINEAR[kind]]
    assert names == expected[4:-4]


def test_47b_where_layers_of_a_kind_follow_each_other():
    config = NemotronHConfig.from_preset("47b")
    pattern, names = config.hybrid_override_pattern, fp8_module_names(config)
    at = pattern.index("---MM---")
    run = [name for name in names if at <= int(name.split(".")[2]) < at + 8]
    assert [name.rsplit(".", 1)[1] for name in run] == 3 * LINEAR["-"] + 2 * LINEAR["M"] + 3 * LINEAR["-"]


def test_four_gemms_are_not_four_modules_nor_two_blocks_wherever_attention_stands():
    config = tiny_config(hybrid_override_pattern="*-M*-M*")
    assert [name.split(".")[2] + name.rsplit(".", 1)[1] for name in fp8_module_names(config)] == [
        "2in_proj", "2out_proj", "3q_proj", "3k_proj", "3v_proj", "3o_proj", "4up_proj", "4down_proj",
    ]  # fmt: skip
    odd = fp8_module_names(config, skip_first=1, skip_last=3)
    assert odd[0] == "model.layers.0.mixer.o_proj" and odd[-1] == "model.layers.5.mixer.in_proj"


def test_mixtures_of_experts_convert_all_but_router_and_routed_experts():
    moe = fp8_module_names(tiny_config("moe", hybrid_override_pattern="MEMEME"))
    assert moe[2:] == [f"model.layers.3.mixer.shared_experts.{name}" for name in LINEAR["-"]]
    latent = fp8_module_names(tiny_config("latent", hybrid_override_pattern="MEMEME"))
    assert [name.split("mixer.")[1] for name in latent[2:]] == [
        "fc1_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj", "fc2_latent_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", ["dense", "square", "list"])
def test_gemms_are_listed_in_the_order_they_run(shape):
    model, ran = tiny_model(shape), []
    for name, module in model.model.named_modules(prefix="model"):
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(prompt())
    assert ran == [name for gemm in decoder_gemms(model) for name in gemm]


def test_other_heads_and_mtp():
    config = tiny_config(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-")
    with torch.device("meta"):
        assert not any("mtp" in name for name in convert_to_fp8(NemotronHForCausalLM(config), emulate=True))
        classifier = NemotronHForSequenceClassification(config)
        bare = classifier.model
    assert fp8_module_names(classifier)[0] == "model.layers.2.mixer.in_proj"
    assert convert_to_fp8(bare, emulate=True)[0] == "layers.2.mixer.in_proj"


def test_listed_modules_are_printed_by_layer(capsys, monkeypatch):
    model = tiny_model()
    convert_to_fp8(model, emulate=True)
    print_fp8_modules(model)
    assert capsys.readouterr().out.splitlines() == [
        "FP8 (emulated) in 8 of the 16 Linear modules in the decoder:",
        "  model.layers.2: in_proj, out_proj",
        "  model.layers.3: q_proj, k_proj, v_proj, o_proj",
        "  model.layers.4: up_proj, down_proj",
    ]
    monkeypatch.setenv("RANK", "1")
    print_fp8_modules(model)
    assert capsys.readouterr().out == ""
    assert describe_fp8_modules(tiny_model()) == "FP8 in none of the 16 Linear modules in the decoder"


# They run


@pytest.mark.parametrize("shape", ["dense", "latent"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_listed_module_runs_in_fp8_forward_and_backward(shape, checkpointing, monkeypatch):
    model = tiny_model(shape).train()
    names = convert_to_fp8(model, emulate=True, skip_first=1, skip_last=1)
    assert any(name.endswith("out_proj") for name in names)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ran = count_products(model, monkeypatch)
    model(prompt(2, 16), labels=prompt(2, 16)).loss.backward()
    once = {"input x weight": 1 + checkpointing, "grad_output x weight": 1, "grad_output x input": 1}
    assert ran == {name: once for name in names}


def count_products(model: nn.Module, monkeypatch) -> dict[str, Counter]:
    """Have torchao's FP8 product note, by module, what it multiplied: operands carry their module's own configuration."""
    from torchao.float8.float8_ops import FLOAT8_OPS_TABLE

    owner = {id(model.get_submodule(name).linear_mm_config): name for name in converted_modules(model)}
    product, ran = FLOAT8_OPS_TABLE[torch.ops.aten.mm.default], {}

    def noting(op, args, kwargs=None):
        a, b = args
        assert {a._data.dtype, b._data.dtype} <= {torch.float8_e4m3fn, torch.float8_e5m2}
        kind = f"{a._gemm_input_role.value} x {b._gemm_input_role.value}"
        ran.setdefault(owner[id(a._linear_mm_config)], Counter())[kind] += 1
        return product(op, args, kwargs)

    monkeypatch.setitem(FLOAT8_OPS_TABLE, torch.ops.aten.mm.default, noting)
    return ran


def test_a_product_that_bypasses_the_module_would_be_noticed(monkeypatch):
    """The count is no tautology: out_proj used by its weight, as a fused kernel does, is missing from it."""
    model = tiny_model().train()
    names = convert_to_fp8(model, emulate=True)
    out_proj = model.model.layers[2].mixer.out_proj
    ran = count_products(model, monkeypatch)
    monkeypatch.setattr(out_proj, "forward", lambda x: nn.functional.linear(x, out_proj.weight))
    model(prompt(), labels=prompt()).loss.backward()
    assert set(names) - set(ran) == {"model.layers.2.mixer.out_proj"}


# Arithmetic


E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of mantissa, least exponent, largest value


def fake_quantise(x: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """x scaled to the format's range by its largest value, rounded half to even as the format is, scaled back; fp32."""
    mantissa, low, largest = kind
    amax = x.abs().max().double()
    scale = (largest / amax).float() if amax > 0 else torch.ones(())
    scaled = x.float() * scale
    step = torch.exp2(torch.frexp(scaled).exponent.sub(1).clamp(min=low) - mantissa)
    return (torch.round(scaled / step) * step).clamp(-largest, largest) / scale


class ReferenceLinear(torch.autograd.Function):
    """The recipe written out: x (..., k), weight (n, k)."""

    @staticmethod
    def forward(ctx, x, weight, gradient_kind):
        ctx.save_for_backward(x, weight)
        ctx.gradient_kind = gradient_kind
        return (fake_quantise(x, E4M3) @ fake_quantise(weight, E4M3).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g = fake_quantise(grad, ctx.gradient_kind)
        wgrad = g.flatten(0, -2).t() @ fake_quantise(x, E4M3).flatten(0, -2)
        return (g @ fake_quantise(weight, E4M3)).to(x.dtype), wgrad.to(grad.dtype), None


def one_linear(model: nn.Module) -> nn.Linear:
    return model.model.layers[4].mixer.up_proj  # 48 -> 80


def outputs_and_gradients(linear, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("content", ["normal", "outliers", "tiny", "zeros"])
@pytest.mark.parametrize("emulate", [True, False])
def test_arithmetic_is_the_papers(dtype, content, emulate):
    model = tiny_model(**EVEN)
    convert_to_fp8(model, emulate=emulate)
    module = one_linear(model)
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(size, generator=generator) for size in ((2, 16, 48), (80, 48), (2, 16, 80)))
    if content == "outliers":
        x[0, 0, 0], weight[3, 3], grad[1, 2, 3] = 1e4, 300.0, -1e5  # pushes the others into the subnormal range
    x, grad = {"tiny": (x * 1e-6, grad * 1e-9), "zeros": (x * 0, grad * 0)}.get(content, (x, grad))
    x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)

    def converted(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    ours = outputs_and_gradients(converted, x, weight, grad)
    reference = outputs_and_gradients(lambda x, w: ReferenceLinear.apply(x, w, E5M2), x, weight, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # the sum's order; one step of bfloat16
    for got, expected in zip(ours, reference, strict=True):
        assert got.dtype == expected.dtype == dtype
        scale = max(expected.abs().max().item(), 1e-30)
        torch.testing.assert_close(got / scale, expected / scale, rtol=tolerance, atol=1e-6)
    if content == "normal" and dtype == torch.float32:
        wrong = outputs_and_gradients(lambda x, w: ReferenceLinear.apply(x, w, E4M3), x, weight, grad)
        assert (wrong[1] - ours[1]).abs().max() > 1e-2 * ours[1].abs().max()


def test_model_loss_is_near_but_not_equal_and_edges_are_untouched():
    model = tiny_model().train()
    plain = copy.deepcopy(model)
    convert_to_fp8(model, emulate=True)
    ids = prompt(2, 32)
    losses = [m(ids, labels=ids).loss for m in (plain, model)]
    gap = (losses[1] - losses[0]).abs() / losses[0]
    assert 1e-6 < gap < 2e-2
    assert type(model.lm_head) is type(model.model.layers[1].mixer.up_proj) is nn.Linear


def test_token_counts_that_are_no_multiple_of_16():
    """The weight's gradient sums over tokens: 3 x 7 of them, padded in real FP8."""
    gradients = []
    for emulate in (True, False):
        model = tiny_model(**EVEN).train()
        convert_to_fp8(model, emulate=emulate)
        model(prompt(3, 7), labels=prompt(3, 7)).loss.backward()
        gradients.append(one_linear(model).weight.grad)
    assert not model.model.layers[2].mixer.in_proj.config.emulate
    assert model.model.layers[2].mixer.in_proj.config.pad_inner_dim
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


# Refusals


def test_sizes_that_real_fp8_does_not_take():
    message = "model.layers.2.mixer.in_proj=48 inputs and 200 outputs: allowed in real FP8 are multiples of 16"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_to_fp8(tiny_model(), emulate=False)


def test_emulation_is_chosen_by_the_device(monkeypatch):
    warned = []
    monkeypatch.setattr(fp8.logger, "warning_once", warned.append)
    for available, capability, emulate in [(False, (0, 0), True), (True, (8, 0), True), (True, (8, 9), False)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        model = tiny_model(**EVEN)
        convert_to_fp8(model)
        assert one_linear(model).config.emulate is emulate
        assert len(warned) == emulate and all("FP8 is emulated: no CUDA device" in text for text in warned)
        warned.clear()
    odd = tiny_model()  # a capable device, but in_proj has 200 outputs
    convert_to_fp8(odd)
    assert warned == [
        "FP8 is emulated in 1 of 8 modules, whose sizes are no multiples of 16: model.layers.2.mixer.in_proj"
    ]
    assert [n for n in converted_modules(odd) if odd.get_submodule(n).config.emulate] == [warned[0].split(": ")[1]]
    assert describe_fp8_modules(odd).startswith("FP8 (1 of them emulated) in 8 of the 16")


def test_bad_counts_and_models():
    with pytest.raises(ValueError, match="skip_first=-1"):
        convert_to_fp8(tiny_model(), emulate=True, skip_first=-1)
    with pytest.raises(ValueError, match="skip_first=7, skip_last=7: allowed is a sum below the 14 GEMMs"):
        convert_to_fp8(tiny_model(), emulate=True, skip_first=7, skip_last=7)
    model = tiny_model()
    model.model.layers[2].mixer.out_proj = nn.Identity()
    with pytest.raises(ValueError, match="layers.2.mixer.out_proj=Identity: allowed is nn.Linear"):
        convert_to_fp8(model, emulate=True)
    assert converted_modules(model) == []


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match="pip install"):
        convert_to_fp8(tiny_model())


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_second_conversion_is_refused(monkeypatch, fresh_accelerator):
    model = tiny_model()
    convert_to_fp8(model, emulate=True)
    with pytest.raises(ValueError, match="8 modules are in FP8 already, model.layers.2.mixer.in_proj first"):
        convert_to_fp8(model, emulate=True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
        with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=fp8: allowed are bf16 and no"):
            convert_to_fp8(tiny_model(), emulate=True)
        arguments = TrainingArguments("unused", use_cpu=True)
        with pytest.raises(ValueError, match="mixed_precision=fp8"):
            refuse_double_conversion(model, arguments)
        refuse_double_conversion(tiny_model(), arguments)  # not converted: Accelerate's business
    refuse_double_conversion(model, TrainingArguments("unused", use_cpu=True, bf16=True))


def test_our_trainer_refuses_accelerates_fp8(fresh_accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")
    with monkeypatch.context() as patch:  # as in a script that converts before the switch is seen
        patch.delenv("ACCELERATE_MIXED_PRECISION")
        model = tiny_model()
        convert_to_fp8(model, emulate=True)
    arguments = NemotronHTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="mixed_precision=fp8: allowed are bf16 and no"):
        NemotronHTrainer(model, arguments, train_dataset=rows())
    NemotronHTrainer(tiny_model(), arguments, train_dataset=rows())  # not converted: Accelerate's business


def test_accelerates_fp8_is_refused(fresh_accelerator, monkeypatch):
    model = tiny_model()
    convert_to_fp8(model, emulate=True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[AORecipeKwargs()])
    with pytest.raises(ValueError, match="mixed_precision=fp8"):
        refuse_double_conversion(model, accelerator)
    with pytest.raises(ValueError, match="mixed_precision=fp8"):
        convert_to_fp8(tiny_model(), emulate=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = Accelerator(cpu=True, mixed_precision="bf16")
    refuse_double_conversion(model, plain)
    convert_to_fp8(tiny_model(), emulate=True)
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")
    with pytest.raises(ValueError, match="FP8 backend AO"):
        refuse_double_conversion(model, plain)


# Checkpoints and training


def test_checkpoints_do_not_notice(tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    convert_to_fp8(model, emulate=True)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert converted_modules(again) == [] and list(again.state_dict()) == list(before)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    convert_to_fp8(again, emulate=True)
    ids = prompt(2, 16)
    assert torch.equal(again(ids).logits, model(ids).logits)


def rows(num_rows: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (num_rows, 16), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer_resumes_bit_by_bit(tmp_path):
    def run(folder: str, max_steps: int, resume: str | None = None) -> tuple[nn.Module, list[float]]:
        model = tiny_model()
        convert_to_fp8(model, emulate=True)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=max_steps, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            lr_scheduler_type="constant", learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows())
        refuse_double_conversion(trainer.model, trainer.accelerator)
        trainer.train(resume_from_checkpoint=resume)
        assert len(converted_modules(trainer.model)) == 8
        return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = run("whole", 4)
    run("half", 2)
    resumed, resumed_losses = run("half", 4, str(tmp_path / "half" / "checkpoint-2"))
    assert resumed_losses == losses and len(set(losses)) > 1
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        convert_to_fp8(model, emulate=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(prompt(2, 16), labels=prompt(2, 16)).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


WORKER = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from nemotron_h_hf.training.fp8 import convert_to_fp8, converted_modules
from tiny import prompt, tiny_model

dist.init_process_group("gloo")
rank, batch = dist.get_rank(), prompt(4, 16)
mine = batch[2 * rank : 2 * rank + 2]
whole, split = tiny_model().train(), tiny_model().train()
for model in (whole, split):
    convert_to_fp8(model, emulate=True)
for block in split.model.layers:
    fully_shard(block)
fully_shard(split)
assert len(converted_modules(split)) == 8
optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (whole, split)]
for step in range(3):
    # One process takes the halves one after the other: each product has its own activation scale.
    halves = [whole(half, labels=half).loss for half in batch.split(2)]
    (sum(halves) / 2).backward()
    loss = split(mine, labels=mine).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, sum(halves).detach() / 2, rtol=1e-6, atol=1e-6)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
for name, parameter in split.named_parameters():
    torch.testing.assert_close(parameter.full_tensor(), whole.get_parameter(name), rtol=1e-5, atol=1e-6)
print("equal", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_on_two_processes_computes_what_one_does(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", str(worker)]
    done = subprocess.run([sys.executable, *launcher], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("equal") == 2
