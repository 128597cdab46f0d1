"""Int8 weights on a CPU: the product against float64, and models that torchao quantised, loaded, used and saved."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization = pytest.importorskip("torchao.quantization")
if "fbgemm" not in torch.backends.quantized.supported_engines:
    pytest.skip("torch has FBGEMM on x86 alone", allow_module_level=True)

from torchao.quantization.granularity import PerGroup  # noqa: E402

import nemotron_h_cli as cli  # noqa: E402
from nemotron_h_hf.model import int8  # noqa: E402
from nemotron_h_hf.scripts.eval import weights_digest  # noqa: E402


def quantised_linear(in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(in_features + out_features)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


@pytest.mark.parametrize("sizes", [(64, 48), (129, 7), (3, 5), (4096, 33)])
@pytest.mark.parametrize("rows", [1, 2, 17, 256])
def test_the_product_is_that_of_the_rounded_weights(sizes, rows):
    linear = quantised_linear(*sizes)
    exact = linear.weight.qdata.double() * linear.weight.scale.double()
    assert int8.pack_int8_weights(linear) == 1
    x = torch.randn(rows, sizes[0]) * torch.exp(2 * torch.randn(rows, 1))
    expected = x.double() @ exact.T
    with torch.no_grad():
        got = linear(x)
    # three digits: half a unit of the last one, unit / 128^2, for each input channel
    allowed = x.abs().max() / 63 / 128**2 / 2 * exact.abs().sum(1).max() + 1e-6 * expected.abs().max()
    assert (got - expected).abs().max() <= allowed
    assert torch.equal(linear.weight.qdata.double() * linear.weight.scale.double(), exact)


def test_extreme_bytes_do_not_saturate():
    """Sums of pairs in 16 bits would overflow at full weights and inputs of eight bits."""
    for value in (127, -128):
        weight = torch.full((16, 512), value, dtype=torch.int8)
        packed = int8._pack(weight, torch.ones(16, 1))
        for x in (torch.ones(1, 512), -torch.ones(1, 512), torch.full((3, 512), 63 / 64)):
            expected = x.double() @ weight.double().T
            torch.testing.assert_close(int8.packed_product(x, packed).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [torch.zeros(2, 64), torch.full((1, 64), 1e-40), torch.full((1, 64), 1e30)])
def test_inputs_of_any_size(x):
    linear = quantised_linear(64, 8)
    with torch.no_grad():
        expected = linear(x)
        int8.pack_int8_weights(linear)
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad):
    linear = quantised_linear(64, 8)
    int8.pack_int8_weights(linear)
    x = torch.ones(1, 64)
    x[0, 3] = bad
    with torch.no_grad():
        assert not linear(x).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_bias_and_shape_stay(dtype):
    linear = quantised_linear(64, 8, bias=True, dtype=dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    with torch.no_grad():
        expected = linear(x)
        int8.pack_int8_weights(linear)
        got = linear(x)
        assert linear(x[:0]).shape == (0, 3, 8)
    assert got.dtype == dtype and got.shape == (2, 3, 8)
    torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-2)


def test_gradients_flow_to_the_input():
    linear = quantised_linear(64, 8)
    exact = linear.weight.dequantize()
    int8.pack_int8_weights(linear)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, exact.sum(0).expand(3, -1))


def test_only_whole_rows_and_weights_alone_are_packed():
    group = nn.Linear(64, 8)
    quantization.quantize_(group, quantization.Int8WeightOnlyConfig(granularity=PerGroup(32)))
    dynamic = nn.Linear(64, 8)
    quantization.quantize_(dynamic, quantization.Int8DynamicActivationInt8WeightConfig())
    assert int8.pack_int8_weights(nn.ModuleList([group, dynamic, nn.Linear(64, 8)])) == 0


def test_packed_weights_cannot_be_written_or_compiled():
    linear = quantised_linear(64, 8)
    int8.pack_int8_weights(linear)
    with pytest.raises(RuntimeError, match=r"unpack_int8_weights\(model\) first"):
        linear.load_state_dict(linear.state_dict())
    with pytest.raises(TypeError, match=r"unpack_int8_weights\(model\) first"):
        linear.weight.__tensor_flatten__()
    assert int8.unpack_int8_weights(linear) == 1 and type(linear.weight) is quantization.Int8Tensor
    linear.load_state_dict(linear.state_dict())


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
def test_a_quantised_model_computes_with_every_packed_linear(checkpoint):
    model, exact = load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    packed = {name for name, module in linears(model).items() if isinstance(module.weight, int8.PackedInt8Tensor)}
    assert packed == linears(model).keys() - {"lm_head"} and any("out_proj" in name for name in packed)
    for name, module in linears(exact).items():  # the model with the rounded weights, in plain fp32
        if name in packed:
            module.weight.copy_(linears(model)[name].weight.dequantize())
    ids = prompt(2, 20)
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, rtol=1e-3, atol=2e-3)
    for name in packed:  # each one is really used
        changed = copy.deepcopy(model)
        linears(changed)[name].weight = nn.Parameter(torch.zeros_like(linears(exact)[name].weight), requires_grad=False)
        assert (changed(ids).logits - model(ids).logits).abs().max() > 1e-2, name
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False), exact.generate(ids, max_new_tokens=8, do_sample=False)
    )


@torch.no_grad()
def test_saved_and_loaded_again(checkpoint, tmp_path):
    model, ids = load(checkpoint, modules_to_not_convert=[]), prompt(1, 12)
    assert isinstance(model.lm_head.weight, int8.PackedInt8Tensor)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again.lm_head.weight, int8.PackedInt8Tensor)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(type(t) is not int8.PackedInt8Tensor for t in model.state_dict().values())
    int8.unpack_int8_weights(again)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)


def test_a_damaged_scale_is_found(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    with_scale = next(name for name in tensors if name.endswith("scale"))
    tensors[with_scale][0] = float("nan")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="NaN in 1 tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_commands_take_a_quantised_checkpoint(checkpoint, tmp_path, capsys):
    model = load(checkpoint)
    assert len(weights_digest(model)) == 16
    model.save_pretrained(tmp_path / "int8")
    assert cli.main(["info", str(tmp_path / "int8")]) == 0
    assert "int8" in capsys.readouterr().out
    (tmp_path / "int8" / "model.safetensors").unlink()
    assert cli.main(["info", str(tmp_path / "int8")]) != 0
