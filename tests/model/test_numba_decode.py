"""A Mamba layer's token compiled by Numba: the call against float64, models against the ops and against one pass, and when
it is left to PyTorch."""

import copy
import gc
import sys
import weakref

import pytest
import reference
import torch
from decode_step import exact_step, step_operands
from tiny import prompt, tiny_model
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model import kernels, token

pytest.importorskip("numba")

from nemotron_h_hf.model import numba_run  # noqa: E402
from nemotron_h_hf.model.numba_compile import compiled  # noqa: E402

SIZES = [(1, 8, 8, 2, 16), (3, 6, 5, 3, 7), (2, 4, 20, 1, 24), (1, 4, 1, 4, 1)]  # b, h, p, g, n


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.5)])
@pytest.mark.parametrize("k, bias", [(4, True), (2, False)])
@torch.no_grad()
def test_the_step(sizes, limit, k, bias):
    torch.manual_seed(sum(sizes))
    given = step_operands(*sizes, k=k, bias=bias)
    want = exact_step(**given, limit=limit)
    # As caches have it
    for window in (
        given["states"][0],
        given["states"][0].transpose(1, 2).contiguous().transpose(1, 2),
    ):
        states = window.clone(), given["states"][1].clone()
        out = kernels.whole_step(**{**given, "states": states}, limit=limit, implementation="auto")
        assert max(error(got, exact) for got, exact in zip((out, *states), want)) <= 2e-6


@torch.no_grad()
def test_large_inputs_overflow_nowhere():
    """exp(-x) is infinite in fp32 for x below -88: SiLU is 0 there all the same, and a long step forgets the state."""
    torch.manual_seed(0)
    given, limit = step_operands(2, 8, 8, 2, 16), (0.0, float("inf"))
    given["projected"] *= 300
    want = exact_step(**given, limit=limit)
    out = kernels.whole_step(**given, limit=limit, implementation="auto")
    assert max(error(got, exact) for got, exact in zip((out, *given["states"]), want)) <= 2e-6


@torch.no_grad()
def test_many_steps_of_one_layer_do_not_drift():
    torch.manual_seed(0)
    given, limit = step_operands(2, 8, 8, 2, 16), (0.0, 0.1)
    exact = {**given, "states": tuple(t.double() for t in given["states"])}
    for _ in range(300):
        projected = torch.randn_like(given["projected"])
        out = kernels.whole_step(**{**given, "projected": projected}, limit=limit, implementation="auto")
        want, *states = exact_step(**{**exact, "projected": projected}, limit=limit)
        exact["states"] = tuple(states)
        assert error(out, want) <= 5e-6


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row_and_group(bad):
    given = step_operands(2, 4, 8, 2, 16)
    given["projected"][0, 4 * 8 + 3] = bad  # an x of the first group
    out = kernels.whole_step(**given, limit=(0.0, float("inf")), implementation="auto")
    finite = out.isfinite().view(2, 2, 16)
    assert not finite[0, 0].any() and finite[0, 1].all() and finite[1].all()


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """One entry for each call."""
    calls, step_of = [], numba_run.step_of
    monkeypatch.setattr(numba_run, "step_of", lambda *args: calls.append(1) or step_of(*args))
    return calls


def decode(model: nn.Module, ids: Tensor, implementation: str, prefill: int = 11, cache=None, **kwargs) -> Tensor:
    """Logits of a prefill and of single tokens."""
    model.set_mamba_implementation(implementation)
    cache = HybridCache(model.config) if cache is None else cache
    parts = [model(ids[:, :prefill], past_key_values=cache, **kwargs).logits]
    parts += [model(token, past_key_values=cache, **kwargs).logits for token in ids[:, prefill:].split(1, dim=1)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["dense", "square", "list", "attention_free", "moe", "latent"])
def test_decoding(shape, fused):
    model, ids = tiny_model(shape), prompt(3, 24)
    got = decode(model, ids, "auto")
    assert len(fused) == 13 * model.config.layers_block_type.count("linear_attention")
    want = reference.reference_logits(model.state_dict(), model.config, ids[0])
    assert (got[0] - want).abs().max() <= 1e-5
    fused.clear()
    exact = decode(copy.deepcopy(model).double(), ids, "torch")
    for logits in (got, decode(model, ids, "torch")):
        assert (logits - exact).abs().max() <= 1e-5
    assert not fused


