"""Elastic training: the loss of a step from its parts, masks and skipped layers, resuming, budgets at the end."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from tiny import assert_close, tiny_config, tiny_model
from tiny_run import make_arguments, make_rows, read_metrics

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.documents import resumable
from nemotron_h_hf.data.packing import SplitRows
from nemotron_h_hf.elastic.budgets import Budget, read_elastic
from nemotron_h_hf.elastic.child import child_of
from nemotron_h_hf.elastic.masks import attach_masks
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.elastic.train.choices import axes_of, masks_of
from nemotron_h_hf.elastic.train.curriculum import draw, shorter, stages_of
from nemotron_h_hf.elastic.train.expected_cost import ExpectedCost, router_loss
from nemotron_h_hf.elastic.train.routed_model import Route, RoutedModel
from nemotron_h_hf.elastic.train.router import Router, RouterSettings, budget_vector, choose
from nemotron_h_hf.elastic.train.trained_budgets import elastic_after, single_sizes
from nemotron_h_hf.elastic.train.trainer import ROUTER_FILE, ElasticTrainer
from nemotron_h_hf.training.distillation import DistillationTrainer
from nemotron_h_hf.training.trained_folder import save_finished

CHOICES = {"hidden_size": [48, 32], "intermediate_size": [80, 48], "mamba_num_heads": [8, 4], "layers": [3, 2]}
TARGETS = {"all": 1.0, "half": 0.6}
TOKENS = 32 * 4 * 4


def parent(seed=0, **config):
    return tiny_model(seed=seed, hybrid_override_pattern="M-*", **config)


def route_of(config, settings=None, choices=None, per_layer=()):
    axes = axes_of(config, CHOICES if choices is None else choices, per_layer)
    cost = ExpectedCost(config, axes, layer_order=[1, 2, 0])
    targets = {name: share * cost.full for name, share in TARGETS.items()}
    return Route(axes, cost, targets, [1, 2, 0], settings or RouterSettings(width=16))


def trainer_of(texts, output_dir, model=None, route=None, stages=None, kind=ElasticTrainer, options=None, **fields):
    arguments = make_arguments(output_dir, **{"max_steps": 4, "max_loss_jump": 0, **fields})
    model = parent().train() if model is None else model
    route = route_of(model.config) if route is None else route
    stages = stages_of(stages, list(route.targets), arguments.max_steps * arguments.tokens_per_step, 32)
    return kind(model, arguments, train_dataset=make_rows(texts, steps=arguments.max_steps), teacher=tiny_model(seed=1),
                route=route, stages=stages, **(options or {}))  # fmt: skip


def naive_kl(logits, teacher_logits, labels):
    log_p, log_q = teacher_logits[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[labels[:, 1:] != -100].sum()


def test_loss_of_the_first_step_from_its_parts(texts, tmp_path):
    """Two micro-steps, each with its own budget: KL of the masked parent over all tokens, and the mean of the costs."""
    trainer_of(texts, tmp_path, options={"router_loss_weight": 3.0}, seed=7).train()
    rows = [row for row, _ in zip(make_rows(texts), range(4), strict=False)]
    model, teacher = parent(), tiny_model(seed=1)
    route, masked = route_of(model.config), attach_masks(model)
    torch.manual_seed(7)
    router = Router(route.axes, 2, route.settings)
    kl = of_router = items = 0
    for micro_step, pair in enumerate((rows[:2], rows[2:])):
        batch = {name: torch.stack([row[name] for row in pair]) for name in pair[0]}
        drawn = draw((1, 1), route.axes, 0.0, 7, 0, micro_step)
        target = list(route.targets.values())[drawn.budget]
        chosen = choose(router(budget_vector(list(route.targets.values()), target)), 1.0, 1.0, drawn.noise)
        masked.masks = masks_of(model.config, route.axes, chosen, route.layer_order)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        count = int((batch["labels"][:, 1:] != -100).sum())
        kl += naive_kl(
            model(**inputs, use_cache=False).logits, teacher(**inputs, use_cache=False).logits, batch["labels"]
        )
        of_router += router_loss(route.cost(chosen), target, route.cost.full, chosen, route.axes) * count
        items += count
    first = read_metrics(tmp_path)[0]
    assert first["kl"] == pytest.approx(kl.item() / items, abs=1e-5)
    assert first["loss"] == pytest.approx((kl.item() + 3 * of_router.item()) / items, abs=1e-5)


def test_log_tells_each_budget(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path, logging_steps=2, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    trainer.train()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4]  # a checkpoint at 3
    for line in lines:
        drawn = [name for name in TARGETS if f"kl_{name}" in line]
        assert drawn and all(line[f"loss_{name}"] == line[f"kl_{name}"] > 0 for name in drawn)
        assert all(line[f"router_loss_{name}"] >= 0 for name in drawn)
        assert (line["target_all"], line["target_half"]) == pytest.approx((1.0, 0.6))
        assert 0.3 < line["size_half"] <= 1 and line["choice_half_num_layers"] in (2, 3)
        assert line["choice_all_intermediate_size"] in (80, 48)
        if len(drawn) == 2:
            assert min(line["kl_all"], line["kl_half"]) <= line["kl"] <= max(line["kl_all"], line["kl_half"])


def test_router_has_its_own_rate_and_no_decay(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path, max_steps=8, options={"router_warmup_steps": 4, "router_learning_rate": 0.02})
    before = copy.deepcopy(trainer.routed.router.state_dict())
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert group["weight_decay"] == 0 and {id(p) for p in group["params"]} == {
        id(p) for p in trainer.routed.router.parameters()
    }
    rates = [line["router_learning_rate"] for line in read_metrics(tmp_path)]
    factors = trainer.lr_scheduler.lr_lambdas
    assert [0.02 * factors[-1](step) for step in range(4)] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    assert rates[:3] == pytest.approx([0.01, 0.015, 0.02])  # read after the step was made
    assert factors[-1](7) == factors[0](7) == 0.01
    changed = [not torch.equal(value, before[name]) for name, value in trainer.routed.router.state_dict().items()]
    assert all(changed)


def test_gradients_of_weights_and_router_are_clipped_apart(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path)
    router = list(trainer.routed.router.parameters())
    weights = [p for name, p in trainer.model.named_parameters() if "router" not in name]
    for parameters, norm in ((router, 40.0), (weights, 0.5)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        scale = norm / torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad *= scale
    assert float(trainer._clip_grad_norm(trainer.model)) == pytest.approx(0.5, rel=1e-4)
    norms = [float(torch.nn.utils.get_total_norm([p.grad for p in part])) for part in (router, weights)]
    assert norms == pytest.approx([1.0, 0.5], rel=1e-4)


def test_resumed_run_is_the_same_run(texts, tmp_path):
    settings = {"max_steps": 6, "save_steps": 3, "stages": [{"until": "50%"}, {"weights": {"half": 1}}]}
    trainer_of(texts, tmp_path / "whole", **settings).train()
    trainer_of(texts, tmp_path / "cut", **settings).train()
    (tmp_path / "cut" / "checkpoint-6").rename(tmp_path / "away")
    folder = tmp_path / "cut" / "checkpoint-3"
    with safe_open(folder / "model.safetensors", "pt") as weights, safe_open(folder / ROUTER_FILE, "pt") as router:
        assert not any("router" in name for name in weights.keys()) and len(list(router.keys())) == 16
    resumed = trainer_of(texts, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    (folder / ROUTER_FILE).unlink()
    with pytest.raises(ValueError, match="without the router"):
        resumed._load_from_checkpoint(str(folder))


def test_router_of_other_budgets_is_not_taken(texts, tmp_path):
    trainer_of(texts, tmp_path, max_steps=4, save_steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    other = route_of(tiny_config(hybrid_override_pattern="M-*"), choices={"hidden_size": [32]})
    with pytest.raises(ValueError, match="choices=.* allowed is what"):
        trainer_of(texts, tmp_path, route=other, max_steps=4).train(resume_from_checkpoint=True)


class Watching(ElasticTrainer):
    """Remembers shapes of batches, and which layers' mixers ran in training."""

    def compute_loss(self, model, inputs, *others, **named):
        self.shapes = [*getattr(self, "shapes", []), tuple(inputs["input_ids"].shape)]
        return super().compute_loss(model, inputs, *others, **named)


