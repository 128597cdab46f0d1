"""Logits, gradients and outputs of the whole model, against the float64 recurrence and transformers' own class."""

import copy
import math

import pytest
import torch
from reference import reference_logits
from tiny import SHAPES, assert_close, native_twin, prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHModel


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours, expected, tolerance=2e-5):
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            gradient / scale, expected[name] / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Parity


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_recurrence(shape):
    model, ids = tiny_model(shape), prompt(1, 21)
    expected = reference_logits(model.state_dict(), model.config, ids[0])
    assert 1 < expected.std() < 2
    with torch.no_grad():
        assert_close(model(ids).logits[0].double(), expected)
        model.set_experts_implementation("eager")  # grouped matrix products have no float64
        assert_close(model.double()(ids).logits[0], expected, tolerance=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape):
    model, ids = tiny_model(shape), prompt(2, 37)
    native = native_twin(model)
    assert_close(model(ids).logits, native(ids, use_cache=False).logits)
    model.train(), native.train()
    loss, expected_loss = model(ids, labels=ids).loss, native(ids, labels=ids, use_cache=False).loss
    assert_close(loss, expected_loss, 2e-6)
    ours, theirs = gradients(model, loss), gradients(native, expected_loss)
    for name in list(theirs):
        theirs[name] = theirs[name][tuple(slice(0, size) for size in ours[name].shape)]
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("bias", ["use_bias", "mlp_bias", "attention_bias"])
@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_bias_flags(shape, bias):
    model, ids = tiny_model(shape, **{bias: True}), prompt(1, 13)
    names = [
        name for name in model.state_dict() if name.endswith("bias") and "conv1d" not in name and "dt_bias" not in name
    ]
    assert len(names) > names.count("e_score_correction_bias") and names
    expected = reference_logits(model.state_dict(), model.config, ids[0])
    assert_close(model(ids).logits[0].double(), expected)
    plain = (
        reference_logits({k: v for k, v in model.state_dict().items() if k not in names}, model.config, ids[0])
        if shape == "dense"
        else 0
    )
    assert (expected - plain).abs().max() > 0.1


def test_without_conv_bias():
    model, ids = tiny_model(use_conv_bias=False), prompt(1, 13)
    assert not any(name.endswith("conv1d.bias") for name in model.state_dict())
    assert_close(model(ids).logits[0].double(), reference_logits(model.state_dict(), model.config, ids[0]))


@pytest.mark.parametrize("limit", [(0.01, 0.3), (0.0, 0.05), None])
def test_time_step_limit_in_prefill_decode_and_training(limit):
    model, ids = tiny_model(time_step_limit=limit), prompt(1, 15)
    expected = reference_logits(model.state_dict(), model.config, ids[0])
    if limit:
        unlimited = tiny_model()
        assert (reference_logits(unlimited.state_dict(), unlimited.config, ids[0]) - expected).abs().max() > 1e-2
    assert_close(model(ids).logits[0].double(), expected)
    out, rows = model(ids[:, :4], use_cache=True), []
    for t in range(4, 15):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        rows.append(out.logits[0])
    assert_close(torch.cat(rows).double(), expected[4:])
    assert_close(model.train()(ids).logits[0].double(), expected)


def test_small_steps_prefill_equals_decode():
    model, ids = tiny_model(), prompt(1, 30)
    with torch.no_grad():
        for block in model.model.layers:
            if block.block_type == "linear_attention":
                block.mixer.dt_bias.fill_(-9.0)
                block.mixer.in_proj.weight[-8:] = 0
        full, out, rows = model(ids).logits, None, []
        for t in range(30):
            out = model(ids[:, t : t + 1], past_key_values=None if out is None else out.past_key_values, use_cache=True)
            rows.append(out.logits)
    assert_close(torch.cat(rows, dim=1), full)


