"""The Linear layers of a model, called alone at the shapes of a job: what every implementation in PyTorch must take.

b batch (1), l length
"""

from collections.abc import Callable

import torch
from torch import nn

from ..model.linear import project
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from .jobs import timed
from .models import Side
from .records import Measurement
from .turns import Bench, Job

SIDE = "linear"  # the name of this side
AS_CALLED, BY_TORCH = "as the model calls them", "by torch's linear"


def linear_steps(bench: Bench, side: Side, context: int, steps: int, by_torch: bool = False) -> Job:
    """As `jobs.decode` of one row: a sample is one step."""
    found = Measurement("decode", SIDE, BY_TORCH if by_torch else AS_CALLED, 1, context)
    work = forward(side.model, 1, by_torch)
    return _job(bench, found, lambda: [timed(bench.device, work) for _ in range(steps)], work, 1)


def linear_prompt(bench: Bench, side: Side, length: int) -> Job:
    """As `jobs.prefill_prompts` of one row."""
    work = forward(side.model, length)
    found = Measurement("prefill", SIDE, AS_CALLED, 1, length)
    return _job(bench, found, lambda: [timed(bench.device, work)], work, length)


def linear_training(bench: Bench, side: Side, length: int) -> Job:
    """As `jobs.train` without the optimizer."""
    work = forward_and_backward(side.model, length)
    found = Measurement("train", SIDE, AS_CALLED, 1, length)
    return _job(bench, found, lambda: [timed(bench.device, work)], work, length)


def _job(bench: Bench, found: Measurement, sample: Callable, work: Callable, tokens: int) -> Job:
    return Job(
        found,
        sample,
        lambda: timed(bench.device, work),
        lambda found: {"tokens_per_second": tokens / found.median},
    )


def forward(model: NemotronHForCausalLM, length: int, by_torch: bool = False) -> Callable[[], None]:
    """Every Linear of the stack at (1, l, in), `lm_head` at the last position; as the model calls them, or `by_torch`."""

    def call(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x) if by_torch else project(linear, x)

    linears = stack_linears(model)
    inputs = {width: torch.randn(1, length, width) for width in {linear.in_features for linear in linears}}
    head_input = torch.randn(1, 1, model.lm_head.in_features)

    @torch.no_grad()
    def run() -> None:
        for linear in linears:
            call(linear, inputs[linear.in_features])
        call(model.lm_head, head_input)

    return run


def forward_and_backward(model: NemotronHForCausalLM, length: int) -> Callable[[], None]:
    """Every Linear, `lm_head` at all positions: forward, then the gradients of its input and its weights."""
    linears = [*stack_linears(model), model.lm_head]
    inputs = {width: torch.randn(1, length, width, requires_grad=True) for width in {n.in_features for n in linears}}
    outputs = {width: torch.randn(1, length, width) for width in {n.out_features for n in linears}}

    def run() -> None:
        for linear in linears:
            given = inputs[linear.in_features]
            torch.autograd.grad(project(linear, given), (given, *linear.parameters()), outputs[linear.out_features])

    return run


def stack_linears(model: NemotronHForCausalLM) -> list[nn.Linear]:
    """The Linear layers of all blocks, in order."""
    return [module for module in model.model.modules() if isinstance(module, nn.Linear)]
