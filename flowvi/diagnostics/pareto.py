"""Pareto smoothing of importance weights, without ArviZ.

The import of ArviZ takes as long as the training of a short fit.
"""

import math

import numpy as np

# Least number of weights for a fit of the tail.
FEWEST = 5
# Prior mean of k, and its weight as a number of draws.
PRIOR = 0.5, 10
# Size of a part in the fit of many tails, and the least weight of a candidate.
NUMBERS, LEAST = 4_000_000, 1e-30


def tail_size(draws: int) -> int:
    """Number of weights in the tail that the Pareto distribution is fitted to."""
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def psislw(log_w: np.ndarray, tail: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    r"""Pareto-smoothed, normalised log weights of each row, and its k-hat. (R, S) -> (R, S), (R).

    A generalised Pareto distribution with shape k and scale :math:`\sigma` is fitted to the M
    largest weights, with the next smaller weight u as threshold. The m-th smallest of them becomes

    .. math:: u + \frac{\sigma}{k} \big((1 - p)^{-k} - 1\big), \qquad p = \frac{m - 1/2}{M},

    but at most the largest original weight. Weights are not smoothed if the tail has fewer than
    five of them, or if no distribution fits, as for few distinct values; k-hat is then inf.

    Args:
        log_w: Log weights, (R, S).
        tail: Number of weights M; `tail_size` of their number by default.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed
        importance sampling", JMLR 25(72), section 3.1. The results agree with ArviZ.
    """
    x = log_w - log_w.max(1, keepdims=True)
    order = np.argsort(x, axis=1)[:, -(tail or tail_size(x.shape[1])) - 1 :]
    largest = np.take_along_axis(x, order, 1)
    cutoff = np.maximum(largest[:, 0], math.log(np.finfo(float).tiny))
    sizes = (largest[:, 1:] > cutoff[:, None]).sum(1)
    khat = np.full(len(x), np.inf)
    for size in np.unique(sizes[sizes >= FEWEST]):
        # Rows with equal tail sizes are fitted together.
        rows = np.flatnonzero(sizes == size)
        u = np.exp(cutoff[rows])[:, None]
        khat[rows], sigma = _fitted(np.exp(largest[rows, -size:]) - u)
        fits = np.isfinite(khat[rows]) & (sigma > 0)
        rows, u, sigma, k = rows[fits], u[fits], sigma[fits, None], khat[rows[fits], None]
        log_q = np.log1p(-(np.arange(size) + 0.5) / size)
        zero = k == 0
        excess = np.where(zero, -log_q, np.expm1(-k * log_q) / np.where(zero, 1.0, k))
        smooth = np.minimum(np.log(u + sigma * excess), 0.0)
        x[rows[:, None], order[rows, -size:]] = smooth
    return x - log_sum(x)[:, None], khat


def log_sum(x: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials along the last axis; -inf if all terms are."""
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(np.exp(x - top).sum(-1)) + top[..., 0]
    return found


def _fitted(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape k and scale of generalised Pareto distributions for sorted data (R, N).

    Likelihood-weighted mean over candidates b = k / sigma, with k shrunk towards 1/2.

    References:
        Zhang and Stephens (2009), "A new and efficient estimation method for the generalized
        Pareto distribution", Technometrics 51(3).
    """
    n = x.shape[1]
    size = max(1, NUMBERS // (n * (30 + int(math.sqrt(n)))))
    parts = [_candidates(x[i : i + size]) for i in range(0, len(x), size)]
    b = np.concatenate(parts)
    k = np.log1p(-b[:, None] * x).mean(1)
    none = b == 0  # no likely candidate: only the prior of k is left
    sigma = np.where(none, 0.0, -k / np.where(none, 1.0, b))
    return (k * n + PRIOR[0] * PRIOR[1]) / (n + PRIOR[1]), sigma


def _candidates(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    count = 30 + int(math.sqrt(n))
    spread = 1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))
    b = spread / (3 * x[:, int(n / 4 - 0.5), None]) + 1 / x[:, -1:]
    k = np.log1p(-b[..., None] * x[:, None]).mean(-1)
    likelihood = n * (np.log(-b / k) - (k + 1))
    weights = np.exp(likelihood - log_sum(likelihood)[:, None])
    weights = np.where(weights > LEAST, weights, 0.0)
    total = weights.sum(1)
    found: np.ndarray = (b * weights).sum(1) / np.where(total > 0, total, 1.0)
    return found
