"""Int8 weights on a CPU: the product against float64, and models that torchao quantised, loaded, used and saved."""

import copy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization = pytest.importorskip("torchao.quantization")
pytest.importorskip("numba")

from torchao.quantization.granularity import PerGroup  # noqa: E402

import nemotron_h_cli as cli  # noqa: E402
from nemotron_h_hf import HybridCache  # noqa: E402
from nemotron_h_hf.model import linear as linear_module  # noqa: E402
from nemotron_h_hf.model import numba_run  # noqa: E402
from nemotron_h_hf.model.linear import MOST_ROWS, project, reads_int8  # noqa: E402
from nemotron_h_hf.scripts.eval import weights_digest  # noqa: E402


def quantised_linear(in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(in_features + out_features)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


@pytest.fixture
def products(monkeypatch):
    """The shapes of weights that numba_run.py was given."""
    shapes, factor_of = [], numba_run.factor_of

    def noted(weight: torch.Tensor, *args) -> numba_run.Factor:
        if type(weight).__name__ == "Int8Tensor":
            shapes.append(weight.shape)
        return factor_of(weight, *args)

    monkeypatch.setattr(numba_run, "factor_of", noted)
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64, 48), (129, 7), (3, 5), (4096, 33), (17, 1)])
@pytest.mark.parametrize("rows", [1, 2, 17, MOST_ROWS])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_product_is_that_of_the_rounded_weights(sizes, rows, threads, products):
    linear = quantised_linear(*sizes)
    exact = linear.weight.qdata.double() * linear.weight.scale.double()
    x = torch.randn(rows, sizes[0]) * torch.exp(2 * torch.randn(rows, 1))
    expected = x.double() @ exact.T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = project(linear, x)
    finally:
        torch.set_num_threads(before)
    assert len(products) == 1
    allowed = 1e-6 * (x.double().abs() @ exact.abs().T)  # of the sum of what is added up
    if rows == 1:
        allowed += half_step(x) * exact.abs().sum(1)
    assert ((got - expected).abs() <= allowed).all()


def half_step(x: torch.Tensor) -> float:
    """What an input of one row may be changed by: it becomes an integer of 16 bits, so large that 32 bits hold the sums."""
    size = x.double().abs()
    return float(max(size.max() / 32766, 1.001 * size.sum() / (2**24 - x.numel()))) / 2


@torch.no_grad()
@pytest.mark.parametrize("length", [4096, 21504, 100_000])
@pytest.mark.parametrize("value", [127, -128])
def test_sums_of_integers_do_not_overflow(length, value):
    linear = quantised_linear(length, 4)
    linear.weight.qdata.fill_(value)
    linear.weight.scale.fill_(1)
    for x in (
        torch.ones(1, length),
        torch.rand(1, length),
        torch.rand(1, length) ** 20,
        torch.randn(1, length).abs() * 1e4,
    ):
        expected = (x.double().sum() * value).expand(1, 4)
        assert (
            (project(linear, x) - expected).abs() <= half_step(x) * abs(value) * length + 1e-6 * expected.abs()
        ).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "outlier", [1, 30, 60, 100, 1e4]
)  # activations of trained models have such; above 52 or so fp32 is left
def test_rounding_the_inputs_changes_less_than_bfloat16_and_the_weights(outlier):
    linear = quantised_linear(4096, 64)
    x = torch.randn(1, 4096)
    x[0, 7] = outlier
    scale = linear.weight.scale.double().view(-1, 1)
    exact = linear.weight.qdata.double() * scale
    error = (project(linear, x).double() - x.double() @ exact.T).std()
    assert error < 0.5 * ((x.bfloat16().double() - x.double()) @ exact.T).std()
    assert error < 0.2 * (x.double() @ (scale * (torch.rand(64, 4096).double() - 0.5)).T).std()


@torch.no_grad()
@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_bytes(value):
    linear = quantised_linear(512, 16)
    linear.weight.qdata.fill_(value)
    linear.weight.scale.fill_(1)
    for x in (torch.ones(1, 512), -torch.ones(1, 512), torch.full((3, 512), 63 / 64)):
        expected = (x.sum(1, keepdim=True) * value).expand(-1, 16)
        torch.testing.assert_close(project(linear, x), expected, rtol=2e-5 if len(x) == 1 else 1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("x", [torch.zeros(2, 64), torch.full((1, 64), 1e-40), torch.full((1, 64), 1e30)])
def test_inputs_of_any_size(x):
    linear = quantised_linear(64, 8)
    expected = nn.functional.linear(x, linear.weight.dequantize())
    torch.testing.assert_close(project(linear, x), expected, rtol=1e-4, atol=1e-30)


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad):
    x = torch.ones(2, 64)
    x[0, 3] = bad
    finite = quantised_linear(64, 8)(x).isfinite()
    assert not finite[0].any() and finite[1].all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_bias_and_shape_stay(dtype, products):
    linear = quantised_linear(64, 8, bias=True, dtype=dtype)
    x = torch.randn(64, 2, 3, dtype=dtype).permute(1, 2, 0)  # not contiguous
    got = project(linear, x)
    assert got.dtype == dtype and got.shape == (2, 3, 8) and len(products) == 1
    exact = linear.weight.qdata.double() * linear.weight.scale.double()
    expected = x.double() @ exact.T + linear.bias.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert project(linear, x[:0]).shape == (0, 3, 8)


