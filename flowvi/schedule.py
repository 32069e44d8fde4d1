"""What decides about single steps: their size, and whether to take them at all."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

WINDOW = 100
WARM_UP = 20
FINAL_RATE = 0.01


def decayed(step: int, steps: int, lr: float) -> float:
    """Step size: a short linear warm-up, then a cosine down to a hundredth.

    Args:
        step: Number of the step, from 0.
        steps: Number of steps in all.
        lr: Largest step size.
    """
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return lr * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return lr * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Guard:
    """Judge gradients by their recent norms.

    A step is skipped if its bound or gradient is not finite, or the norm is
    above 10 x the median of the last 100; above 2 x it is clipped to that. The
    values of a gradient are never patched.
    """

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0

    def admits(self, bound: float, gradient: Tensor) -> tuple[bool, float]:
        """Whether to take the step; scales the gradient in place where it is too long."""
        norm = float(torch.linalg.vector_norm(gradient))
        if not (math.isfinite(bound) and math.isfinite(norm)):
            self.skipped += 1
            return False, norm
        median = float(np.median(self.norms)) if len(self.norms) >= WARM_UP else math.inf
        self.norms.append(norm)
        if norm > 10 * median:
            self.skipped += 1
            return False, norm
        if norm > 2 * median:
            gradient.mul_(2 * median / norm)
        return True, norm


@dataclass
class Average:
    """Running mean of a vector, from a given step on.

    References:
        Polyak and Juditsky (1992), doi:10.1137/0330046.
    """

    mean: Tensor | None = None
    count: int = 0

    def add(self, vector: Tensor) -> None:
        self.count += 1
        if self.mean is None:
            self.mean = vector.clone()
        else:
            self.mean += (vector - self.mean) / self.count
