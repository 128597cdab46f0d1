"""Few rows by all threads: the product against float64, and when it is left to torch."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import prompt, tiny_model
from torch import nn

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model import linear as linear_module
from nemotron_h_hf.model.linear import MOST_ROWS, by_onednn, few_rows, num_parts, project, reads_compiled


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (64,)])
@pytest.mark.parametrize("sizes, parts", [((512, 1024), 4), ((1024, 514), 2), ((600, 516), 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_in_parts(rows, sizes, parts, bias):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias)
    x = torch.randn(*rows, sizes[0])
    with torch.no_grad():
        assert few_rows(x) and num_parts(x, layer.weight) == parts
        got = project(layer, x)
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert got.is_contiguous() and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


def test_rows_of_a_larger_matrix_and_a_transposed_input():
    """The weights of a nested model are views into its parent's."""
    whole = torch.randn(2048, 1024)
    layer = nn.Linear(512, 1024, bias=False)
    layer.weight = nn.Parameter(whole[:1024, :512])
    x = torch.randn(512, 7).T
    with torch.no_grad():
        assert num_parts(x, layer.weight) == 4
        torch.testing.assert_close(
            project(layer, x).double(), x.double() @ whole[:1024, :512].double().T, rtol=0, atol=1e-4
        )


def test_what_is_left_to_torch():
    layer, odd, small = nn.Linear(1024, 512), nn.Linear(1024, 513), nn.Linear(64, 64)
    x = torch.randn(1, 1024)
    assert not few_rows(x)  # gradients
    with torch.no_grad():
        assert few_rows(x) and num_parts(x, layer.weight) == 4
        assert few_rows(torch.randn(MOST_ROWS, 1024)) and not few_rows(torch.randn(MOST_ROWS + 1, 1024))
        assert not few_rows(x[:0]) and project(layer, x[:0]).shape == (0, 512)
        assert num_parts(x, odd.weight) == 1 and num_parts(x[:, :64], small.weight) == 1
        assert num_parts(x.bfloat16(), layer.bfloat16().weight) == 1
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert not few_rows(x) and project(layer, x).dtype == torch.bfloat16
        torch.set_num_threads(1)
        assert num_parts(x, layer.weight) == 1


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "parts"])
def test_a_model_computes_the_same(monkeypatch, way):
    if way == "compiled":
        product = pytest.importorskip("nemotron_h_hf.model.numba_run").product
    else:
        product = linear_module.product_in_parts
        monkeypatch.setattr(linear_module, "product_in_parts", lambda *args: calls.append(1) or product(*args))
    monkeypatch.setattr(linear_module, "FEWEST_WEIGHTS", 1)
    model, ids, calls = tiny_model("dense"), prompt(2, 20), []
    if way == "compiled":
        loops = SimpleNamespace(product=lambda *args: calls.append(1) or product(*args))
        monkeypatch.setattr(linear_module, "compiled_loops", lambda: loops)
    else:
        monkeypatch.setattr(linear_module, "compiled_loops", lambda: None)
    faster = model(ids).logits
    assert len(calls) >= 10
    monkeypatch.setattr(linear_module, "MOST_ROWS", 0)
    calls.clear()
    torch.testing.assert_close(model(ids).logits, faster, rtol=0, atol=2e-5)
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 5), (64,)])
@pytest.mark.parametrize("sizes", [(512, 256), (1024, 67), (131, 514)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_compiled_product(rows, sizes, dtype, bias):
    """Rows of a larger matrix, as nested models have them; errors in units of the sum of what is added up."""
    product = pytest.importorskip("nemotron_h_hf.model.numba_run").product
    torch.manual_seed(0)
    x, added = torch.randn(*rows, sizes[0]).to(dtype), torch.randn(sizes[1]).to(dtype) if bias else None
    weight = torch.randn(sizes[1], sizes[0] + 3).to(dtype)[:, : sizes[0]]
    got, exact = product(x, weight, added), nn.functional.linear(*(t.double() for t in (x, weight)))
    exact, sums = exact + added.double() if bias else exact, x.double().abs() @ weight.double().abs().T
    assert got.dtype == dtype and got.shape == exact.shape
    rounding = 1e-6 * sums if dtype == torch.float32 else 2**-8 * exact.abs() + 1e-6 * sums
    assert ((got.double() - exact).abs() <= rounding).all()


def test_what_the_compiled_product_leaves(monkeypatch):
    pytest.importorskip("numba")
    layer, x = nn.Linear(1024, 512).requires_grad_(False), torch.randn(2, 1024)
    with torch.no_grad():
        assert reads_compiled(x, layer.weight)
        assert not reads_compiled(x.double(), layer.weight)
        assert not reads_compiled(x, layer.weight.T)  # rows that are not contiguous
        assert not reads_compiled(x, layer.weight[:60])
        batched = torch.func.vmap(lambda row: project(layer, row[None]))(x)
        torch.testing.assert_close(batched[:, 0], nn.functional.linear(x, layer.weight, layer.bias))
        traced = torch.jit.trace(lambda rows: project(layer, rows), x)
        assert traced(torch.zeros_like(x)).equal(layer.bias.expand(2, -1))
        weight, small = layer.weight.bfloat16(), torch.randn(MOST_ROWS, 1024).bfloat16()
        for units, most in ((False, MOST_ROWS), (True, 1), (True, 8)):
            monkeypatch.setattr(linear_module, "multiplies_bf16", lambda units=units: units)
            monkeypatch.setattr(linear_module.compiled_loops(), "MOST_BF16_ROWS", most)
            assert reads_compiled(small[:most], weight)
            assert most == MOST_ROWS or not reads_compiled(small[: most + 1], weight)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("sizes", [(1, 3), (31, 5), (128, 8), (300, 7), (1025, 64)])
def test_few_rows_of_bf16_weights(rows, sizes):
    """One row and two as exactly as fp32, more as with inputs rounded to bf16."""
    product = pytest.importorskip("nemotron_h_hf.model.numba_run").product
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, sizes[0]) * torch.exp(2 * torch.randn(rows, 1)), torch.randn(*sizes[::-1]).bfloat16()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((product(x, weight, None) - exact).abs() <= (2**-17 if rows <= 2 else 2**-8) * size).all()


@pytest.mark.slow
def test_bf16_weights_without_the_instruction():
    """A processor without it is told by the features that Numba compiles for."""
    pytest.importorskip("numba")
    code = """if True:
        import torch
        from nemotron_h_hf.model import numba_dot, numba_run
        assert not numba_dot.HAS_DOT
        x, weight = torch.randn(3, 300), torch.randn(70, 300).bfloat16()
        for m in (1, 2, 3):
            torch.testing.assert_close(numba_run.product(x[:m], weight, None), x[:m] @ weight.float().T, atol=1e-4, rtol=1e-4)
    """
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_CPU_NAME": "generic"})


@torch.no_grad()
def test_an_exported_layer_takes_any_number_of_rows():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1024, 512)

        def forward(self, x):
            return project(self.linear, x)

    layer, rows = Projected(), torch.export.Dim("rows", min=1, max=4 * MOST_ROWS)
    program = torch.export.export(layer, (torch.randn(3, 1024),), dynamic_shapes=({0: rows},), strict=False)
    x = torch.randn(2 * MOST_ROWS, 1024)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.fixture
