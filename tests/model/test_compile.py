"""torch.compile and torch.export: one graph for every decode step, the same tokens, an exported forward."""

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import CompileConfig

from nemotron_h_hf import HybridCache

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decode_is_one_graph_for_all_steps(shape, backend):
    model, ids = tiny_model(shape), prompt(2, 20)
    expected = model(ids, use_cache=False).logits
    cache = HybridCache(model.config, max_cache_len=32)
    model(ids[:, :8], past_key_values=cache)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward if backend == "eager" else torch._inductor.compile(graph, inputs)

    step = torch.compile(model.forward, fullgraph=True, backend=count)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(8, 20):
            masks = model.create_masks_for_generate(model.config, torch.empty(2, 1, 0), torch.ones(2, t + 1), cache)
            out = step(ids[:, t : t + 1].contiguous(), attention_mask=masks, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], expected[:, t], rtol=0, atol=2e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_compiled_generation_is_greedy(shape):
    model, ids = tiny_model(shape), prompt(2, 9)
    how = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    padded = torch.nn.functional.pad(ids, (3, 0))
    for compile_config in (
        CompileConfig(backend="eager", fullgraph=True),
        CompileConfig(backend="inductor", fullgraph=True),
    ):
        compile_config._compile_all_devices = True  # transformers compiles on accelerators alone
        for given, mask in ((ids, None), (padded, (padded != 0).long())):
            out = model.generate(
                given, attention_mask=mask, cache_implementation="static", compile_config=compile_config, **how
            )
            assert torch.equal(out[:, given.shape[1] :], expected[:, 9:])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_compilations_do_not_grow_with_lengths_batches_and_padding(shape):
    """One row, several rows, one length of cache, any length of cache: never more graphs than that."""
    model, graphs = tiny_model(shape), []
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    how = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    calls = [(2, 9, 0), (2, 100, 0), (1, 9, 0), (3, 9, 0)]  # rows, tokens, padding: each may bring a graph
    calls += [(2, 12, 0), (2, 150, 3), (4, 31, 5), (5, 300, 0), (1, 200, 2), (2, 9, 1)]
    for rows, length, padding in calls:
        ids = prompt(rows, length, seed=length)
        given = torch.nn.functional.pad(ids, (padding, 0))
        free = model.generate(ids, eos_token_id=None, **how)[:, length:]
        stop = int(free[0, 2])  # the first row stops early, the others continue or stop as well
        expected = model.generate(ids, eos_token_id=stop, **how)[:, length:]
        static = {"cache_implementation": "static", "compile_config": compile_config, "eos_token_id": stop}
        out = model.generate(given, attention_mask=(given != 0).long(), **static, **how)
        assert torch.equal(out[:, length + padding :], expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and graphs[3] <= 4 and graphs[-1] == graphs[3]


def test_compiled_forward_and_backward():
    model, ids = tiny_model().train(), prompt(2, 16)
    with torch.enable_grad():
        expected = model(ids, labels=ids).loss
        compiled = torch.compile(model, backend="aot_eager")(ids, labels=ids).loss
        torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
        ours = torch.autograd.grad(compiled, list(model.parameters()))
        for mine, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters()))):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
def test_export(shape):
    model, ids = tiny_model(shape), prompt(2, 16)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    other = prompt(2, 16, seed=9)
    torch.testing.assert_close(program.module()(other, use_cache=False).logits, model(other, use_cache=False).logits)


def test_export_with_a_dynamic_batch():
    model, ids = tiny_model(), prompt(3, 16)
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes, strict=False
    )
    other = prompt(5, 16, seed=9)
    ours = program.module()(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(ours, model(other, use_cache=False).logits)
