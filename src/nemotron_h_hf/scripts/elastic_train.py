"""Train a parent together with the smaller models nested in it (Nemotron Elastic): a router finds their sizes on the way.

    nemotron-h elasticize MODEL parent --calibration text/*.txt       # first: weights in order of importance, sizes to choose
    nemotron-h elastic-train --model parent --data text/ --budgets '{full: 1.0, small: 0.5}' --total_tokens 10M
    nemotron-h elastic-train --config examples/recipes/elastic_12b.yaml

A budget is a share of the parent, or a size: 8.9B parameters; 12GiB with --metric memory (weights, and the caches of
--cost_batch_size sequences of --cost_context tokens); 30ms with --metric latency, from a table that this command makes:

    nemotron-h elastic-train --config run.yaml --metric latency --latency_table times.json --measure_latency

The teacher is a frozen copy of the parent unless --teacher names another. The curriculum is a list of stages; a stage's
shorter sequences are cut from the rows, so every step has as many tokens:

    stages: [{until: 60%, sequence_length: 8192}, {weights: {12b: 0.5, 9b: 0.3, 6b: 0.2}}]

Train budgets on that a parent has, with the sizes that they have, the smallest in every step, the parent as their teacher:

    nemotron-h elastic-train --model parent --keep_sizes --sandwich --live_teacher --gradient_accumulation_steps 4 --data text/

The same command given again resumes from the last whole checkpoint, router included. In OUTPUT_DIR: checkpoint-N/,
metrics.jsonl, router.safetensors, and at the end model/, an ordinary parent whose config.json names the budgets that were
found (with --eval_data: their held-out losses). Cut one out by `nemotron-h slice OUTPUT_DIR/model OUT --budget small`.

    nemotron-h plot OUTPUT_DIR --x step --y 'choice_small_*'          # what the router chose, step by step
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.cost import num_parameters, training_flops_per_token
from nemotron_h_hf.data.bad_data import tell_left_out
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.child import child_of
from nemotron_h_hf.elastic.live.saving import write_manifest
from nemotron_h_hf.elastic.train.arguments import ElasticArguments
from nemotron_h_hf.elastic.train.budget_targets import parse_target, targets_of
from nemotron_h_hf.elastic.train.choices import Axis, axes_of
from nemotron_h_hf.elastic.train.curriculum import stages_of
from nemotron_h_hf.elastic.train.expected_cost import DEAD_ZONE, ExpectedCost
from nemotron_h_hf.elastic.train.latency import measure_latency
from nemotron_h_hf.elastic.train.routed_model import Route
from nemotron_h_hf.elastic.train.router import RouterSettings
from nemotron_h_hf.elastic.train.trained_budgets import elastic_after, single_sizes
from nemotron_h_hf.elastic.train.trainer import ROUTER_FILE, ElasticTrainer, save_router
from nemotron_h_hf.errors import require
from nemotron_h_hf.hub import upload_folder
from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse
from nemotron_h_hf.training.checkpoints import writing_run
from nemotron_h_hf.training.data_arguments import DataArguments, RowArguments, set_chat_template
from nemotron_h_hf.training.distillation import TeacherArguments
from nemotron_h_hf.training.held_out_loss import evaluate_every
from nemotron_h_hf.training.one_copy import device_to_load_on
from nemotron_h_hf.training.rows import make_rows
from nemotron_h_hf.training.starting_point import load_model, load_tokenizer, load_weights
from nemotron_h_hf.training.trained_folder import require_trained, save_finished, take_push
from nemotron_h_hf.whole_files import write_json

# A jump of the loss is not unusual where each step may train another budget.
DEFAULTS = {"output_dir": "runs/elastic", "learning_rate": 9e-5, "max_loss_jump": 0.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure latencies; or train parent and router (or resume), find the budgets, and save."""
    data, rows_dealt, elastic, knowledge, start, training = parse(
        (DataArguments, RowArguments, ElasticArguments, TeacherArguments, ModelArguments, NemotronHTrainingArguments), argv, __doc__,
        "nemotron-h elastic-train", **DEFAULTS,
    )  # fmt: skip
    require(start.model is not None, "model", start.model, "a parent made by nemotron-h elasticize")
    weight = training.mtp_loss_weight
    require(
        weight == 0,
        "mtp_loss_weight",
        weight,
        "0: train the heads of a parent by pretrain or sft, of a child after slice",
    )
    evaluate_every(data, training)
    repo_id = take_push(training)
    with writing_run(training, start.model, knowledge.teacher):
        return run(data, rows_dealt, elastic, knowledge, start, training, repo_id)


