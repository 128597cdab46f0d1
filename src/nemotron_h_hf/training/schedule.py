"""The learning rate over tokens: warm-up, stable, decay (WSD).

           ________________
          /                \\             factor(t), t tokens seen at the end of the step
         /                  \\            rises to 1 over the first `warmup` tokens,
        /                    \\_ min      falls to `min_ratio` over the last `decay` tokens
    0  w                  T-d  T

Nothing before the decay depends on the length of the run, so a run may be lengthened until its decay begins.
"""

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A WSD schedule, all lengths in tokens; `min_ratio` is where the decay ends, as a share of the peak."""

    total_tokens: int
    warmup_tokens: int
    decay_tokens: int
    min_ratio: float = 0.01
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("total_tokens", "warmup_tokens", "decay_tokens"):
            value = getattr(self, name)
            if not 0 <= value <= self.total_tokens:
                raise ValueError(f"{name}={value:,}: allowed is 0 to the run's total of {self.total_tokens:,}")
        if self.warmup_tokens + self.decay_tokens > self.total_tokens:
            raise ValueError(
                f"warmup_tokens={self.warmup_tokens:,}, decay_tokens={self.decay_tokens:,}: allowed is together at most the "
                f"run's total of {self.total_tokens:,}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio={self.min_ratio}: allowed is 0 to 1")
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: allowed are {', '.join(SHAPES)}")

    def factor(self, tokens: int) -> float:
        """Factor on the peak learning rate for the step ending at `tokens` tokens."""
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        remaining = self.total_tokens - tokens
        if remaining >= self.decay_tokens or self.decay_tokens == 0:
            return 1.0
        share = max(remaining, 0) / self.decay_tokens  # 1 where the decay begins, 0 at the end
        height = share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return self.min_ratio + (1 - self.min_ratio) * height


def scheduler(optimizer: Optimizer, schedule: Schedule, tokens_per_step: int) -> LambdaLR:
    """A torch scheduler that is stepped once per optimizer step and follows `schedule`."""
    return LambdaLR(optimizer, lambda step: schedule.factor((step + 1) * tokens_per_step))