@torch.no_grad()
def test_padding_on_the_left(fused):
    model, ids, mask = tiny_model(), prompt(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    together, alone = (
        model.generate(x, attention_mask=m, max_new_tokens=8, do_sample=False)
        for x, m in ((ids, mask), (ids[1:, 5:], mask[1:, 5:]))
    )
    assert torch.equal(together[1, 5:], alone[0])
    assert fused


@torch.no_grad()
def test_a_static_cache_and_a_fork(fused):
    model, ids = tiny_model(), prompt(2, 20)
    want = decode(model, ids, "torch")
    assert (decode(model, ids, "auto", cache=HybridCache(model.config, max_cache_len=32)) - want).abs().max() <= 1e-5
    cache = HybridCache(model.config)
    decode(model, ids[:, :15], "auto", cache=cache)
    for branch in (cache.fork(), cache.fork(), cache):  # none writes into another's states
        assert (decode(model, ids[:, 15:], "auto", 1, branch)[:, -1] - want[:, -1]).abs().max() <= 1e-5
    assert fused


@torch.no_grad()
def test_recorded_tokens_go_op_by_op_and_on_from_there(fused):
    model, ids = tiny_model(), prompt(1, 20)
    want, cache = decode(model, ids, "torch"), HybridCache(model.config)
    cache.activate_past_recording()
    decode(model, ids, "auto", cache=cache)
    assert not fused
    cache.crop(-4)
    cache.fork()
    got = decode(model, ids[:, 16:], "auto", prefill=1, cache=cache)
    assert (got - want[:, 16:]).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["float64", "hook", "other norm", "torch"])
def test_left_to_pytorch(case, fused):
    model, ids = tiny_model(), prompt(1, 14)
    if case == "float64":
        model.double()
    for layer in (block.mixer for block in model.model.layers if block.block_type == "linear_attention"):
        if case == "hook":
            layer.norm.register_forward_hook(lambda module, args, output: output * 2)
        elif case == "other norm":
            layer.norm = nn.Module()
            layer.norm.forward = lambda x, gate, implementation: x * gate
    got = decode(model, ids, "torch" if case == "torch" else "auto")
    assert not fused
    assert (got - decode(model, ids, "torch")).abs().max() <= 1e-5


