"""While a graph is traced nothing loops over the length: one graph for all prompts, and the ops of eager mode to rounding."""

import pytest
import torch
from tiny import prompt, tiny_model
from torch._dynamo.testing import CompileCounter

from nemotron_h_hf.model import ssd


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_one_graph_for_all_lengths(shape):
    torch._dynamo.reset()
    model, counter = tiny_model(shape).requires_grad_(False), CompileCounter()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=counter, dynamic=True)
    for length in (40, 57, 91, 128, 600):
        ids = prompt(1, length)
        torch.testing.assert_close(compiled(ids), model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("packed", [False, True])
def test_traced_ops_are_those_of_eager_mode(packed, monkeypatch):
    """Values and gradients in float64, with a state to start from, at lengths that fill no chunk."""
    torch.manual_seed(0)
    b, l, h, p, g, n, k = 2, 150, 4, 8, 2, 16, 4
    seq_idx = (torch.arange(l) // 37 + (torch.arange(l) > 70)).expand(b, l) if packed else None
    x, dt = torch.randn(b, l, h, p).double().requires_grad_(), torch.rand(b, l, h).double().requires_grad_()
    A, D = -torch.rand(h).double() * 4, torch.randn(h).double()
    B, C = (torch.randn(b, l, g, n).double().requires_grad_() for _ in "BC")
    state = torch.randn(b, h, p, n).double().requires_grad_()
    rows, taps, bias = (torch.randn(s).double().requires_grad_() for s in ((b, l, h * p), (h * p, k), (h * p,)))
    before = torch.randn(b, h * p, k).double().requires_grad_()
    leaves = (x, dt, B, C, state, rows, taps, bias, before)

    def run():
        y, last = ssd.scan(x, dt, A, B, C, D, 16, state, seq_idx)
        out = ssd.causal_conv(rows, taps, bias, before, seq_idx)
        loss = (y.sin().sum() + last.cos().sum()) + out.sin().sum()
        return y, last, out, *torch.autograd.grad(loss, leaves)

    eager = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for theirs, ours in zip(eager, run(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize("deferred", [False, True])
def test_an_exported_program_takes_any_length(deferred):
    model = tiny_model("dense").requires_grad_(False)
    length = torch.export.Dim("length", min=16, max=4096)
    program = torch.export.export(
        Logits(model), (prompt(1, 64),), dynamic_shapes={"input_ids": {1: length}},
        prefer_deferred_runtime_asserts_over_guards=deferred,
    )  # fmt: skip
    for tokens in (16, 33, 64, 200, 1100):
        ids = prompt(1, tokens)
        torch.testing.assert_close(program.module()(ids), model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)
