"""Pareto smoothing of importance weights, which every fit needs, and without ArviZ.

To import ArviZ takes as long as a short fit trains. The fit of the tail is Pyro's.
"""

import math

import numpy as np
import torch
from pyro.ops.stats import fit_generalized_pareto
from scipy.special import logsumexp

# To fewer weights, no tail is fitted.
FEWEST = 5
# Of k, which the fit weighs like so many more draws.
PRIOR = 0.5, 10


def tail_size(draws: int) -> int:
    """How many weights make the tail that a Pareto distribution is fitted to."""
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def psislw(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed, normalised log weights of (S), and k-hat.

    Above the weight u next below the M largest, a generalised Pareto distribution with shape k
    and scale :math:`\sigma` is fitted to these. The m-th smallest of them becomes

    .. math:: u + \frac{\sigma}{k} \big((1 - p)^{-k} - 1\big), \qquad p = \frac{m - 1/2}{M},

    but no larger than the largest weight was. Nothing is smoothed where no such distribution
    fits, as of a tail of few different values, and where it has fewer than five; k-hat is then inf.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed
        importance sampling", JMLR 25(72), section 3.1. As in ArviZ.
    """
    x = log_w - log_w.max()
    order = np.argsort(x)
    cutoff = max(x[order[-tail_size(len(x)) - 1]], math.log(np.finfo(float).tiny))
    tail = order[x[order] > cutoff]
    khat, sigma = math.inf, 0.0
    if len(tail) >= FEWEST:
        u = math.exp(cutoff)
        try:
            khat, sigma = fit_generalized_pareto(torch.from_numpy(np.exp(x[tail]) - u))
        except ZeroDivisionError:  # k = sigma k = 0: the prior of k is left
            khat = PRIOR[0] * PRIOR[1] / (len(tail) + PRIOR[1])
        if math.isfinite(khat) and sigma > 0:
            p = (np.arange(len(tail)) + 0.5) / len(tail)
            excess = np.expm1(-khat * np.log1p(-p)) / khat if khat else -np.log1p(-p)
            x[tail] = np.minimum(np.log(u + sigma * excess), 0.0)
    return x - logsumexp(x), khat