def test_stages_cut_rows_and_weigh_budgets(texts, tmp_path):
    stages = [{"until": "50%", "sequence_length": 8}, {"weights": {"half": 1.0}}]
    trainer = trainer_of(texts, tmp_path, kind=Watching, stages=stages)
    trainer.train()
    assert trainer.shapes == [(8, 8)] * 4 + [(2, 32)] * 4
    for line in read_metrics(tmp_path)[2:]:
        assert "kl_half" in line and "kl_all" not in line


def test_hard_choices_of_depth_leave_layers_out(texts, tmp_path):
    """Which layers run is in the draw; those left out have no gradient in that step, the router has."""
    model = parent().train()
    route = route_of(model.config, RouterSettings(width=16, hard_share=1.0), {"layers": [3, 2]})
    routed = RoutedModel(model, route)
    ran = []
    for layer, block in enumerate(model.model.layers):
        block.mixer.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    ids = torch.randint(3, 97, (2, 12))
    seen = set()
    for step in range(12):
        ran.clear()
        drawn = draw((0, 1), route.axes, 1.0, 0, step, 0)
        routed.sample(drawn, 0.0)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss + routed.router_loss.float()
        loss.backward()
        seen.add(tuple(ran[:3]))
        assert (model.model.layers[1].mixer.up_proj.weight.grad is None) is (1 not in ran)
        assert all(p.grad is not None for p in routed.router.parameters()) and routed.router_loss > 0
    assert seen == {(0, 1, 2), (0, 2)} or seen == {(0, 1, 2), (0, 2, 0)}