def test_what_is_left_to_torchao(products):
    linear, x = quantised_linear(64, 8), torch.randn(3, 64, requires_grad=True)
    project(linear, x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.dequantize().sum(0).expand(3, -1))
    with torch.no_grad():
        assert project(linear, torch.randn(MOST_ROWS + 1, 64)).shape == (MOST_ROWS + 1, 8)
        assert reads_int8(linear.weight)
        linear.weight.zero_point[0] = 1
        assert not reads_int8(linear.weight)
    for config in (
        quantization.Int8WeightOnlyConfig(granularity=PerGroup(32)),
        quantization.Int8DynamicActivationInt8WeightConfig(),
    ):
        other = nn.Linear(64, 8)
        quantization.quantize_(other, config)
        assert not reads_int8(other.weight)
    assert not reads_int8(nn.Linear(64, 8).weight)
    assert not products


@torch.no_grad()
def test_compiled_the_product_is_torchaos(products):
    linear = quantised_linear(64, 8)
    x = torch.randn(2, 64)
    compiled = torch.compile(lambda x: project(linear, x), backend="eager", fullgraph=True)(x)
    assert not products
    torch.testing.assert_close(project(linear, x), compiled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_numba(monkeypatch, caplog):
    linear, x = quantised_linear(64, 8), torch.randn(2, 64)
    expected = project(linear, x)
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("numba_run", "numba_loops", "numba_compile"):
        monkeypatch.delitem(sys.modules, f"nemotron_h_hf.model.{name}")
    linear_module.compiled_loops.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            torch.testing.assert_close(project(linear, x), expected, rtol=1e-5, atol=1e-5)
            project(linear, x)
        assert caplog.text.count("pip install numba") == 1
    finally:
        linear_module.compiled_loops.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    tiny_model("dense").save_pretrained(folder)
    return folder


def load(folder, **config):
    quantised = TorchAoConfig(quantization.Int8WeightOnlyConfig(), **config)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_a_quantised_model_computes_with_every_int8_weight(checkpoint, products):
    model, exact = load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    quantised = {name for name, module in linears(model).items() if reads_int8(module.weight)}
    assert quantised == linears(model).keys() - {"lm_head"} and any("out_proj" in name for name in quantised)
    for name, module in linears(exact).items():  # the model with the rounded weights, in plain fp32
        if name in quantised:
            module.weight.copy_(linears(model)[name].weight.dequantize())
    ids = prompt(2, 20)
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, rtol=0, atol=5e-5)
    assert len(products) == len(quantised)
    for name in quantised:  # each one is really used
        changed = copy.deepcopy(model)
        linears(changed)[name].weight = nn.Parameter(torch.zeros_like(linears(exact)[name].weight), requires_grad=False)
        assert (changed(ids).logits - model(ids).logits).abs().max() > 1e-2, name
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False), exact.generate(ids, max_new_tokens=8, do_sample=False)
    )


@torch.no_grad()
def test_saved_and_loaded_again(checkpoint, tmp_path):
    model, ids = load(checkpoint, modules_to_not_convert=[]), prompt(1, 12)
    assert reads_int8(model.lm_head.weight)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert reads_int8(again.lm_head.weight)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_damaged_scale_is_found(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    with_scale = next(name for name in tensors if name.endswith("scale"))
    tensors[with_scale][0] = float("nan")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors: .*in_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_commands_take_a_quantised_checkpoint(checkpoint, tmp_path, capsys):
    model = load(checkpoint)
    assert len(weights_digest(model)) == 16
    model.save_pretrained(tmp_path / "int8")
    assert cli.main(["info", str(tmp_path / "int8")]) == 0
    assert "int8" in capsys.readouterr().out
    (tmp_path / "int8" / "model.safetensors").unlink()
    assert cli.main(["info", str(tmp_path / "int8")]) != 0


@torch.no_grad()
@pytest.mark.parametrize("case", ["values", "scale", "scale in bf16", "zero points", "other values"])
def test_what_changes_between_tokens_is_seen(case):
    model, ids = tiny_model(), prompt(1, 14)
    if case == "scale in bf16":
        model.bfloat16()
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda module, name: name.endswith(("in_proj", "up_proj"))
    )
    cache = HybridCache(model.config)
    model(ids[:, :12], past_key_values=cache)
    model(ids[:, 12:13], past_key_values=cache)
    before, weight = (
        copy.deepcopy(cache),
        next(block.mixer.in_proj.weight for block in model.model.layers if block.block_type == "linear_attention"),
    )
    if case == "values":
        weight.qdata.neg_()
    elif case == "other values":
        weight.qdata = -weight.qdata
    elif case == "zero points":
        weight.zero_point = torch.zeros_like(weight.scale, dtype=torch.int8)
        model(ids[:, 13:], past_key_values=copy.deepcopy(cache))
        weight.zero_point.add_(3)
    else:
        weight.scale.mul_(3)
    got = model(ids[:, 13:], past_key_values=cache).logits
    model.set_mamba_implementation("torch")
    model.model.layers.apply(lambda module: module.register_forward_hook(lambda *args: None))  # torchao's own products
    want = model(ids[:, 13:], past_key_values=before).logits
    assert (got - want).abs().max() <= (0.15 if case == "scale in bf16" else 1e-3)
