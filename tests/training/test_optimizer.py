"""Which parameters decay, and that the optimizers step as written down."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import prompt, tiny_model

from nemotron_h_hf.training.optimizer import inner_matrices, make_optimizer, parameter_groups

NEVER_DECAYED = ("A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight", ".bias", "conv1d.weight")


@pytest.mark.parametrize("shape", ["dense", "moe", "latent", "tied", "biased"])
def test_groups_hold_each_parameter_once(shape):
    overrides = {"tied": {"tie_word_embeddings": True}, "biased": {"use_bias": True, "attention_bias": True}}
    model = tiny_model(shape if shape in ("moe", "latent") else "dense", **overrides.get(shape, {}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    ids = [id(parameter) for group in (decayed, undecayed) for parameter in group["params"]]
    assert sorted(ids) == sorted(names)
    expected = {name for name in names.values() if name.endswith(NEVER_DECAYED)}
    assert {names[id(parameter)] for parameter in undecayed["params"]} == expected
    assert {"model.embeddings.weight"} <= {names[id(parameter)] for parameter in decayed["params"]}


def test_only_trained_parameters():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["in_proj", "up_proj"]))
    groups = parameter_groups(model, 0.1)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, groups[0]["params"])) == sorted(map(id, trained))
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(tiny_model().requires_grad_(False))


def test_adamw_steps_as_written_down():
    """First step: the moments' bias corrections cancel, so the update is lr * g / (|g| + eps), after the decay."""
    model = with_gradients(tiny_model())
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    make_optimizer(model, "adamw", lr=0.01, weight_decay=0.5, eps=1e-8).step()
    for name, parameter in model.named_parameters():
        value, gradient = before[name]
        kept = value if name.endswith(NEVER_DECAYED) else value * (1 - 0.01 * 0.5)
        assert torch.allclose(parameter, kept - 0.01 * gradient / (gradient.abs() + 1e-8), atol=1e-6), name


def test_muon_takes_the_inner_matrices_and_steps_like_itself():
    model = with_gradients(tiny_model())
    matrices = {id(matrix) for matrix in inner_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert names == {name for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters()):
        other.grad = parameter.grad.clone()
    optimizer = make_optimizer(model, "muon", lr=0.01, weight_decay=0.5)
    muon = torch.optim.Muon(inner_matrices(twin), 0.01, 0.5, adjust_lr_fn="match_rms_adamw")
    rest = {id(matrix) for matrix in inner_matrices(twin)}
    groups = parameter_groups(twin, 0.5)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in rest]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(2):
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(parameter, other, atol=1e-6), name


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O, with O near U V^T of the first gradient (2502.16982)."""
    model = tiny_model().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = {id(matrix) for matrix in inner_matrices(model)}
    make_optimizer(model, "muon", lr=0.01, weight_decay=0.5).step()
    for name, parameter in model.named_parameters():
        if id(parameter) in matrices:
            u, _, vh = torch.linalg.svd(parameter.grad, full_matrices=False)
            update = (before[name] * (1 - 0.01 * 0.5) - parameter.detach()) / (0.01 * 0.2 * max(parameter.shape) ** 0.5)
            assert torch.cosine_similarity(update.flatten(), (u @ vh).flatten(), dim=0) > 0.95, name
            assert 0.7 < update.norm() / (u @ vh).norm() < 1.2, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_can_be_saved_and_loaded(name, tmp_path):
    """One step, saved, loaded into a new optimizer of a copy: the next step and the learning rate are the same."""
    model = with_gradients(tiny_model())
    optimizer = make_optimizer(model, name, lr=0.01)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters()):
        other.grad = parameter.grad.clone()
    again = make_optimizer(twin, name, lr=0.5)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for one in (optimizer, again):
        for group in one.param_groups:
            assert group["lr"] == 0.01
            group["lr"] = 0.02
        one.step()
    for parameter, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(parameter, other)


def test_unknown_name():
    with pytest.raises(ValueError, match="optimizer='sgd': allowed are adamw, muon"):
        make_optimizer(tiny_model(), "sgd")


def with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    ids = prompt(2, 24)
    model.train()(ids, labels=ids).loss.backward()
    return model