def test_evaluation_is_that_of_the_cut_models(texts, tmp_path):
    model = parent()
    trainer = trainer_of(texts, tmp_path, model)
    rows = [row for row, _ in zip(make_rows(texts), range(3), strict=False)]
    metrics = trainer.evaluate(rows)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    children = trainer.routed.children()
    assert children["all"].budget == Budget(name="all") and children["half"].budget != Budget(name="half")
    model = parent()
    for name, child in children.items():
        small = cut_out(model, child.budget)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = small(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        assert metrics[f"eval_{name}_cross_entropy"] == pytest.approx(expected.item(), abs=1e-5)
        assert metrics[f"eval_{name}_kl"] == pytest.approx(metrics[f"eval_{name}_loss"], abs=1e-5)


def cut_out(model, budget):
    """The small model itself, from the names of a checkpoint."""
    child = resolve(model.config, budget)
    small = NemotronHForCausalLM(child.config).eval()
    source = {name.replace("model.", "backbone.", 1): value for name, value in model.state_dict().items()}
    found = {cut.name: cut.of(source[cut.source]) for cut in child.cuts()}
    small.load_state_dict({name.replace("backbone.", "model.", 1): value for name, value in found.items()})
    return small


def test_choices_become_budgets_of_an_ordinary_parent(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path)
    trainer.train()
    model, routed = trainer.model, trainer.routed
    model.config.elastic = {"version": 1, "budgets": {"old": {}}}
    children = {**routed.children(), "middle": routed.child("middle", 0.8 * trainer.route.cost.full)}
    singles = single_sizes(model.config, trainer.route.axes, trainer.route.layer_order)
    losses = {"hidden_size=32": 2.5, "layers=2": 2.4}
    assert set(singles) == {"hidden_size=32", "intermediate_size=48", "mamba_num_heads=4", "layers=2"}
    assert singles["layers=2"].layers == (0, 2)
    model.config.elastic = elastic_after(
        model.config, trainer.route, children, {"all": 2.0, "half": 3.0}, losses
    ).to_dict()
    model.save_pretrained(tmp_path / "model")
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "model")
    elastic = read_elastic(again.config)
    assert [(b.name, b.trained, b.loss) for b in elastic.budgets.values()] == [
        ("all", True, 2.0), ("half", True, 3.0), ("middle", False, None),
    ]  # fmt: skip
    assert elastic.calibration == {"loss": 2.0, "hidden_size": {"32": 2.5}, "layers": {"2": 2.4}}
    assert elastic.layer_order == (1, 2, 0) and elastic.choices["hidden_size"] == (48, 32)
    routed.fix(None)
    ids = torch.randint(3, 97, (1, 9))
    assert_close(again(ids).logits, model.eval()(ids).logits, 0)
    small = resolve(again.config, elastic.budgets["half"]).config
    size = trainer.route.cost({f: torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).float()
                               for f, z in routed.logits(trainer.route.targets["half"]).items()})  # fmt: skip
    assert num_parameters(small) == float(size)


def test_router_finds_its_targets(texts, tmp_path):
    """Cost alone, with the temperature falling: at the end the choices are within the dead zone, or as near as sizes come."""
    model = parent().train()
    route = route_of(
        model.config, RouterSettings(width=64), {"hidden_size": [40, 32, 24], "intermediate_size": [64, 48, 32]}
    )
    router = Router(route.axes, 2, route.settings)
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    targets = list(route.targets.values())
    for step in range(250):
        drawn, progress = draw((1, 1), route.axes, 0.0, 0, step, 0), step / 249
        logits = router(budget_vector(targets, targets[drawn.budget]))
        settings = route.settings
        chosen = choose(logits, settings.logit_scale_at(progress), settings.temperature_at(progress), drawn.noise)
        loss = router_loss(route.cost(chosen), targets[drawn.budget], route.cost.full, chosen, route.axes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for target in targets:
        logits = router(budget_vector(targets, target))
        final = choose(logits, 10.0, 0.05, hard=True)
        assert float(route.cost(final).detach()) == pytest.approx(target, rel=0.08)


def test_rows_cut_short_learn_nothing_across_a_cut():
    row = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}
    cut = shorter(row, 4)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut["labels"].tolist() == [[-100, 1, 2, 3], [-100, 5, 6, 7]]
    assert row["labels"].tolist() == [list(range(8))]


