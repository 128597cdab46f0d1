"""Submodels that share the parent's memory: the same logits, tokens and checkpoints as models cut out separately."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from tiny import prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.cost import cache_bytes, weight_bytes
from nemotron_h_hf.elastic.budgets import Budget, read_elastic
from nemotron_h_hf.elastic.live import ordered_linear
from nemotron_h_hf.elastic.live import parent as sharing
from nemotron_h_hf.elastic.live.prefix_order import KeptHeads, block_size, head_order, in_proj_order, nested
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.manifest import NAME as MANIFEST_NAME
from nemotron_h_hf.manifest import check_manifest
from nemotron_h_hf.model import linear
from nemotron_h_hf.model.cache import HybridCache

NARROW = {
    "hidden_size": 32, "mamba_num_heads": 4, "num_attention_heads": 2, "intermediate_size": 40, "layers": [0, 1, 2, 3, 5, 6],
}  # fmt: skip
BUDGETS = {
    "dense": {
        "whole": {},
        "hidden": {"hidden_size": 32},
        "heads": {"mamba_num_heads": 4},
        "some_heads": {"mamba_num_heads": [4, 8, 6]},
        "queries": {"num_attention_heads": 2},
        "mlp": {"intermediate_size": [8, 72, 16]},
        "depth": {"layers": [0, 1, 4, 5]},
        "all": NARROW,
    },
    "attention_free": {"all": {"hidden_size": 32, "mamba_num_heads": 4, "layers": [0, 1, 2]}},
    "moe": {
        "experts": {"n_routed_experts": 4},
        "per_token": {"num_experts_per_tok": 2},
        "inside": {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24},
        "all": {"n_routed_experts": 6, "moe_intermediate_size": 16, "hidden_size": 32, "mamba_num_heads": 6},
    },
    "latent": {"all": {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 8, "hidden_size": 32}},
}
CHANNELS = {
    "small": {"mamba_num_heads": 2, "mamba_head_dim": 4},
    "middle": {"mamba_num_heads": 4, "mamba_head_dim": 4},
    "large": {"mamba_num_heads": 6, "mamba_head_dim": 6},
    "crossing": {"mamba_num_heads": 8, "mamba_head_dim": 2},
}
ATTENTION = {
    "both": {"num_key_value_heads": 1, "num_attention_heads": 1},
    "queries": {"num_attention_heads": 4},
    "fewer": {"num_key_value_heads": 2, "num_attention_heads": 2},
    "crossing": {"num_key_value_heads": 2, "num_attention_heads": 4},
}


pytestmark = pytest.mark.usefixtures("no_grad")


def parent_of(shape, budgets=None, **overrides):
    """(live parent, an ordinary model with the same weights)."""
    elastic = {"version": 1, "budgets": BUDGETS[shape] if budgets is None else budgets}
    ordinary = tiny_model(shape, elastic=elastic, **overrides)
    return NemotronHElasticForCausalLM.from_model(copy.deepcopy(ordinary)), ordinary


def cut_out(model, name):
    """The ordinary small model, from ordinary weights."""
    config = model.config
    budget = read_elastic(config).budgets[name]
    child = resolve(config, budget)
    weights = {cut.name: cut.of(tensor_of(model, cut.source)) for cut in child.cuts()}
    small = NemotronHForCausalLM(child.config).eval()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    small.load_state_dict(weights)
    return small


def tensor_of(model, source):
    """A tensor by its name in files."""
    name = source.replace("backbone.", "model.", 1)
    if ".experts." in name:
        before, after = name.split(".experts.")
        number, kind, _ = after.split(".")
        return model.state_dict()[f"{before}.experts.{kind}"][int(number)]
    return model.state_dict()[name]


def matrices_copied(submodel):
    return [tie.path for tie in submodel._ties if tie.kept is not None and tie.tensor().dim() == 2]


# The same function


@pytest.mark.parametrize("shape", BUDGETS)
def test_parent_is_the_ordinary_model(shape):
    parent, ordinary = parent_of(shape, use_bias=True, attention_bias=True, mlp_bias=True)
    torch.testing.assert_close(parent(prompt(2, 21)).logits, ordinary(prompt(2, 21)).logits, rtol=0, atol=1e-5)
    assert parent.state_dict().keys() == ordinary.state_dict().keys()
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(parent.state_dict()[name], tensor), name


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in BUDGETS for name in BUDGETS[shape]])
def test_submodel_is_the_cut_model(shape, name):
    parent, ordinary = parent_of(shape)
    small, expected, ids = parent.submodel(name), cut_out(ordinary, name), prompt(2, 21)
    torch.testing.assert_close(small(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    tokens = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (small, expected)]
    assert torch.equal(*tokens)
    assert not matrices_copied(small)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_heads(name):
    parent, ordinary = parent_of("dense", CHANNELS)
    small, ids = parent.submodel(name), prompt(2, 21)
    torch.testing.assert_close(small(ids).logits, cut_out(ordinary, name)(ids).logits, rtol=0, atol=1e-5)
    assert bool(matrices_copied(small)) == (name == "crossing")


@pytest.mark.parametrize("name", ATTENTION)
def test_key_value_heads(name):
    """Also with a bias; a budget that does not fit inside the next larger one has copies."""
    parent, ordinary = parent_of("dense", ATTENTION, num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    small, ids = parent.submodel(name), prompt(2, 21)
    torch.testing.assert_close(small(ids).logits, cut_out(ordinary, name)(ids).logits, rtol=0, atol=1e-5)
    assert bool(matrices_copied(small)) == (name == "crossing")


def test_biases():
    parent, ordinary = parent_of("dense", {"all": NARROW}, use_bias=True, attention_bias=True, mlp_bias=True)
    small, expected, ids = parent.submodel("all"), cut_out(ordinary, "all"), prompt(1, 13)
    torch.testing.assert_close(small(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)


def test_tied_embeddings_and_bfloat16():
    parent, ordinary = parent_of("dense", {"all": NARROW}, tie_word_embeddings=True)
    small = parent.submodel("all")
    assert small.lm_head.weight is small.model.embeddings.weight
    torch.testing.assert_close(small(prompt()).logits, cut_out(ordinary, "all")(prompt()).logits, rtol=0, atol=1e-5)
    parent, ordinary = parent_of("dense", {"all": NARROW}, dtype="bfloat16")
    parent.bfloat16()
    logits = cut_out(ordinary.bfloat16(), "all").bfloat16()(prompt()).logits
    torch.testing.assert_close(parent.submodel("all")(prompt()).logits, logits, rtol=0, atol=0.1)


def test_gradients_of_the_parent():
    parent, ordinary = parent_of("dense")
    parent.requires_grad_(True).train(), ordinary.train()
    with torch.enable_grad():
        for model in (parent, ordinary):
            model(prompt(), labels=prompt()).loss.backward()
    ours, expected = parent.model.layers[0].mixer.in_proj, ordinary.model.layers[0].mixer.in_proj
    torch.testing.assert_close(ours.weight.grad.index_select(0, ours.rows()), expected.weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_take_strided_views(implementation):
    parent, ordinary = parent_of("moe")
    small, ids = parent.submodel("all"), prompt(2, 11)
    assert not small.model.layers[1].mixer.experts.up_proj.is_contiguous()
    small.set_experts_implementation(implementation)
    torch.testing.assert_close(small(ids).logits, cut_out(ordinary, "all")(ids).logits, rtol=0, atol=1e-5)


# One memory


def test_every_matrix_is_a_view():
    parent, _ = parent_of("dense")
    small = parent.submodel("all")
    addresses = {tensor.data_ptr() for tensor in parent.parameters()}
    for name, tensor in small.named_parameters():
        if tensor.dim() == 2:
            assert tensor.data_ptr() in addresses, name
    assert small.shared_bytes()["copies"] < 0.2 * small.shared_bytes()["views"]  # conv and norms weigh in a tiny model


def test_many_live_at_once_and_are_forgotten():
    parent, _ = parent_of("dense")
    small, other = parent.submodel("all"), parent.submodel("heads")
    assert parent.submodel("all") is small and parent.submodel("heads") is other and parent.submodel("whole") is parent
    before = small(prompt()).logits
    other(prompt()), parent(prompt())
    assert torch.equal(small(prompt()).logits, before)
    gone = weakref.ref(small)
    del small
    gc.collect()
    assert gone() is None


def test_a_submodel_outlives_its_parent():
    parent, ordinary = parent_of("dense")
    small = parent.submodel("all")
    del parent
    gc.collect()
    torch.testing.assert_close(small(prompt()).logits, cut_out(ordinary, "all")(prompt()).logits, rtol=0, atol=1e-5)


def test_checkpoints_are_ordinary(tmp_path):
    parent, ordinary = parent_of("moe")
    parent.save_pretrained(tmp_path / "parent", max_shard_size="50KB")
    parent.submodel("all").save_pretrained(tmp_path / "small")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 1
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "parent")
    assert again.config.architectures == ["NemotronHForCausalLM"] and again.config.elastic == parent.config.elastic
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    small = NemotronHForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.elastic is None
    assert all(torch.equal(small.state_dict()[k], v) for k, v in cut_out(ordinary, "all").state_dict().items())
    live = NemotronHElasticForCausalLM.from_pretrained(tmp_path / "parent")
    assert torch.equal(live.submodel("all")(prompt()).logits, parent.submodel("all")(prompt()).logits)
    _, told = NemotronHElasticForCausalLM.from_pretrained(tmp_path / "parent", output_loading_info=True)
    assert not told["missing_keys"]


def test_state_dict_there_and_back():
    parent, ordinary = parent_of("dense")
    other = tiny_model("dense", seed=5)
    parent.load_state_dict(other.state_dict())
    torch.testing.assert_close(parent(prompt()).logits, other(prompt()).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="load them into the parent"):
        parent.submodel("all").load_state_dict(parent.submodel("all").state_dict())


# What happens to the parent


def test_submodels_follow_the_parent():
    parent, ordinary = parent_of("dense")
    small = parent.submodel("all")
    parent.double()
    assert small.dtype == torch.float64
    expected = cut_out(ordinary, "all").double()(prompt()).logits
    torch.testing.assert_close(small(prompt()).logits, expected, rtol=0, atol=1e-10)
    assert not [tie.path for tie in small._ties if tie.kept is None and tie.tensor().data_ptr() != tie.source._parameters[
        tie.name].data_ptr()]  # fmt: skip


def test_tied_embeddings_follow_the_parent():
    parent, ordinary = parent_of("dense", tie_word_embeddings=True)
    small = parent.submodel("all")
    assert small.lm_head.weight is small.model.embeddings.weight
    parent.double()
    expected = cut_out(ordinary, "all").double()(prompt()).logits
    torch.testing.assert_close(small(prompt()).logits, expected, rtol=0, atol=1e-10)
    parent._apply(torch.clone)  # other memory, the same dtype
    parent.model.embeddings.weight.data *= 2
    ordinary.model.embeddings.weight.data *= 2
    expected = cut_out(ordinary, "all").double()(prompt()).logits
    torch.testing.assert_close(small(prompt()).logits, expected, rtol=0, atol=1e-10)
    assert small.lm_head.weight.data_ptr() == parent.model.embeddings.weight.data_ptr()


def test_ordered_layers_use_all_threads(monkeypatch):
    parent, ordinary = parent_of("dense")
    asked = []
    monkeypatch.setattr(linear, "num_parts", lambda x, weight: asked.append(weight) or 2 - len(weight) % 2)
    small = parent.submodel("all")
    logits = small(prompt(1, 1)).logits
    assert any(weight is small.model.layers[0].mixer.in_proj.weight for weight in asked)
    monkeypatch.undo()
    torch.testing.assert_close(logits, cut_out(ordinary, "all")(prompt(1, 1)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", [None, *BUDGETS["dense"]])
def test_a_token_is_one_compiled_call(name, rows, monkeypatch):
    """Of all blocks, although rows and columns are in another order; the values are the ordinary model's, op by op."""
    numba_run = pytest.importorskip("nemotron_h_hf.model.numba_run")
    parent, ordinary = parent_of("dense")
    live, expected = (parent, ordinary) if name is None else (parent.submodel(name), cut_out(ordinary, name))
    counts, run = [], numba_run.run
    monkeypatch.setattr(numba_run, "run", lambda operations: counts.append(len(operations)) or run(operations))
    cache, ids = HybridCache(live.config), prompt(rows, 9)
    live(ids[:, :4], cache=cache)
    counts.clear()
    logits = torch.cat([live(ids[:, i : i + 1], cache=cache).logits for i in range(4, 9)], 1)
    each = {"linear_attention": 3, "full_attention": 5, "mlp": 2}
    assert counts == [1 + sum(each[kind] for kind in live.config.layers_block_type)] * 5
    torch.testing.assert_close(logits, expected(ids).logits[:, 4:], rtol=0, atol=1e-5)