@torch.no_grad()  # FlexAttention has no backward pass on a CPU
@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations(implementation):
    model, ids = tiny_model(), prompt(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
    # torch 2.13 compiles it wrongly on a CPU once lengths vary ('cur_kvSplitSize0')
    if implementation == "flex_attention":
        return
    out = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    rest = model(ids[:, 9:], attention_mask=mask, past_key_values=out.past_key_values)
    assert_close(torch.cat([out.logits, rest.logits], dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_long_input_runs_in_parts(padded, with_cache, monkeypatch):
    ids, mask = prompt(2, 1500), torch.ones(2, 1500, dtype=torch.long)
    if padded:
        mask[0, :300], mask[1, 700:1100] = 0, 0
    model = tiny_model()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=with_cache)
        monkeypatch.setattr(NemotronHModel, "tokens_per_pass", {"cpu": 1200})
        calls, run = [], NemotronHModel._run
        monkeypatch.setattr(
            NemotronHModel, "_run", lambda self, x, *args: calls.append(x.shape[1]) or run(self, x, *args)
        )
        parts = model(ids, attention_mask=mask, use_cache=with_cache)
        assert calls == [600, 600, 300]
        assert_close(parts.logits[mask.bool()], whole.logits[mask.bool()], 5e-5)
        assert (parts.past_key_values is not None) == with_cache
        if with_cache:
            more, mask = prompt(2, 5, seed=3), torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
            a, b = (
                model(more, attention_mask=mask, past_key_values=out.past_key_values).logits for out in (whole, parts)
            )
            assert_close(a, b, 5e-5)


# Outputs


def test_logits_to_keep():
    model, ids = tiny_model(), prompt(2, 11)
    full = model(ids).logits
    assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4, 10])).logits, full[:, [0, 4, 10]])


def test_inputs_embeds():
    model, ids = tiny_model(), prompt(2, 11)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, 0)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_hidden_states_attentions_and_router_logits(shape):
    model, ids = tiny_model(shape), prompt(2, 11)
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=shape == "moe")
    native = native_twin(model)
    native.set_attn_implementation("eager")
    theirs = native(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert len(out.hidden_states) == len(theirs.hidden_states)
    for ours, native_states in zip(out.hidden_states, theirs.hidden_states):
        assert_close(ours, native_states)
    (attention,) = out.attentions
    assert attention.shape == (2, 4, 11, 11)
    assert_close(attention.sum(-1), torch.ones(2, 4, 11))
    assert_close(attention, theirs.attentions[0])
    if shape == "moe":
        assert len(out.router_logits) == 2 and out.router_logits[0].shape == (22, 8)
        normed = model.model.layers[1].norm(out.hidden_states[1]).flatten(0, 1)
        assert_close(out.router_logits[0], normed @ model.model.layers[1].mixer.gate.weight.T)


def test_aux_loss_leaves_padding_out():
    model, ids = tiny_model("moe", router_aux_loss_coef=0.5), prompt(1, 11)
    alone = model(ids, labels=ids, output_router_logits=True).aux_loss
    padded, mask = torch.nn.functional.pad(ids, (4, 3)), torch.nn.functional.pad(torch.ones_like(ids), (4, 3))
    assert_close(model(padded, attention_mask=mask, labels=padded, output_router_logits=True).aux_loss, alone)


def test_aux_loss_is_added_to_the_loss():
    model, ids = tiny_model("moe", router_aux_loss_coef=0.5), prompt(2, 11)
    out = model(ids, labels=ids, output_router_logits=True)
    assert out.aux_loss.ndim == 0 and out.aux_loss > 0
    assert_close(out.loss, model(ids, labels=ids).loss + 0.5 * out.aux_loss)
    by_hand = []
    for logits in out.router_logits:
        scores = logits.sigmoid()
        share = torch.zeros(8)
        for row in scores:
            share[row.topk(3).indices] += 1 / (3 * len(scores))
        by_hand.append(8 * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())
    assert_close(out.aux_loss, sum(by_hand) / 2)
    out.loss.backward()
    assert model.model.layers[1].mixer.gate.weight.grad.abs().sum() > 0
    assert model.config.output_router_logits is False


def test_aux_loss_counts_once_over_an_accumulated_batch():
    """Two unequal parts with their common number of items: the means weighted by the items, not their sum."""
    model, ids = tiny_model("moe", router_aux_loss_coef=0.5), prompt(2, 11)
    labels = ids.clone()
    labels[1, 4:] = -100
    parts = []
    for row in range(2):
        batch = {"labels": labels[row : row + 1], "num_items_in_batch": 13}
        with_aux = model(ids[row : row + 1], output_router_logits=True, **batch)
        parts.append((with_aux.loss - model(ids[row : row + 1], **batch).loss, with_aux.aux_loss))
    assert_close(parts[0][0] + parts[1][0], 0.5 * (10 * parts[0][1] + 3 * parts[1][1]) / 13)


def test_configuration_asks_for_the_aux_loss_in_training():
    ids = prompt(2, 11)
    model = tiny_model("moe", router_aux_loss_coef=0.5, output_router_logits=True).train()
    assert_close(model(ids, labels=ids).loss, model(ids, labels=ids, output_router_logits=False).loss
                 + 0.5 * model(ids).aux_loss)  # fmt: skip


def test_tied_embeddings_load_save_and_train(tmp_path):
    model, ids = tiny_model(tie_word_embeddings=True), prompt(2, 11)
    assert model.lm_head.weight is model.model.embeddings.weight
    expected = model(ids).logits
    assert_close(expected[0].double(), reference_logits(model.state_dict(), model.config, ids[0]), 3e-5)
    model.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(ids).logits, expected)
    loaded(ids, labels=ids).loss.backward()
    assert loaded.model.embeddings.weight.grad is not None