def no_bf16_units(monkeypatch):
    monkeypatch.setattr(linear_module, "multiplies_bf16", lambda: False)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("kind", ["plain", "hooked", "adapter"])
def test_many_rows_of_bf16_are_multiplied_in_fp32(no_bf16_units, monkeypatch, bias, block, kind):
    """Every sum is rounded once: half a unit in the last place of bf16, where PyTorch's own may round partial sums."""
    monkeypatch.setattr(linear_module, "BLOCK_WEIGHTS", block)
    calls, product = [], linear_module.product_in_fp32
    monkeypatch.setattr(linear_module, "product_in_fp32", lambda *args: calls.append(1) or product(*args))
    torch.manual_seed(0)
    linear, x, seen = nn.Linear(48, 31, bias=bias, dtype=torch.bfloat16), torch.randn(2, 70, 48).bfloat16(), []
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    if kind == "hooked":
        linear.register_forward_hook(lambda module, args, output: seen.append(output))
    module = Adapted(linear) if kind == "adapter" else linear
    got = project(module, x)
    assert calls and got.dtype == torch.bfloat16 and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert len(seen) == (kind == "hooked")


class Adapted(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x)


@torch.no_grad()
def test_a_bf16_model_without_units_is_as_exact_as_with(no_bf16_units, monkeypatch):
    """Logits of many rows and of single tokens, next to those of the same weights in float64."""
    model, ids = tiny_model("dense").bfloat16(), prompt(4, 40)
    exact = copy.deepcopy(model).double()(ids).logits

    def error() -> float:
        cache = HybridCache(model.config)
        parts = [model(ids[:, :36], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(36, 40)]
        logits = torch.cat(parts, dim=1)
        assert logits.dtype == torch.bfloat16
        return float((logits.double() - exact).square().mean().sqrt())

    in_fp32 = error()
    monkeypatch.setattr(linear_module, "multiplies_bf16", lambda: True)
    assert in_fp32 <= 1.05 * error()


def test_gradients_and_autocast_keep_torchs_products(no_bf16_units, monkeypatch):
    monkeypatch.setattr(linear_module, "product_in_fp32", None)
    linear, x = nn.Linear(48, 31, dtype=torch.bfloat16), torch.randn(70, 48).bfloat16()
    project(linear, x).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert project(linear.float(), x.float()).dtype == torch.bfloat16


@torch.no_grad()
def test_shapes_that_do_not_fit_are_refused():
    """Memory is read by address: there is nothing else that would notice."""
    loops = pytest.importorskip("nemotron_h_hf.model.numba_run")
    with pytest.raises(ValueError, match="does not multiply"):
        loops.product(torch.randn(1, 1024), torch.randn(512, 1023), None)


MANY = [(1, 300), (2, 65), (129,)]


@pytest.mark.parametrize("shape", MANY)
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_by_onednn(monkeypatch, shape, bias):
    """Values and gradients, first and second, against float64; inputs of any strides."""
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: torch.backends.mkldnn.is_available())
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1100, bias=bias)
    whole = torch.randn(*shape, 2048)
    for x in (whole[..., 1024:], whole[..., :1].expand(*shape, 1024)):
        x = x.detach().requires_grad_()
        assert by_onednn(x, layer.weight)
        wide_layer, wide_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
        got, expected = project(layer, x), wide_layer(wide_x)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
        grad = torch.randn_like(got)
        first = torch.autograd.grad(got, (x, *layer.parameters()), grad, create_graph=True)
        wanted = torch.autograd.grad(expected, (wide_x, *wide_layer.parameters()), grad.double(), create_graph=True)
        for mine, theirs in zip(first, wanted):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-4)
        (second,) = torch.autograd.grad(first[0].square().sum(), layer.weight)
        (theirs,) = torch.autograd.grad(wanted[0].square().sum(), wide_layer.weight)
        torch.testing.assert_close(second.double(), theirs, rtol=1e-5, atol=1e-4)


def test_what_is_left_to_mkl(monkeypatch):
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: torch.backends.mkldnn.is_available())
    layer, x = nn.Linear(1024, 1024), torch.randn(100, 1024)
    assert by_onednn(x, layer.weight)
    assert not by_onednn(x[:MOST_ROWS], layer.weight)  # few rows
    assert not by_onednn(x[:, :512], nn.Linear(512, 512).weight)  # few weights
    assert not by_onednn(x, torch.randn(1100, 1200)[:1024, :1024])  # a part of a larger weight, as budgets read theirs
    assert not by_onednn(x.double(), layer.double().weight)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, layer.weight) and project(layer, x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(x, layer.weight)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    project(layer, x)
    assert calls
    gradient = torch.func.grad(lambda x: project(layer, x).square().sum())(x)
    assert gradient.shape == x.shape
