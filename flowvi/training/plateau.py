"""Detect that a bound has stopped rising."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

BLOCK, TRIM = 10, 2
LEAST = 400
EVERY = 50
# The last share of a trace that is used.
WINDOW = 0.5
# Worthwhile gain over half a window, in standard deviations of a single step's noise.
WORTH = 0.3
# Normal quantile of the one-sided 99 % bound on the gain.
ERRORS = 2.33


@dataclass
class Plateau:
    r"""Test for a plateau of a noisy bound.

    The later half of the trace, W steps, is cut into blocks of ten steps. Trimmed means
    of the blocks limit the effect of a single outlier. A least-squares line through the
    means predicts the gain g of the next W / 2 steps, with standard error s. The trace
    has reached a plateau when

    .. math:: |g| + 2.33 s \le \max(\tau, 0.3 \sigma), \qquad g \ge -s,

    at two checks in a row: it neither rises nor falls. :math:`\sigma` is the noise of
    a single step. Below it, steps of a constant size make no progress; a smaller
    step size or more draws do.

    Args:
        tolerance: Largest gain in nats that is ignored, :math:`\tau`.

    References:
        Welandawe, Andersen, Vehtari and Huggins (2024), "A framework for
        improving the reliability of black-box variational inference",
        JMLR 25(219): stopping by the gain that more work would bring.
    """

    tolerance: float = 1e-3
    values: list[float] = field(default_factory=list)
    in_a_row: int = 0

    def add(self, bound: float) -> bool:
        """Add the bound of a step; return whether two checks in a row found a plateau."""
        self.values.append(bound)
        if len(self.values) >= LEAST // 2 and len(self.values) % EVERY == 0:
            self.in_a_row = self.in_a_row + 1 if self.reached() else 0
        return self.in_a_row == 2

    def reached(self) -> bool:
        """Whether the trace ends in a plateau."""
        gain, error, noise = self.trend()
        # The noise estimate of a short trace is too inaccurate.
        enough = max(self.tolerance, WORTH * noise if len(self.values) >= LEAST else 0.0)
        return gain >= -error and abs(gain) + ERRORS * error <= enough

    def trend(self) -> tuple[float, float, float]:
        """Gain over half the window, its standard error, and the noise of single steps."""
        trace = np.asarray(self.values)
        blocks = int(WINDOW * len(trace)) // BLOCK
        trace = trace[len(trace) - blocks * BLOCK :]
        if not np.isfinite(trace).all():
            trace = np.where(np.isfinite(trace), trace, np.median(trace[np.isfinite(trace)]))
        middle = np.sort(trace.reshape(-1, BLOCK), axis=1)[:, TRIM:-TRIM].mean(1)
        # Differences are free of the trend; a normal's median absolute value is 0.6745 sd.
        noise = float(np.median(np.abs(np.diff(trace)))) / (0.6745 * math.sqrt(2))
        slope, error = _slope(middle)
        return slope * blocks / 2, error * blocks / 2, noise


def _slope(y: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of y against 0, 1, ..., and its standard error, for uneven noise."""
    x = np.arange(len(y)) - (len(y) - 1) / 2
    weight = x / (x @ x)
    slope = float(weight @ y)
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt((weight**2) @ rest**2 * len(y) / (len(y) - 2)))
