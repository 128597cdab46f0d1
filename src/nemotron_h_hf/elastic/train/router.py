"""The router: from a budget, as a one-hot vector, to a distribution over the sizes of every axis (Nemotron Elastic, 2511.16664).

    h = LeakyReLU(W1 u + b1), z = W2 h + b2                                eq. 7 and 8, one such network for each axis
    pi = softmax((s z + g) / t), g ~ Gumbel(0, 1)                          eq. 11; over an axis's choices, row by row

The temperature t falls from 1 to 0.05, by the same factor each step, and the logit scale s rises linearly from 1 to 10: at
the beginning every size is tried, at the end one is chosen. Where paper and NVIDIA's released code differ, this is: width
256 and biases (paper), weights N(0, 0.1^2), slope 0.1 and the option of normalised logits, s z / std(z) (code).

A hard choice is one-hot forwards and has the soft one's gradient backwards (straight through). A budget between
two trained ones is asked for by a mixture of their one-hot vectors.

    n budgets, r rows (1, or a layer each), c choices
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choices import Axis

NEGATIVE_SLOPE = 0.1


@dataclass(frozen=True)
class RouterSettings:
    """Size, start and schedule of a router.

    `temperature` and `logit_scale` are (first, last). `hard_share` of the micro-steps choose one size instead of a mixture.
    """

    width: int = 256
    init_std: float = 0.1
    temperature: tuple[float, float] = (1.0, 0.05)
    logit_scale: tuple[float, float] = (1.0, 10.0)
    normalize_logits: bool = False
    hard_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "logit_scale"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are two numbers above 0, first and last")
        for name in ("width", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: allowed is more than 0")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share={self.hard_share}: allowed is 0 to 1")

    def temperature_at(self, progress: float) -> float:
        """t at a progress from 0, the first step, to 1, the last."""
        first, last = self.temperature
        return first * (last / first) ** progress

    def logit_scale_at(self, progress: float) -> float:
        """s at a progress from 0 to 1."""
        first, last = self.logit_scale
        return first + (last - first) * progress


class Router(nn.Module):
    """One network per axis; computed in fp32 in any context."""

    def __init__(self, axes: Sequence[Axis], num_budgets: int, settings: RouterSettings = RouterSettings()) -> None:
        super().__init__()
        self.rows = {axis.field: axis.num_rows for axis in axes}
        self.normalize_logits = settings.normalize_logits
        self.networks = nn.ModuleDict(
            {axis.field: _network(num_budgets, axis.num_rows * axis.num_choices, settings) for axis in axes}
        )

    def forward(self, budget: Tensor) -> dict[str, Tensor]:
        """budget (n), one-hot or between two -> field -> logits (r, c), without the scale."""
        logits = {}
        for field, (first, _, last) in self.networks.items():
            with torch.autocast(budget.device.type, enabled=False):
                hidden = F.leaky_relu(F.linear(budget, first.weight.float(), first.bias.float()), NEGATIVE_SLOPE)
                found = F.linear(hidden, last.weight.float(), last.bias.float()).view(self.rows[field], -1)
            spread = found.std().clamp(min=1e-6) if self.normalize_logits else 1.0
            logits[field] = found / spread
        return logits


def choose(
    logits: Mapping[str, Tensor],
    scale: float,
    temperature: float,
    noise: Mapping[str, Tensor] | None = None,
    hard: bool = False,
) -> dict[str, Tensor]:
    """Field -> (r, c): softmax((s z + g) / t), without g if there is no noise; one-hot, straight through, if hard."""
    chosen = {}
    for field, z in logits.items():
        g = 0.0 if noise is None else noise[field].to(z)
        soft = ((scale * z + g) / temperature).softmax(-1)
        one = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        chosen[field] = one + (soft - soft.detach()) if hard else soft
    return chosen


def argmax_indices(logits: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Field -> the index chosen in each row."""
    return {field: z.argmax(-1).tolist() for field, z in logits.items()}


def gumbel_noise(axes: Sequence[Axis], generator: torch.Generator) -> dict[str, Tensor]:
    """Field -> (r, c) of Gumbel(0, 1), on the CPU: the same on every process that has the same generator."""
    noise = {}
    for axis in axes:
        uniform = torch.rand(axis.num_rows, axis.num_choices, generator=generator)
        noise[axis.field] = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    return noise


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU that depends on these numbers alone: seed, step, micro-step; never on the process."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def budget_vector(targets: Sequence[float], target: float) -> Tensor:
    """(n): one-hot for a target that is in the list, otherwise the mixture of its two neighbours that has its size.

    Raises:
        ValueError: for a target outside of the list's range.
    """
    if not min(targets) <= target <= max(targets):
        raise ValueError(f"budget={target:g}: allowed is {min(targets):g} to {max(targets):g}, what is trained")
    above = min((value, index) for index, value in enumerate(targets) if value >= target)
    below = max((value, index) for index, value in enumerate(targets) if value <= target)
    share = 1.0 if math.isclose(above[0], below[0]) else (target - below[0]) / (above[0] - below[0])
    vector = torch.zeros(len(targets))
    vector[below[1]] += 1 - share
    vector[above[1]] += share
    return vector


def _network(num_in: int, num_out: int, settings: RouterSettings) -> nn.Sequential:
    layers = nn.Linear(num_in, settings.width), nn.LeakyReLU(NEGATIVE_SLOPE), nn.Linear(settings.width, num_out)
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=settings.init_std)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