def test_gradients_and_compiled_steps_are_pytorchs(fused):
    model, ids = tiny_model(), prompt(1, 14)
    decode(model, ids, "auto")[:, -1].sum().backward()
    assert not fused and model.model.layers[0].mixer.A_log.grad.abs().sum() > 0
    with torch.no_grad():
        want = decode(model, ids, "torch")
        compiled_model = copy.deepcopy(model)
        compiled_model.forward = torch.compile(compiled_model.forward, backend="eager")
        got = decode(compiled_model, ids, "auto", cache=HybridCache(model.config, max_cache_len=32))
    assert not fused
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_numba(monkeypatch, fused):
    model, ids = tiny_model(), prompt(1, 14)
    want = decode(model, ids, "torch")
    for name in [name for name in sys.modules if name.startswith("nemotron_h_hf.model.numba_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    for loops in (kernels.compiled_loops, kernels.compiled_scan):
        loops.cache_clear()
    try:
        assert torch.equal(decode(model, ids, "auto"), want)
    finally:
        for loops in (kernels.compiled_loops, kernels.compiled_scan):
            loops.cache_clear()
    assert not fused


def test_where_nothing_can_be_kept():
    """Code that is in no file has no place for its cache, like a package in folders that cannot be written to."""
    scope = {}
    exec("def double(x):\n    for i in range(len(x)):\n        x[i] *= 2", scope)
    values = torch.arange(3.0)
    compiled(scope["double"])(values.numpy())
    assert values.tolist() == [0, 2, 4]


def reference_error(got: Tensor, model: nn.Module, ids: Tensor) -> float:
    want = torch.stack([reference.reference_logits(model.state_dict(), model.config, row) for row in ids])
    return float((got - want).abs().max())


@pytest.fixture
def operations(monkeypatch) -> list[int]:
    """How many operations each compiled call ran."""
    counts, run = [], numba_run.run
    monkeypatch.setattr(numba_run, "run", lambda rows: counts.append(len(rows)) or run(rows))
    return counts


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("shape", ["dense", "square", "list", "attention_free"])
def test_a_token_of_all_blocks_is_one_call(shape, rows, operations):
    model, ids = tiny_model(shape), prompt(rows, 24)
    got = decode(model, ids, "auto", prefill=3)
    each = {"linear_attention": 3, "full_attention": 5, "mlp": 2}
    assert operations == [1 + sum(each[kind] for kind in model.config.layers_block_type)] * 21  # and the last norm
    assert reference_error(got, model, ids) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "part", ["norm", "mixer", "mixer.in_proj", "mixer.up_proj", "mixer.k_proj", "mixer.act_fn", ""]
)
def test_hooks_of_a_part_run_for_every_token_and_the_rest_is_compiled(part, operations):
    model, ids, seen = tiny_model(), prompt(2, 16), []
    want, whole = decode(model, ids, "auto"), operations[0]
    operations.clear()
    blocks = [block for block in model.model.layers if part in dict(block.named_modules())][:1]
    blocks[0].get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(1))
    got = decode(model, ids, "auto")
    assert len(seen) == 6 and 0 < max(operations) < whole
    assert (got - want).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("part", ["norm", "mixer", ""])
@pytest.mark.parametrize("way", ["subclass", "class", "parametrization"])
def test_other_forwards_are_called(part, way, operations, monkeypatch):
    """A part of a class of its own, a class with another forward, weights that are computed anew in every call."""
    model, ids = tiny_model(), prompt(2, 16)
    decode(model, ids, "auto")
    whole = operations[0]
    operations.clear()
    block = next(block for block in model.model.layers if block.block_type == "linear_attention")
    module = block.get_submodule(part)
    kind, forward = type(module), type(module).forward

    def doubled(self, x, *args, **kwargs):
        return 2 * forward(self, x, *args, **kwargs)

    if way == "subclass":
        module.__class__ = type("Other", (kind,), {"forward": doubled})
    elif way == "class":
        monkeypatch.setattr(kind, "forward", doubled)
    else:
        name = {"norm": "weight", "mixer": "A_log", "": "scale"}[part]
        module.register_parameter("scale", nn.Parameter(torch.ones(1)))
        nn.utils.parametrize.register_parametrization(module, name, Halved())
    got = decode(model, ids, "auto")
    assert max(operations, default=0) < whole
    assert (got - decode(model, ids, "torch")).abs().max() <= 1e-5


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 64])
def test_a_sliding_window(window, operations):
    model, ids = tiny_model(), prompt(2, 24)
    for block in model.model.layers:
        if block.block_type == "full_attention":
            block.mixer.sliding_window = window
    got = decode(model, ids, "auto")
    assert operations
    assert (got - decode(model, ids, "torch")).abs().max() <= 1e-5


@torch.no_grad()
def test_bf16_is_as_exact_as_pytorchs(operations):
    """Next to the same weights in float64: between the parts of a block values are fp32 here."""
    model, ids = tiny_model().bfloat16(), prompt(1, 40)
    exact = copy.deepcopy(model).double()(ids).logits
    errors = {}
    for implementation in ("auto", "torch"):
        logits = decode(model, ids, implementation)
        assert logits.dtype == torch.bfloat16
        errors[implementation] = float((logits.double() - exact)[:, 11:].square().mean().sqrt())
    assert len(operations) == 29 and errors["auto"] <= 1.05 * errors["torch"]


