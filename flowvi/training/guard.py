"""Skip steps that are not finite, clip gradients, and detect a failed stage."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowvi.training.learning_rate import WARM_UP

WINDOW = 100
# A stage fails after so many skipped steps in a row, or so many among the last ones.
IN_A_ROW, MOST_FAILURES, FAILURE_WINDOW = 10, 10, 200


@dataclass
class Guard:
    """Accepts, clips or rejects gradients by their recent norms.

    A step is skipped if its bound or gradient is not finite. A norm above twice the
    median of the last 100 is clipped to that value. Steps with a huge norm are not
    skipped: they come from rare draws where p is almost zero, and the guide learns
    to avoid such regions only from them. Single values of a gradient are never
    replaced.

    Attributes:
        norms: Norms of the last gradients.
        failures: Whether each of the last steps was skipped.
        skipped: Total number of skipped steps.
    """

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    failures: deque[bool] = field(default_factory=lambda: deque(maxlen=FAILURE_WINDOW))
    skipped: int = 0

    @property
    def failing(self) -> bool:
        """Whether one of the last ten steps was skipped."""
        return any(list(self.failures)[-IN_A_ROW:])

    @property
    def failed(self) -> bool:
        """Whether the last ten steps were skipped, or more than 5 % of the last 200."""
        last = list(self.failures)[-IN_A_ROW:]
        return sum(self.failures) > MOST_FAILURES or (len(last) == IN_A_ROW and all(last))

    def forget(self) -> None:
        """Reset the count of failures."""
        self.failures.clear()

    def admits(self, bound: float, gradient: Tensor) -> tuple[bool, float]:
        """Return whether to take the step, and the norm; clip the gradient in place if needed."""
        norm = float(torch.linalg.vector_norm(gradient))
        finite = math.isfinite(bound) and math.isfinite(norm)
        self.failures.append(not finite)
        if not finite:
            self.skipped += 1
            return False, norm
        median = statistics.median(self.norms) if len(self.norms) >= WARM_UP else math.inf
        self.norms.append(norm)
        if norm > 2 * median:
            gradient.mul_(2 * median / norm)
        return True, norm
