"""Decoding on a GPU: attention of one token against float64, and replayed steps against ordinary ones.

With Triton's interpreter (`make test-kernels`) the kernels run on CPU tensors and a "graph" is the recorded step itself, called
again; on a GPU (`make test-gpu`) it is a CUDA graph.
"""

import importlib.util
import os

import pytest
import torch
from tiny import prompt, tiny_model
from torch import Tensor, nn

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model import decode_graph
from nemotron_h_hf.model.decode_graph import DecodeGraph, can_replay

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS = importlib.util.find_spec("triton") is not None and (INTERPRETED or DEVICE == "cuda")
needs_triton = pytest.mark.skipif(not RUNS, reason="needs Triton, on a GPU or interpreted: `make test-kernels`")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def naive(query: Tensor, keys: Tensor, values: Tensor, length: int, mask: Tensor | None, scaling: float) -> Tensor:
    """(b, h, d) in float64, a query head at a time."""
    query, keys, values = (t.double().cpu() for t in (query, keys, values))
    out = torch.zeros(query.shape[:2] + query.shape[3:], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g = h * keys.shape[1] // query.shape[1]
            scores = keys[b, g, :length] @ query[b, h, 0] * scaling
            if mask is not None:
                scores = scores.masked_fill(~mask[b, :length].cpu(), float("-inf"))
            out[b, h] = scores.softmax(0) @ values[b, g, :length]
    return out


@pytest.mark.kernels
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "b, h, g, d, room, length, masked",
    [
        (1, 4, 1, 16, 40, 1, False), (2, 8, 2, 16, 300, 257, True), (1, 4, 4, 24, 130, 65, False), (3, 6, 2, 32, 64, 64, True),
    ],
)  # fmt: skip
def test_attention_of_one_token(b, h, g, d, room, length, masked, dtype):
    from nemotron_h_hf.model.triton_attention import decode_attention

    generator = torch.Generator().manual_seed(length)
    query = torch.randn(b, h, 1, d, generator=generator).to(DEVICE, dtype)
    memory = torch.randn(2, b, g, room, d, generator=generator).to(DEVICE, dtype)
    memory[:, :, :, length:] = float("nan")  # nothing may read past the last token
    mask = torch.rand(b, room, generator=generator).to(DEVICE) > 0.3 if masked else None
    if masked:
        mask[:, 0] = True
    wanted = naive(query, memory[0], memory[1], length, mask, d**-0.5)
    for told in (length, torch.tensor(length, device=DEVICE)):
        out = decode_attention(query, memory[0], memory[1], told, mask, d**-0.5)
        assert out.shape == (b, 1, h, d) and out.dtype == dtype
        error = (out[:, 0].double().cpu() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.kernels
@needs_triton
def test_a_row_that_sees_nothing_is_zero():
    from nemotron_h_hf.model.triton_attention import decode_attention

    x = torch.randn(1, 2, 8, 16, device=DEVICE)
    mask = torch.zeros(1, 8, dtype=torch.bool, device=DEVICE)
    assert not decode_attention(x[:, :, :1], x, x, 8, mask, 1.0).any()


@pytest.fixture
def model() -> nn.Module:
    model = tiny_model("dense").to(DEVICE)
    model.set_mamba_implementation("triton")
    return model


def decoder(model: nn.Module) -> DecodeGraph:
    """Replays of the recorded step: a CUDA graph on a GPU, the step itself in the interpreter."""
    return DecodeGraph(model.__call__) if DEVICE == "cuda" else DecodeGraph(model.__call__, record=lambda step: step)


@torch.no_grad()
def continue_greedily(
    step, model, ids: Tensor, mask: Tensor | None, cache: HybridCache, tokens: int
) -> tuple[Tensor, Tensor]:
    """(tokens, logits) after a prompt, each step through `step`."""
    out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    logits, made = out.logits[:, -1:], []
    for _ in range(tokens):
        made.append(logits.clone())
        ids = logits.argmax(-1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = step(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    made = torch.cat(made, dim=1)
    return made.argmax(-1), made


@pytest.mark.kernels
@needs_triton
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_replayed_steps_are_ordinary_steps(model, monkeypatch, padded, static):
    """Ten tokens; the room of a growing cache is used up on the way, and a new graph made."""
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 3)
    ids = torch.cat([prompt(), prompt().flip(1)]).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = int(not padded)
    room = ids.shape[1] + 12 if static else None
    wanted_ids, wanted = continue_greedily(model, model, ids, mask, HybridCache(model.config), 10)
    cache, step = HybridCache(model.config, room), decoder(model)
    made_ids, made = continue_greedily(step, model, ids, mask, cache, 10)
    assert step.replay is not None and torch.equal(made_ids, wanted_ids)
    assert (made - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert int(cache.get_seq_length()) == ids.shape[1] + 10
    after = model(ids[:, :1], past_key_values=cache).logits  # the cache continues as any other
    other = HybridCache(model.config)
    continue_greedily(model, model, ids, mask, other, 10)
    assert (after - model(ids[:, :1], past_key_values=other).logits).abs().max() <= 1e-4 * after.abs().max()


@pytest.mark.kernels
@needs_triton
def test_a_full_static_cache_is_refused(model):
    ids = prompt().to(DEVICE)
    with pytest.raises(ValueError, match="the static cache is full"):
        continue_greedily(decoder(model), model, ids, None, HybridCache(model.config, ids.shape[1] + 6), 10)


@pytest.mark.kernels
@needs_triton
def test_other_calls_run_as_ever(model):
    """Several tokens at once, a recording cache, outputs that a graph does not make."""
    ids, step = prompt().to(DEVICE), decoder(model)
    cache = HybridCache(model.config)
    with torch.no_grad():
        for _ in range(2):
            step(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        for _ in range(4):
            step(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-2)
        out = step(input_ids=ids[:, :1], past_key_values=HybridCache(model.config), output_hidden_states=True)
    assert step.replay is None and len(out.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.kernels
@needs_triton
def test_who_can_be_captured(model):
    with torch.no_grad():
        assert can_replay(model)
        handle = model.model.layers[0].register_forward_hook(lambda *_: None)
        assert not can_replay(model)  # it would miss the replays
        handle.remove()
        assert not can_replay(model.train())
        model.eval().set_mamba_implementation("torch")
        assert not can_replay(model)
    model.set_mamba_implementation("triton")
    assert not can_replay(model)  # gradients
    with torch.no_grad():
        assert not can_replay(tiny_model("moe").to(DEVICE))


def test_on_a_cpu_nothing_is_captured():
    with torch.no_grad():
        assert not can_replay(tiny_model("dense"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sample", [False, True])
def test_generate_replays_on_a_gpu(sample):
    """Plain `generate()`, the same text as without graphs; prompts of several lengths and rows."""
    model = tiny_model("dense").cuda()
    model.set_mamba_implementation("triton")
    for rows in (1, 2):
        ids = prompt().cuda().repeat(rows, 1)
        texts = []
        for disable in (True, False):
            torch.manual_seed(0)
            texts.append(
                model.generate(ids, max_new_tokens=90, do_sample=sample, disable_compile=disable, eos_token_id=None)
            )
        assert torch.equal(*texts)