def run(
    data: DataArguments,
    rows_dealt: RowArguments,
    elastic: ElasticArguments,
    knowledge: TeacherArguments,
    start: ModelArguments,
    training: NemotronHTrainingArguments,
    repo_id: str | None,
) -> int:
    """The work, in a folder that no other run writes to."""
    disable_progress_bar()
    set_seed(training.seed)
    model = load_model(start, start.model, NemotronHConfig.from_preset)
    if elastic.keep_sizes:
        route = kept_route(model.config)
    else:
        axes, layer_order = find_axes(model.config, elastic)
        if elastic.measure_latency:
            return write_latency(model.config, axes, elastic, training)
        route = find_route(model.config, axes, layer_order, elastic)
    require(training.max_steps > 0, "total_tokens", training.total_tokens, "a number of tokens, for instance 2M")
    more = interpolated_targets(elastic, route)
    tokenizer = load_tokenizer(start, start.model, model.config.vocab_size)
    set_chat_template(tokenizer, data.chat_template)
    rows, held_out = make_rows(data, training, tokenizer, shuffle_rows=rows_dealt.shuffle_rows)
    total = training.max_steps * training.tokens_per_step
    trainer = ElasticTrainer(
        model, training, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer,
        flops_per_token=training_flops_per_token(model.config, training.sequence_length),
        route=route, stages=stages_of(elastic.stages, list(route.targets), total, training.sequence_length),
        teacher=find_teacher(model, knowledge), temperature=knowledge.temperature,
        cross_entropy_weight=knowledge.cross_entropy_weight, router_learning_rate=elastic.router_learning_rate,
        router_warmup_steps=elastic.router_warmup_steps, router_loss_weight=elastic.router_loss_weight,
        sandwich=elastic.sandwich, live_teacher=elastic.live_teacher,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)
    tell_left_out(rows.documents.left_out())
    folder = finish(trainer, more, elastic.calibrate, tokenizer)
    if repo_id is not None and folder is not None:
        print(upload_folder(folder, repo_id, bool(training.hub_private_repo)))
    return 0


def find_axes(config: NemotronHConfig, elastic: ElasticArguments) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
    """What the router may choose, and the parent's layers by importance."""
    named = read_elastic(config) if config.elastic else None
    choices = elastic.choices or (dict(named.choices) if named else {})
    require(
        bool(choices), "choices", choices, "sizes by field; nemotron-h elasticize writes them into the parent's config"
    )
    require(isinstance(choices, Mapping), "choices", choices, "a mapping of fields to lists of sizes")
    order = named.layer_order if named else ()
    if "layers" in choices:
        require(bool(order), "choices.layers", choices["layers"], "none: the parent has no elastic.layer_order")
    return axes_of(config, choices, elastic.per_layer or ()), order


def find_route(
    config: NemotronHConfig, axes: Sequence[Axis], layer_order: Sequence[int], elastic: ElasticArguments
) -> Route:
    """Axes, cost and targets of the run."""
    table = None
    if elastic.metric == "latency":
        path = Path(elastic.latency_table or "")
        require(path.is_file(), "latency_table", elastic.latency_table, "a file that --measure_latency has written")
        table = read_json(path)
    cost = ExpectedCost(config, axes, elastic.metric, layer_order, elastic.cost_context, elastic.cost_batch_size,
                        elastic.cost_dtype, table)  # fmt: skip
    settings = RouterSettings(
        elastic.router_width, temperature=tuple(elastic.gumbel_temperature), logit_scale=tuple(elastic.logit_scale),
        normalize_logits=elastic.normalize_logits, hard_share=elastic.hard_share,
    )  # fmt: skip
    return Route(tuple(axes), cost, targets_of(elastic.budgets, elastic.metric, cost.full), layer_order, settings)


def kept_route(config: NemotronHConfig) -> Route:
    """The budgets that a parent names, with the sizes that they have."""
    budgets = read_elastic(config).budgets if config.elastic else {}
    children = [child_of(config, budget) for budget in budgets.values()]
    children.sort(key=lambda child: -child.num_parameters)
    is_parent = [child.is_whole() for child in children]
    require(
        is_parent.count(True) == 1 and len(children) > 1, "keep_sizes", sorted(budgets),
        "a parent that names itself and smaller budgets in elastic.budgets, as elastic-train leaves it",
    )  # fmt: skip
    children.insert(0, children.pop(is_parent.index(True)))
    targets = {child.name: float(child.num_parameters) for child in children}
    return Route(
        (), ExpectedCost(config, ()), targets, read_elastic(config).layer_order, fixed={c.name: c for c in children}
    )


