"""An estimate of KL(q || p) from the noise of the training steps, which costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def noise_gap(bounds: Sequence[float], draws: int) -> float:
    r"""Estimate KL(q || p) from the ELBOs of steps in a row.

    The ELBO of a step is the mean of n log weights, so its variance is that of a log weight
    over n. If log weights are normal with variance :math:`\sigma^2`, then

    .. math:: \mathrm{KL}(q \| p) = \log E_q[w] - E_q[\log w] = \sigma^2 / 2.

    The variance of a step is taken from differences between steps, which are free of the
    trend. The estimate is low for heavy tails, and blind to what the guide misses.
    It is infinite if a bound is not finite.

    Args:
        bounds: ELBOs of consecutive steps, at least two.
        draws: Number n of draws in each.
    """
    values = np.asarray(bounds, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return math.inf
    return float(0.25 * draws * np.mean(np.diff(values) ** 2))
