"""The seconds of a fit, and what a fit of a peer returns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

DRAWS = 4000
HIGH, LOW = 1e-2, 1e-4


@dataclass(frozen=True)
class Budget:
    """Wall seconds from now on.

    Args:
        seconds: Length of the optimisation.
    """

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def over(self) -> bool:
        return self.spent() >= self.seconds

    def step_size(self) -> float:
        """Adam's: from 1e-2 down to 1e-4, geometrically in the share of the time that is spent."""
        share = min(self.spent() / self.seconds, 1.0) if self.seconds > 0 else 1.0
        return float(HIGH * (LOW / HIGH) ** share)


@dataclass(frozen=True)
class Fitted:
    """Draws of a fit, (draw, *shape) for each name, its ELBO and its steps."""

    values: dict[str, np.ndarray]
    elbo: float
    steps: int
    note: str = ""