@torch.no_grad()
def test_caches_whose_rows_change_between_tokens(operations):
    model, ids = tiny_model(), prompt(3, 20)
    want, cache = decode(model, ids, "torch"), HybridCache(model.config)
    decode(model, ids[:, :12], "auto", cache=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    chosen = ids[[2, 0]]
    got = decode(model, chosen[:, 12:16], "auto", 1, cache)
    cache.keep([1])
    got = torch.cat([got[1:], decode(model, chosen[1:, 16:], "auto", 1, cache)], dim=1)
    assert operations and (got[0] - want[0, 12:]).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["bfloat16", "float64", "meta"])
def test_defaults_that_a_program_sets_for_new_tensors(case, operations, monkeypatch):
    """Machine code writes fp32 to a CPU's memory, whatever `torch.empty` would make."""
    model, ids = tiny_model(), prompt(2, 14)
    want, dtype = decode(model, ids, "torch"), torch.get_default_dtype()
    try:
        if case != "meta":
            torch.set_default_dtype(getattr(torch, case))
        with torch.device("meta" if case == "meta" else "cpu"):
            got = decode(model, ids, "auto")
    finally:
        torch.set_default_dtype(dtype)
    assert operations and (got - want).abs().max() <= 1e-5


@torch.no_grad()
def test_hidden_states_of_every_block_can_be_asked_for(operations):
    model, ids = tiny_model(), prompt(1, 13)
    cache = HybridCache(model.config)
    model(ids[:, :12], past_key_values=cache)
    operations.clear()
    found = model(ids[:, 12:], past_key_values=cache, output_hidden_states=True).hidden_states
    want = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(found) == len(want) and max(operations) == 1  # every block as a module
    assert all((one[:, -1] - other[:, -1]).abs().max() <= 1e-5 for one, other in zip(found, want))


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_in_a_token(bad):
    model, ids = tiny_model(), prompt(2, 12)
    cache = HybridCache(model.config)
    model(ids[:, :11], past_key_values=cache)
    for layer in cache.layers:
        if layer.__class__.__name__ == "GrowingLayer":
            layer.keys[0, 0, 3, 0] = bad
    logits = model(ids[:, 11:], past_key_values=cache).logits
    assert not logits[0].isfinite().any() and logits[1].isfinite().all()


CHANGES = {
    "weights in place": lambda m, block: block.mixer.out_proj.weight.mul_(1.5),
    "data": lambda m, block: setattr(block.mixer.in_proj.weight, "data", block.mixer.in_proj.weight * 1.5),
    "a parameter": lambda m, block: setattr(block.mixer.in_proj, "weight", nn.Parameter(block.mixer.in_proj.weight * 1.5)),
    "assigned": lambda m, block: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "a module": lambda m, block: setattr(block.mixer, "out_proj", like(block.mixer.out_proj)),
    "a bias": lambda m, block: setattr(block.mixer.out_proj, "bias", nn.Parameter(torch.ones(m.config.hidden_size))),
    "the mixer": lambda m, block: setattr(block, "mixer", doubled(block.mixer, block.mixer.D)),
    "norm in place": lambda m, block: block.norm.weight.mul_(1.5),
    "norm": lambda m, block: setattr(block.norm, "weight", nn.Parameter(block.norm.weight * 1.5)),
    "epsilon": lambda m, block: setattr(block.norm, "variance_epsilon", 1.0),
    "gated norm": lambda m, block: setattr(block.mixer.norm, "variance_epsilon", 1.0),
    "A_log": lambda m, block: setattr(block.mixer, "A_log", nn.Parameter(block.mixer.A_log + 1)),
    "D": lambda m, block: setattr(block.mixer.D, "data", block.mixer.D + 1),
    "convolution": lambda m, block: setattr(block.mixer, "conv1d", like(block.mixer.conv1d)),
    "limits": lambda m, block: setattr(block.mixer, "time_step_limit", (0.5, 0.6)),
    "a block": lambda m, block: m.model.layers.__setitem__(list(m.model.layers).index(block), doubled(block, block.norm.weight)),
    "a hook": lambda m, block: block.mixer.out_proj.register_forward_hook(lambda module, args, out: out * 2),
    "hooks replaced": lambda m, block: setattr(block.norm, "_forward_hooks", {0: lambda module, args, out: out * 2}),
    "a hook before": lambda m, block: block.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "forward": lambda m, block: setattr(block.norm, "forward", lambda x: x * 2),
    "an activation": lambda m, block: [setattr(b.mixer, "act_fn", nn.GELU()) for b in m.model.layers if b.block_type == "mlp"],
    "attention": lambda m, block: [b.mixer.k_proj.weight.mul_(3) for b in m.model.layers if b.block_type == "full_attention"],
    "a scale": lambda m, block: [setattr(b.mixer, "scaling", 1.0) for b in m.model.layers if b.block_type == "full_attention"],
    "window": lambda m, block: [setattr(b.mixer, "sliding_window", 2) for b in m.model.layers if b.block_type == "full_attention"],
    "pruned": lambda m, block: random_unstructured(block.mixer.in_proj, "weight", 0.5),
    "parametrized": lambda m, block: nn.utils.parametrize.register_parametrization(block.mixer.in_proj, "weight", Halved()),
    "there and back": lambda m, block: m.to(torch.bfloat16).float(),
    "transposed": lambda m, block: setattr(block.mixer.in_proj.weight, "data", block.mixer.in_proj.weight.T.contiguous().T),
    "every second": lambda m, block: setattr(block.mixer.D, "data", block.mixer.D.repeat_interleave(2)[::2] * 2),
    "every second of a norm": lambda m, block: setattr(block.norm.weight, "data", spread(block.norm.weight)),
    "every second of the last norm": lambda m, block: setattr(m.model.norm_f.weight, "data", spread(m.model.norm_f.weight)),
}  # fmt: skip


