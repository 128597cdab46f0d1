"""The flags of elastic training: what is nested in the parent, and how the router finds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import require
from ...training.arguments import as_mapping, flag
from .expected_cost import METRICS


@dataclass
class ElasticArguments:
    """What is nested in the parent, and how the router finds it."""

    _argument_group_name = "elastic"

    budgets: dict | str | None = flag(None, "name -> size, a share of the parent (1.0 is itself) or such as 8.9B")
    keep_sizes: bool = flag(
        False, "instead of budgets and choices: train those that the parent names, as they are, without a router"
    )
    choices: dict | str | None = flag(
        None, "field -> sizes the router may choose, layers -> how many stay; default: the parent's elastic.choices"
    )
    per_layer: list[str] | None = flag(None, "fields for which every layer chooses for itself; default: none")
    stages: dict | str | None = flag(None, "list of {until, weights, sequence_length}; default: one, uniform")
    sandwich: bool = flag(
        False, "of a step's micro-steps the first trains the largest budget, the second the smallest; 2 or more"
    )
    live_teacher: bool = flag(
        False, "the parent as it is in that step teaches the smaller budgets, and its own teacher teaches it alone"
    )
    interpolate: dict | str | None = flag(None, "more budgets, name -> size, that the router is asked for at the end")
    calibrate: bool = flag(
        True, "with --eval_data: at the end, also the loss of every single size, to rank other budgets by"
    )
    metric: str = flag("parameters", "what sizes are measured in", choices=METRICS)
    cost_context: int = flag(8192, "with --metric memory: tokens in each sequence's cache")
    cost_batch_size: int = flag(1, "with --metric memory or --measure_latency: sequences")
    cost_dtype: str = flag("bfloat16", "with --metric memory: of weights and caches", choices=("bfloat16", "float32"))
    latency_table: str | None = flag(None, "with --metric latency: JSON file")
    measure_latency: bool = flag(False, "only measure this machine at sequence_length and write --latency_table")
    router_learning_rate: float = flag(1e-2, "of the router; the paper's")
    router_warmup_steps: int = flag(60, "steps over which it rises; the paper's")
    router_loss_weight: float = flag(
        10.0,
        "of the router's loss relative to the distillation loss; the paper's 1 is too little where narrow models lose much",
    )
    router_width: int = flag(256, "of its networks; the paper's")
    normalize_logits: bool = flag(False, "divide the router's logits by their deviation")
    gumbel_temperature: list[float] = field(
        default_factory=lambda: [1.0, 0.05], metadata={"help": "of the router's choices: first, last"}
    )
    logit_scale: list[float] = field(
        default_factory=lambda: [1.0, 10.0], metadata={"help": "of the logits: first, last"}
    )
    hard_share: float = flag(0.0, "share of micro-steps that choose one size, no mixture; layers left out do not run")

    def __post_init__(self) -> None:
        for name in ("budgets", "choices", "stages", "interpolate"):
            setattr(self, name, as_mapping(getattr(self, name), name))
        if self.keep_sizes:
            for name in ("budgets", "choices", "interpolate"):
                require(
                    not getattr(self, name), name, getattr(self, name), "none with keep_sizes: the parent names them"
                )
            require(self.metric == "parameters", "metric", self.metric, "parameters with keep_sizes")
        else:
            require(
                bool(self.budgets),
                "budgets",
                self.budgets,
                "a mapping of names to sizes such as {full: 1.0, small: 0.5}",
            )
        for name in ("cost_context", "cost_batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