def test_needs_count_bytes_of_the_parents_dtype():
    parent, _ = parent_of("dense")
    config = parent.submodel("all").config
    need = f"{(weight_bytes(config, 'bfloat16') + cache_bytes(config, 0, 'bfloat16')) / 1000}KB"
    with pytest.raises(ValueError, match="iB or more"):
        parent.submodel(need)
    parent.bfloat16()
    assert parent.submodel(need) is parent.submodel("all")


@pytest.mark.parametrize("with_numba", [True, False])
def test_memory_order_is_what_is_read_fastest(with_numba, monkeypatch):
    if not with_numba:
        monkeypatch.setattr(ordered_linear, "compiled_loops", lambda: None)
    parent, _ = parent_of("dense")
    small = parent.submodel("all")
    ups, downs = ([model.model.layers[1].mixer.get_submodule(name).weight for model in (parent, small)]
                  for name in ("up_proj", "down_proj"))  # fmt: skip
    assert all(weight.stride(int(with_numba)) == 1 for weight in ups) and all(weight.stride(1) == 1 for weight in downs)
    parent.bfloat16()
    assert all(model.model.layers[1].mixer.up_proj.weight.stride(1) == 1 for model in (parent, small))


@pytest.mark.parametrize("change", [
    lambda parent, small: parent.model.to(torch.float64),
    lambda parent, small: small.to(torch.float64),
    lambda parent, small: setattr(parent.lm_head, "weight", nn.Parameter(parent.lm_head.weight.clone())),
    lambda parent, small: parent.resize_token_embeddings(90),
])  # fmt: skip
def test_a_submodel_that_is_no_longer_the_parents_refuses(change):
    parent, _ = parent_of("dense")
    small = parent.submodel("all")
    change(parent, small)
    with pytest.raises(RuntimeError, match="no longer its parent's"):
        small(prompt())
    assert parent.submodel("all") is not small


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
@torch.no_grad()
def test_a_copys_submodels_are_its_own(copied):
    """Of the parent, and of a submodel, which then is one of a copied parent."""
    parent, _ = parent_of("dense")
    small, ids = parent.submodel("all"), prompt(2, 11)
    expected = small(ids).logits
    other = copied(parent)
    other.lm_head.weight.mul_(2)
    torch.testing.assert_close(other.submodel("all")(ids).logits, 2 * expected, rtol=0, atol=1e-5)
    alone = copied(small)
    alone.lm_head.weight.mul_(2)
    torch.testing.assert_close(alone(ids).logits, 2 * expected, rtol=0, atol=1e-5)
    parent.resize_token_embeddings(90)  # the first one's submodels are no longer its own; those of the copies are
    torch.testing.assert_close(alone(ids).logits, 2 * expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.submodel("all")(ids).logits, 2 * expected, rtol=0, atol=1e-5)