def spread(weight: Tensor) -> Tensor:
    """Values of its kind that do not lie one behind the other."""
    return torch.stack([2 * weight, torch.randn_like(weight)], dim=1).detach()[:, 0]


def like(module: nn.Module) -> nn.Module:
    """A copy with other weights."""
    return doubled(module, module.weight)


def doubled(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A copy with one of its weights doubled."""
    new = copy.deepcopy(module)
    next(own for own, old in zip(new.parameters(), module.parameters()) if old is weight).mul_(2)
    return new


@torch.no_grad()
@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_between_tokens_is_seen(case, operations):
    model, ids = tiny_model(), prompt(2, 16)
    cache = HybridCache(model.config)
    decode(model, ids[:, :14], "auto", cache=cache)
    before = copy.deepcopy(cache)
    block = next(block for block in model.model.layers if block.block_type == "linear_attention")
    CHANGES[case](model, block)
    got = decode(model, ids[:, 14:], "auto", 1, cache)
    want = decode(model, ids[:, 14:], "torch", 1, copy.deepcopy(before))
    assert operations and (got - want).abs().max() <= 1e-5
    if case not in ("there and back", "transposed"):
        unchanged = decode(tiny_model(), ids[:, 14:], "torch", 1, before)
        assert (unchanged - want).abs().max() > 1e-3  # the change is one


@torch.no_grad()
def test_a_model_that_is_gone_leaves_no_plans():
    model, ids = tiny_model(), prompt(1, 13)
    decode(model, ids, "auto")
    mixer = model.model.layers[0].mixer
    layers, weight = [weakref.ref(block) for block in model.model.layers], weakref.ref(mixer.in_proj.weight)
    assert any(token._plans.get(block()) for block in layers)
    mixer.in_proj = copy.deepcopy(mixer.in_proj)  # nor does a weight that was replaced live on, before the next token
    gc.collect()
    assert weight() is None
    del model, mixer
    gc.collect()
    assert not any(block() for block in layers)


@torch.no_grad()
def test_weights_by_functional_call_are_seen():
    model, ids = tiny_model(), prompt(1, 14)
    cache = HybridCache(model.config)
    decode(model, ids[:, :13], "auto", cache=cache)
    other = {name: value * 1.1 for name, value in model.state_dict().items()}
    got = torch.func.functional_call(model, other, (ids[:, 13:],), {"past_key_values": cache.fork()}).logits
    model.load_state_dict(other)
    model.set_mamba_implementation("torch")
    assert (got - model(ids[:, 13:], past_key_values=cache).logits).abs().max() <= 1e-5