def write_latency(
    config: NemotronHConfig, axes: Sequence[Axis], elastic: ElasticArguments, training: NemotronHTrainingArguments
) -> int:
    """Measure this machine and write the table."""
    path = Path(elastic.latency_table or "")
    require(elastic.latency_table is not None, "latency_table", elastic.latency_table, "the file to write")
    require(not path.exists(), "latency_table", str(path), "a new file, this one exists")
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    table = measure_latency(config, axes, elastic.cost_batch_size, training.sequence_length, device=training.device,
                            dtype=dtype)  # fmt: skip
    write_json(path, table)
    print(f"wrote {path}", file=sys.stderr)
    return 0


def find_teacher(model: PreTrainedModel, knowledge: TeacherArguments) -> PreTrainedModel:
    """Another checkpoint, its weights as they are stored, or a copy of the parent before it is trained.

    Where the parent has no weights (one_copy.py), the teacher has none either.
    """
    if knowledge.teacher is None:
        return copy.deepcopy(model).eval()
    device = device_to_load_on()
    return load_weights(knowledge.teacher, "teacher", dtype="auto", device_map=device).eval()


def interpolated_targets(elastic: ElasticArguments, route: Route) -> dict[str, float]:
    """Name -> target of the budgets that are not trained."""
    targets = {}
    for name, value in (elastic.interpolate or {}).items():
        require(str(name) not in route.targets, "interpolate", name, "names that budgets does not have")
        target = targets[str(name)] = parse_target(value, elastic.metric, route.cost.full, f"interpolate.{name}")
        smallest = min(route.targets.values())
        require(
            target >= smallest, f"interpolate.{name}", value, f"{smallest / route.cost.full:g} or more, as is trained"
        )
    return targets


def finish(
    trainer: ElasticTrainer, more: Mapping[str, float], calibrate: bool, tokenizer: PreTrainedTokenizerBase
) -> Path | None:
    """Budgets of the router's choices and for `more` targets, their held-out losses, and the parent as an ordinary checkpoint."""
    require_trained(trainer)
    model, route, routed = trainer.model, trainer.route, trainer.routed
    children = routed.children() | {name: routed.child(name, target) for name, target in more.items()}
    missed = missed_targets(trainer)
    losses: dict[str, float] = {}
    singles: dict[str, float] = {}
    if trainer.eval_dataset:
        losses = held_out_losses(trainer, children)
        if calibrate:
            singles = held_out_losses(trainer, single_sizes(model.config, route.axes, route.layer_order))
    model.config.elastic = elastic_after(model.config, route, children, losses, singles).to_dict()
    router_file = Path(trainer.args.output_dir, ROUTER_FILE)
    save_router(routed, router_file, write=trainer.is_world_process_zero())
    folder = save_finished(trainer, tokenizer)
    if folder is not None:
        write_manifest(folder)
        for name, child in children.items():
            count = child.num_parameters
            loss = f", held-out loss {losses[name]:.4f}" if name in losses else ""
            print(f"{name}: {count:,} parameters ({count / num_parameters(model.config):.1%}){loss}", file=sys.stderr)
        for line in missed:
            print(line, file=sys.stderr)
    return folder


def missed_targets(trainer: ElasticTrainer) -> list[str]:
    """A line for each budget that the router left at another size than it was asked for; every process calls this."""
    route, lines = trainer.route, []
    for name, target in route.targets.items():
        found = trainer.routed.chosen_cost(target)
        if abs(found / target - 1) >= DEAD_ZONE:
            lines.append(
                f"{name}: asked for {target / route.cost.full:.1%} of the parent's {route.cost.metric}, got "
                f"{found / route.cost.full:.1%}; a larger router_loss_weight (now {trainer.router_loss_weight:g}) or more "
                "steps bring it nearer"
            )
    return lines


def held_out_losses(trainer: ElasticTrainer, children: Mapping) -> dict[str, float]:
    """Name -> cross-entropy on the held-out rows."""
    metrics = trainer.evaluate(children=children)
    return {name: metrics[f"eval_{name}_cross_entropy"] for name in children}


if __name__ == "__main__":
    sys.exit(main())
