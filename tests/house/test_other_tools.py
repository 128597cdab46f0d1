"""Inside other tools: plain layers, hooks, offloading, forks, inference mode, torch.func, quantisation by torch."""

import copy
import multiprocessing

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny import assert_close, native_twin, prompt, tiny_model
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.cache_utils import DynamicCache

from nemotron_h_hf import HybridCache

GREEDY = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
SHAPES = ["dense", "moe", "latent"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_layers_are_plain_as_in_transformers_own_class(shape):
    model = tiny_model(shape)
    native = native_twin(model)
    for kind in (nn.Linear, nn.Conv1d):
        ours, theirs = ({n for n, m in each.named_modules() if type(m) is kind} for each in (model, native))
        assert ours == theirs and len(ours) > 1
        assert not [m for m in model.modules() if isinstance(m, kind) and type(m) is not kind]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["padded", "packed", "continued"])
def test_layers_with_hooks_are_called_and_compute_the_same(shape, case):
    """The convolution as a module knows no state, padding or documents; what is around it does."""
    model, ids = tiny_model(shape), prompt(2, 21)
    given = {"use_cache": False}
    if case == "padded":
        given["attention_mask"] = torch.ones_like(ids).index_fill_(1, torch.tensor([0, 1, 9]), 0)
    if case == "packed":
        given["position_ids"] = torch.cat([torch.arange(8), torch.arange(13)])[None].expand(2, -1)

    def run():
        if case != "continued":
            return model(ids, **given).logits
        cache = HybridCache(model.config)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([9, 1, 11], dim=1)], dim=1)

    expected, called = run(), set()
    layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d)}
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    assert_close(run()[:, 2:], expected[:, 2:], 2e-5)
    assert called == set(layers)


@torch.no_grad()
def test_a_hook_on_a_layer_sees_and_changes_the_whole_prompt():
    model, ids = tiny_model(), prompt(1, 2500)
    steering, seen = torch.randn(2500, model.config.hidden_size) * 0.3, []
    model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]) or out + steering)
    without = model(ids, use_cache=False).logits
    with torch.enable_grad():
        expected = model(ids, use_cache=False).logits.detach()
    assert seen == [2500, 2500]
    assert_close(without, expected, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_generate_in_training_mode_with_checkpointing(shape):
    model, ids = tiny_model(shape), prompt(2, 9)
    expected = model.generate(ids, **GREEDY)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model.model.layers[0].gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "q_proj" in n or "in_proj" in n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_offloaded_models_generate_the_same(shape, how, tmp_path):
    model, ids = tiny_model(shape), prompt(2, 9)
    expected = model.generate(ids, **GREEDY)
    if how == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        places = {"model.embeddings": "cpu", "model.norm_f": "cpu", "lm_head": "disk"}
        places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(len(model.model.layers))}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("modes", [("i", "n"), ("n", "i"), ("i", "n", "i", "g")])
@pytest.mark.parametrize("kind", ["growing", "static", "transformers"])
def test_caches_pass_between_inference_mode_and_outside(kind, modes):
    model, ids = tiny_model(), prompt(2, 2 * len(modes) + 1)
    expected = model(ids).logits.detach()
    cache = {"growing": lambda: HybridCache(model.config), "static": lambda: HybridCache(model.config, 32),
             "transformers": DynamicCache}[kind]()  # fmt: skip
    contexts = {"i": torch.inference_mode, "n": torch.no_grad, "g": torch.enable_grad}
    for number, mode in enumerate(modes):
        part = slice(2 * number, 2 * number + 2)
        with contexts[mode]():
            logits = model(ids[:, part], past_key_values=cache).logits
        assert_close(logits.clone().detach(), expected[:, part], 2e-5)
    with torch.no_grad():
        assert_close(model(ids[:, -1:], past_key_values=cache).logits, expected[:, -1:], 2e-5)


@torch.no_grad()
def test_a_cache_recorded_in_inference_mode_is_cropped_outside():
    model, ids = tiny_model(), prompt(2, 9)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    with torch.inference_mode():
        model(ids[:, :8], past_key_values=cache)
    cache.crop(-3)
    assert_close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:], 2e-5)


def _answer(model, ids, threads, results):
    assert torch.get_num_threads() == 1 or threads is None
    results.put(model.generate(ids, **GREEDY).tolist())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_child_forked_after_decoding_lives_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, ids = tiny_model(hidden_size=64), prompt(2, 40)
        expected = model.generate(ids, **GREEDY).tolist()
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_answer, args=(model, ids, threads, results), daemon=True)
        child.start()
        try:
            assert results.get(timeout=60) == expected
        finally:
            child.join(10)
            child.kill()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_against_differences(packed):
    model, ids = tiny_model().double(), prompt(2, 21)
    model.set_attn_implementation("eager")
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None].expand(2, -1) if packed else None
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient(x):
        logits = model(inputs_embeds=x, use_cache=False, position_ids=positions).logits
        return torch.autograd.grad(logits.logsumexp(-1).sum(), x, create_graph=True)[0]

    direction, step = torch.randn_like(embeds), 1e-5
    product = torch.autograd.grad((gradient(embeds) * direction).sum(), embeds)[0]
    difference = (gradient(embeds + step * direction) - gradient(embeds - step * direction)).detach() / (2 * step)
    assert product.abs().max() > 0.1
    torch.testing.assert_close(product, difference, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_gradients_per_sample(shape):
    model, ids = tiny_model(shape), prompt(3, 21)
    model.set_attn_implementation("eager")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, row):
        return functional_call(model, weights, (row[None],), {"use_cache": False, "labels": row[None]}).loss

    if shape == "moe":
        model.set_experts_implementation("eager")
        with pytest.raises(RuntimeError, match=r"set_experts_implementation\('batched_mm'\)"):
            vmap(grad(loss), (None, 0))(weights, ids)
        model.set_experts_implementation("batched_mm")
    found = vmap(grad(loss), (None, 0))(weights, ids)
    one = grad(loss)(weights, ids[1])
    wanted = torch.autograd.grad(model(ids[1:2], labels=ids[1:2], use_cache=False).loss, list(model.parameters()))
    for name, expected in zip(weights, wanted):
        torch.testing.assert_close(found[name][1], expected, rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(one[name], expected, rtol=1e-3, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantize_dynamic_takes_every_linear():
    model, ids = tiny_model(), prompt(2, 21)
    exact, count = model(ids).logits, sum(type(m) is nn.Linear for m in model.modules())
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    done = sum(type(m) is torch.ao.nn.quantized.dynamic.Linear for m in quantised.modules())
    assert done == count > 10
    error = (quantised(ids).logits - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.2
    assert quantised.generate(ids, **GREEDY).shape == (2, 27)