def test_resize_token_embeddings():
    model, ids = tiny_model(), prompt(2, 11)
    expected = model(ids).logits
    model.resize_token_embeddings(110)
    assert model.config.vocab_size == 110
    out = model(ids, labels=torch.full_like(ids, 105))
    assert out.logits.shape == (2, 11, 110) and out.loss.isfinite()
    assert_close(out.logits[..., :97], expected)
    model(torch.tensor([[105, 109]]))
    with pytest.raises(ValueError, match="token ids from 0 to 109"):
        model(torch.tensor([[110]]))


def test_bad_token_ids_and_empty_prompts():
    model = tiny_model()
    for bad in (97, -1):
        with pytest.raises(ValueError, match=f"input_ids has {bad}: allowed are token ids from 0 to 96"):
            model(torch.tensor([[5, bad, 6]]))
    for empty in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="empty"):
            model(empty)
    with pytest.raises(ValueError, match="attention_mask has"):
        model(prompt(1, 5), attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_sequence_classification(side):
    model = tiny_model(model_class=NemotronHForSequenceClassification, num_labels=3)
    rows = [prompt(1, length, seed=length) for length in (4, 11, 7)]
    alone = torch.cat([model(row).logits for row in rows])
    assert alone.shape == (3, 3)
    if side == "none":
        return
    pad = lambda row: (11 - row.shape[1], 0) if side == "left" else (0, 11 - row.shape[1])  # noqa: E731
    ids = torch.cat([nn.functional.pad(row, pad(row)) for row in rows])
    out = model(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 2, 1]))
    assert_close(out.logits, alone)
    assert_close(out.loss, nn.functional.cross_entropy(alone, torch.tensor([0, 2, 1])))
    out.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_base_model_returns_hidden_states():
    model, ids = tiny_model(), prompt(1, 7)
    out = model.model(ids)
    assert_close(model.lm_head(out.last_hidden_state), model(ids).logits, 0)
    assert isinstance(model.model, NemotronHModel)
    loss, logits = tiny_model()(ids, labels=ids, return_dict=False)[:2]
    assert loss.ndim == 0 and logits.shape == (1, 7, 97)


# Precision


def test_residual_in_fp32():
    model, ids = tiny_model(residual_in_fp32=True), prompt(1, 15)
    expected = reference_logits(model.state_dict(), model.config, ids[0])
    assert_close(model(ids).logits[0].double(), expected)
    error = {}
    for in_fp32 in (True, False):
        low = tiny_model(residual_in_fp32=in_fp32).bfloat16()
        seen = low.model(ids, output_hidden_states=True)
        assert seen.hidden_states[3].dtype == (torch.float32 if in_fp32 else torch.bfloat16)
        out = low(ids, labels=ids)
        assert out.logits.dtype == torch.bfloat16
        error[in_fp32] = float((out.logits[0].double() - expected).square().mean())
    assert error[True] < error[False] * 1.5


@pytest.mark.parametrize(
    "kept", ["norm.weight", "A_log", "D", "dt_bias", "conv1d.weight", "norm_f.weight", "gate.weight"]
)
def test_a_model_of_mixed_dtypes_runs(kept):
    """A checkpoint may hold any of the small tensors in fp32 with bf16 projections."""
    model, ids = tiny_model("moe"), prompt(1, 15)
    expected = model(ids).logits
    model.bfloat16()
    for name, weight in model.named_parameters():
        if name.endswith(kept):
            weight.data = weight.data.float()
    out = model(ids, labels=ids, use_cache=True)
    step = model(ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.dtype == step.logits.dtype == torch.bfloat16
    assert (out.logits.float() - expected).square().mean().sqrt() < 0.4
    out.loss.backward()


def test_router_bias_stays_fp32():
    model = tiny_model("moe")
    bias = model.model.layers[1].mixer.gate.e_score_correction_bias.clone()
    for cast in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("cpu", torch.bfloat16), model.bfloat16):
        cast()
        kept = model.model.layers[1].mixer.gate.e_score_correction_bias
        assert kept.dtype == torch.float32 and torch.equal(kept, bias)
    assert copy.deepcopy(model).to("meta").model.layers[1].mixer.gate.e_score_correction_bias.is_meta