def test_what_cannot_be_trained_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="optimizer='muon': allowed is adamw with a router"):
        trainer_of(texts, tmp_path, optimizer="muon")
    with pytest.raises(ValueError, match="router_learning_rate=0"):
        trainer_of(texts, tmp_path, options={"router_learning_rate": 0})
    model = parent()
    with pytest.raises(ValueError, match="teacher=the model itself"):
        ElasticTrainer(model, make_arguments(tmp_path), teacher=model, route=route_of(model.config), stages=())


def test_weights_that_a_finished_sharded_run_did_not_load_are_not_saved(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="nemotron-h export"):
        save_finished(trainer, None)
    assert not (tmp_path / "model").exists()


def test_state_of_the_run_is_readable(texts, tmp_path):
    trainer_of(texts, tmp_path, max_steps=3).train()
    with safe_open(tmp_path / "checkpoint-3" / ROUTER_FILE, "pt") as file:
        assert "half" in file.metadata()["budgets"] and "hidden_size" in file.metadata()["choices"]
    assert json.loads((tmp_path / "checkpoint-3" / "whole.json").read_text())["files"][ROUTER_FILE] > 0


SMALL = {
    "half": {"hidden_size": 32, "intermediate_size": 48, "layers": [0, 2]},
    "quarter": {"hidden_size": 32, "mamba_num_heads": 4},
}


def kept_sizes(model) -> Route:
    budgets = {"all": Budget(name="all"), **{name: Budget.from_dict(name, sizes) for name, sizes in SMALL.items()}}
    children = {name: child_of(model.config, budget) for name, budget in budgets.items()}
    targets = {name: float(child.num_parameters) for name, child in children.items()}
    return Route((), ExpectedCost(model.config, ()), targets, fixed=children)


@pytest.mark.parametrize("live", [False, True])
def test_known_sizes_are_trained_as_the_cut_models_would_be(live, texts, tmp_path):
    """A sandwich of two micro-steps: the parent, then the last size, against models that are cut out."""
    model = parent().train()
    trainer = trainer_of(texts, tmp_path, model, kept_sizes(model), options={"sandwich": True, "live_teacher": live})
    trainer.train()
    rows = [row for row, _ in zip(make_rows(texts), range(4), strict=False)]
    before, teacher, total, items = parent(), tiny_model(seed=1), 0, 0
    small = cut_out(before, Budget.from_dict("quarter", SMALL["quarter"]))
    for student, pair in ((before, rows[:2]), (small, rows[2:])):
        batch = {name: torch.stack([row[name] for row in pair]) for name in pair[0]}
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        taught_by = before if live and student is small else teacher
        logits, wanted = (of(**inputs, use_cache=False).logits for of in (student, taught_by))
        total, items = (
            total + naive_kl(logits, wanted, batch["labels"]),
            items + int((batch["labels"][:, 1:] != -100).sum()),
        )
    first = read_metrics(tmp_path)[0]
    assert first["loss"] == pytest.approx(total.item() / items, abs=1e-5)
    assert first["kl_quarter"] > 0 and "kl_half" not in first and "router_learning_rate" not in first
    assert trainer.routed.children()["half"].budget.sizes() == SMALL["half"]


def test_a_run_with_known_sizes_resumes_and_takes_muon(texts, tmp_path):
    model = parent().train()
    trainer_of(texts, tmp_path / "whole", model, kept_sizes(model), optimizer="muon", max_steps=4, save_steps=2).train()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    again = parent(seed=5).train()
    trainer_of(texts, tmp_path / "whole", again, kept_sizes(again), optimizer="muon", max_steps=4, save_steps=2).train(
        resume_from_checkpoint=True
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("known", [False, True])
def test_rows_without_a_label_are_no_loss(known, texts, tmp_path):
    """Neither of weights nor of the router; and no figures of a budget that saw nothing."""
    model = parent().train()
    trainer = trainer_of(texts, tmp_path, model, kept_sizes(model) if known else None, max_steps=1)
    trainer.rows.documents = resumable([{"input_ids": [5] * 128, "labels": [-100] * 128}])
    trainer.rows.load_state_dict(SplitRows(trainer.rows.documents, 32).state_dict())
    trainer.train()
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == row["grad_norm"] == 0
    assert not any(name.startswith("kl_") for name in row)


def test_a_live_teacher_is_refused_under_fsdp(texts, tmp_path, monkeypatch):
    plain = DistillationTrainer.__init__

    def sharded(trainer, *args, **named):
        plain(trainer, *args, **named)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(DistillationTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match="live_teacher=True: allowed is False under FSDP"):
        trainer_of(texts, tmp_path, options={"live_teacher": True})


def test_a_sandwich_needs_two_micro_steps(texts, tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1: allowed is 2 or more with sandwich"):
        trainer_of(texts, tmp_path, options={"sandwich": True}, gradient_accumulation_steps=1)
