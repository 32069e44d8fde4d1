"""Step-size schedules, and the test for a bound that has collapsed."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

WARM_UP = 20
FINAL_RATE = 0.01
# A collapse is a fall by at least so many nats and so many times the usual spread.
LEAST_FALL, SPREADS = 50.0, 10.0


def warm_up_rate(step: int, lr: float, steps: int = 10 * WARM_UP) -> float:
    """Step size with a short linear warm-up.

    Args:
        step: Index of the step, from 0.
        lr: The step size after the warm-up.
        steps: Total number of steps.
    """
    warm_up = min(WARM_UP, max(1, steps // 10))
    return lr * min(1.0, (step + 1) / warm_up)


def constant(lr: float) -> Callable[[int], float]:
    """A constant step size."""
    return lambda step: lr


def decayed(step: int, steps: int, lr: float, warm: bool = True) -> float:
    """Step size: a short linear warm-up, then a cosine down to a hundredth.

    Args:
        step: Index of the step, from 0.
        steps: Total number of steps.
        lr: Largest step size.
        warm: Whether to begin with a warm-up.
    """
    warm_up = min(WARM_UP, max(1, steps // 10)) if warm else 0
    if step < warm_up:
        return warm_up_rate(step, lr, steps)
    done = (step - warm_up) / max(1, steps - warm_up)
    return lr * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class BoundLevel:
    """Test for a collapse of a noisy bound, by medians of 20 steps.

    A collapse is a fall below the best median by more than 50 nats and ten times its spread.
    All steps are finite, but they lead away from the target.

    Attributes:
        values: Bounds of the last steps.
        best: The best median.
        spread: Interquartile range of the steps of the best median.
    """

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WARM_UP))
    best: float = -math.inf
    spread: float = 0.0

    def add(self, bound: float) -> None:
        """Add the bound of a step; ignore one that is not finite, which the guard handles."""
        if not math.isfinite(bound):
            return
        self.values.append(bound)
        if len(self.values) == WARM_UP and self.median > self.best:
            low, self.best, high = statistics.quantiles(self.values, n=4)
            self.spread = high - low

    def state_dict(self) -> Tensor:
        """The whole state as one vector, (2 + steps)."""
        return torch.tensor([self.best, self.spread, *self.values], dtype=torch.float64)

    def load_state_dict(self, state: Tensor) -> None:
        """Restore a state that `state_dict` returned."""
        self.best, self.spread, *values = state.tolist()
        self.values.extend(values)

    @property
    def median(self) -> float:
        """The median of the last steps."""
        return statistics.median(self.values)

    @property
    def floor(self) -> float:
        """Threshold below which the bound has collapsed."""
        return self.best - LEAST_FALL - SPREADS * self.spread

    @property
    def low(self) -> bool:
        """Whether most of the last three steps are below the threshold."""
        return sum(value < self.floor for value in list(self.values)[-3:]) > 1

    @property
    def collapsed(self) -> bool:
        """Whether the median of the last steps is below the threshold."""
        return len(self.values) == WARM_UP and self.median < self.floor