def test_state_parameters_are_computed_in_fp32():
    """A_log, D, dt_bias rounded to bf16 then used in fp32: the same as fp32 parameters with those values."""
    model, ids = tiny_model(), prompt(1, 40)
    rounded, wide = copy.deepcopy(model), copy.deepcopy(model)
    for mine, theirs in zip(rounded.model.layers, wide.model.layers):
        if mine.block_type == "linear_attention":
            for name in ("A_log", "D", "dt_bias"):
                low = getattr(mine.mixer, name).data.bfloat16()
                getattr(mine.mixer, name).data, getattr(theirs.mixer, name).data = low, low.float()
            mine.mixer.norm.weight.data = mine.mixer.norm.weight.data.bfloat16()
            theirs.mixer.norm.weight.data = mine.mixer.norm.weight.data.float()
    assert torch.equal(rounded(ids).logits, wide(ids).logits)
    a, b = (m(ids[:, :1], past_key_values=m(ids).past_key_values).logits for m in (rounded, wide))
    assert torch.equal(a, b)


def test_autocast():
    model, ids = tiny_model("moe"), prompt(2, 15)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(ids, labels=ids)
    out.loss.backward()
    assert abs(out.loss.item() - expected.item()) < 0.1
    assert all(weight.grad is not None for weight in model.parameters())


# Training


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_gradient_checkpointing(shape, reentrant):
    model, ids = tiny_model(shape).train(), prompt(2, 21)
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(ids, labels=ids)
    assert out.past_key_values is None
    assert_same_gradients(gradients(model, out.loss), expected)


class Wrapped(nn.Module):
    """Stands in for a LoRA or quantised layer: counts its calls and doubles what it is given to do."""

    def __init__(self, linear: nn.Linear, counts: dict, name: str) -> None:
        super().__init__()
        self.linear, self.counts, self.name = linear, counts, name
        self.extra = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x):
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.linear(x) + self.extra


@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_linear_layers_are_called_as_modules_once_per_forward(shape):
    model, ids, counts = tiny_model(shape), prompt(2, 21), {}
    expected = model(ids).logits
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name.rsplit(".", 1)[-1] for name in names} >= {
        "in_proj",
        "out_proj",
        "q_proj",
        "o_proj",
        "up_proj",
        "lm_head",
    }
    for name in names:
        model.set_submodule(name, Wrapped(model.get_submodule(name), counts, name))
    with torch.no_grad():
        assert_close(model(ids).logits, expected)
    assert counts == dict.fromkeys(names, 1)
    counts.clear()
    out = model.train()(ids, labels=ids)
    assert counts == dict.fromkeys(names, 1)
    out.loss.backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if name.endswith("extra"))
    counts.clear()
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
        counts.clear()
        model(ids[:, :1], past_key_values=cache)
    assert counts == dict.fromkeys(names, 1)


def test_fresh_weights():
    model = NemotronHForCausalLM(tiny_model("moe").config)
    mixer = model.model.layers[0].mixer
    assert_close(mixer.A_log, torch.log(torch.arange(1.0, 9.0)))
    assert torch.equal(mixer.D, torch.ones(8))
    steps = nn.functional.softplus(mixer.dt_bias)
    assert (steps >= 0.00099).all() and (steps <= 0.101).all()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all() and (weight.abs().sum() > 0) == (not name.endswith("conv1d.bias")), name
    bound = 1 / math.sqrt(mixer.out_proj.in_features * model.config.num_hidden_layers)
    assert 0.8 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_dropout_only_in_training():
    model, ids = tiny_model(attention_dropout=0.5), prompt(1, 15)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_bf16_router_weights_route_as_in_fp32():
    """transformers 5.24 holds the router's weight in fp32; ours keeps its dtype, and computes the same bits."""
    gate = tiny_model("moe").bfloat16().model.layers[1].mixer.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    x = torch.randn(200, 48).bfloat16()
    stored, wide = gate(x), copy.deepcopy(gate)
    wide.weight.data = wide.weight.data.float()
    expected = torch.nn.functional.linear(x.float(), wide.weight)
    assert torch.equal(stored[0], expected) and stored[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(stored, wide(x)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_fsdp2_takes_blocks_of_one_dtype():
    """Why the router's weight keeps its dtype: in fp32 among bf16, FSDP2 refuses the block."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, ids = torch.distributed.init_device_mesh("cpu", (1,)), prompt(2, 9)
        plain, wide = (tiny_model("moe").bfloat16() for _ in range(2))
        expected = plain(ids).logits
        gate = wide.model.layers[1].mixer.gate
        gate.weight.data = gate.weight.data.float()
        for model in (plain, wide):
            for layer in model.model.layers:
                torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        assert torch.equal(plain(ids).logits, expected)
        with pytest.raises(AssertionError, match="uniform original parameter dtype"):
            wide(ids)
    finally:
        torch.distributed.destroy_process_group()