def test_submodels_see_training_steps():
    parent, ordinary = parent_of("dense")
    small = parent.submodel("all")
    parent.requires_grad_(True)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.5)
    with torch.enable_grad():
        parent(prompt(), labels=prompt()).loss.backward()
    before = small(prompt()).logits
    optimizer.step()
    ordinary.load_state_dict(parent.state_dict())
    after = small(prompt()).logits
    torch.testing.assert_close(after, cut_out(ordinary, "all")(prompt()).logits, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    small.requires_grad_(True)
    with pytest.raises(ValueError, match="train the parent"):
        small(prompt())


def test_adapters_are_refused_on_the_parent_and_work_on_a_submodel():
    peft = pytest.importorskip("peft")
    parent, ordinary = parent_of("dense")
    small = parent.submodel("all")
    config = peft.LoraConfig(target_modules=["in_proj", "q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(small, config)
    logits = adapted(prompt()).logits
    expected = peft.get_peft_model(cut_out(ordinary, "all"), config)
    expected.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora" in k}, strict=False)
    torch.testing.assert_close(logits, expected(prompt()).logits, rtol=0, atol=1e-4)
    parent, _ = parent_of("dense")
    peft.get_peft_model(parent, config)
    with pytest.raises(ValueError, match="merged first"):
        parent.submodel("all")
    with pytest.raises(ValueError, match="merge adapters first"):
        NemotronHElasticForCausalLM.from_model(peft.get_peft_model(ordinary, config))


def test_quantised_sharded_and_offloaded_parents_are_refused():
    for change, match in [
        (lambda weight: weight.to(torch.float8_e4m3fn), "quantised"),
        (lambda weight: weight.to("meta"), "offloaded"),
        (lambda weight: weight.to(torch.int8), "quantised"),
    ]:
        model = tiny_model("dense")
        mixer = model.model.layers[1].mixer
        mixer.up_proj.weight = nn.Parameter(change(mixer.up_proj.weight), requires_grad=False)
        with pytest.raises(ValueError, match=match):
            NemotronHElasticForCausalLM.from_model(model)


def test_torchao_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("dense", hidden_size=64)
    quantization.quantize_(model.model.layers[1].mixer, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="quantised"):
        NemotronHElasticForCausalLM.from_model(model)


def test_unknown_budgets():
    parent, _ = parent_of("dense")
    with pytest.raises(ValueError, match="budget='7b'.*"):
        parent.submodel("7b")
    with pytest.raises(ValueError, match="multiple of 2"):
        parent.submodel(Budget(name="odd", mamba_num_heads=3))
    with pytest.raises(ValueError, match="nemotron-h push"):
        parent.save_pretrained("nowhere", push_to_hub=True)
    with pytest.raises(ValueError, match="variant='fp16': allowed is None"):
        parent.save_pretrained("nowhere", variant="fp16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_shard_sise'"):
        parent.save_pretrained("nowhere", max_shard_sise="1GB")


# The order


def test_orders_are_permutations_and_prefixes():
    chain = nested([KeptHeads(6, 8), KeptHeads(2, 4), KeptHeads(3, 6), KeptHeads(2, 8)])
    assert chain == [KeptHeads(2, 4), KeptHeads(3, 6), KeptHeads(6, 8)]
    order, ordinary = head_order(chain, 2), torch.arange(2 * 6 * 8).view(2, 6, 8)
    assert torch.equal(order.sort().values, torch.arange(96))
    for size in chain:
        kept = ordinary[:, : size.heads, : size.channels].flatten()
        assert torch.equal(order[: len(kept)].sort().values, kept)
    packed = in_proj_order(chain, 2, 10)
    assert torch.equal(packed.sort().values, torch.arange(2 * 96 + 10 + 12))
    assert packed[:12].tolist() == list(range(202, 214)) and packed[12:22].tolist() == list(range(192, 202))


def test_any_number_of_heads_is_a_prefix():
    order, ordinary = head_order([KeptHeads(6, 8)], 2), torch.arange(2 * 6 * 8).view(2, 6, 8)
    for heads in range(1, 7):
        assert torch.equal(order[: heads * 16].sort().values, ordinary[:, :heads].flatten())


def test_blocks():
    assert block_size(torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])) == 4
    assert block_size(torch.tensor([2, 3, 4, 5, 0, 1])) == 2
    assert block_size(torch.tensor([1, 0, 2])) == 1
    assert block_size(torch.arange(6)) == 6


def test_a_saved_submodel_has_a_manifest_and_names_the_nearest_uniform_budget(tmp_path, caplog):
    parent, _ = parent_of("dense")
    logger = sharing.logger
    logger.addHandler(caplog.handler)
    try:
        parent.submodel("mlp").save_pretrained(tmp_path / "mlp")
        parent.submodel("hidden").save_pretrained(tmp_path / "hidden")
    finally:
        logger.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records if "nearest" in record.getMessage()}
    assert said == {'the nearest budget that those readers express: {"intermediate_size": 32}'}
    check_manifest(tmp_path / "mlp" / MANIFEST_NAME, [tmp_path / "mlp" / "model.safetensors"])
    weights = bytearray((tmp_path / "mlp" / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "mlp" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="another checksum for 1 tensors"):
        NemotronHForCausalLM.from_pretrained(tmp_path / "mlp")
