"""What vLLM's plugin does without vLLM: the configuration becomes a budget's, and tensors are cut as they come."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.integrations.vllm import BudgetConfig, cut

BUDGETS = {
    "narrow": {"hidden_size": 32, "mamba_num_heads": 4, "num_attention_heads": 2, "intermediate_size": [8, 72, 16]},
    "shallow": {"layers": [0, 1, 3, 4, 5]},
    "uneven": {"mamba_num_heads": [4, 8, 6]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    tiny_model("dense", elastic={"version": 1, "budgets": BUDGETS}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["narrow", "shallow"])
def test_the_parents_tensors_become_the_budgets(folder, name):
    config = BudgetConfig.from_pretrained(folder)
    config.update({"budget": name, "max_position_embeddings": 77})
    small = NemotronHForCausalLM.from_pretrained(folder, budget=name)
    assert config.max_position_embeddings == 77 and config.num_hidden_layers == small.config.num_hidden_layers
    for field in ("hidden_size", "mamba_num_heads", "num_attention_heads", "intermediate_size", "layers_block_type"):
        assert getattr(config, field) == getattr(small.config, field), field
    stored = load_file(folder / "model.safetensors")
    found = {key.replace("backbone.", "model.", 1): t for key, t in cut(iter(stored.items()), config.child())}
    assert found.keys() == small.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in small.state_dict().items())


def test_without_a_budget_nothing_changes(folder):
    config = BudgetConfig.from_pretrained(folder)
    before = config.to_dict()
    config.update({})
    assert config.child() is None and config.to_dict() == before


def test_what_vllm_cannot_run_is_refused_with_the_nearest(folder):
    config = BudgetConfig.from_pretrained(folder)
    with pytest.raises(
        ValueError,
        match=r"'uneven' has mamba_num_heads=\[4, 8, 6\]: allowed in vLLM is one size, as in .*mamba_num_heads",
    ):
        config.update({"budget": "uneven"})
    with pytest.raises(ValueError, match="6b"):
        config.update({"budget": "6b"})
