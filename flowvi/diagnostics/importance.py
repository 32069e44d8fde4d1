"""Importance weights: k-hat, evidence and bounds, each with its standard error.

Log weights are log p(x, z) - log q(z) of independent draws z ~ q. A draw outside the
support of p has weight zero (-inf); NaN and +inf are rejected.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics.pareto import PRIOR, log_sum, psislw, tail_size
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.display import Printed

MIN_DRAWS = 100
# Limit of k-hat for many draws.
MOST_KHAT = 0.7
# Differences below this are rounding errors of single precision.
ROUNDING = 1e-3
# Number of random partitions that a bound is averaged over; more change only the last digit.
PARTITIONS = 32
# The same number for each of many rows.
FEWEST = 4


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    se: float


class Psis(NamedTuple):
    """Smoothed, normalised log weights (S), and the Pareto shape of their right tail."""

    log_weights: np.ndarray
    khat: float


class RowPsis(NamedTuple):
    """Smoothed, normalised log weights of rows, (R, S), and their Pareto shapes, (R)."""

    log_weights: np.ndarray
    khat: np.ndarray

    def row(self, n: int) -> Psis:
        """Log weights and shape of one row."""
        return Psis(self.log_weights[n], float(self.khat[n]))


class Bound(NamedTuple):
    """Importance-weighted bound with K particles."""

    particles: int
    bound: float
    se: float


class RowBound(NamedTuple):
    """Importance-weighted bounds of rows with K particles, and their errors, (R)."""

    particles: int
    bound: np.ndarray
    se: np.ndarray


class Bounds(Printed, tuple[Bound, ...]):
    """One importance-weighted bound per number of particles.

    Attributes:
        rows: The bounds of each row, if there is a row axis; the elements are then their sums.
    """

    rows: tuple[RowBound, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'particles':>9}  {'bound':>12}"]
        for particles, bound, se in self:
            if math.isnan(bound):
                rows.append(f"{particles:9d}  {'-':>12}  needs at least {particles} draws")
            elif math.isnan(se):
                rows.append(f"{particles:9d}  {bound:12.4f}  +- unknown: too few draws")
            else:
                rows.append(f"{particles:9d}  {bound:12.4f}  +- {se:.2g}")
        return "\n".join(rows)


def as_chains(log_weights: ArrayLike) -> np.ndarray:
    """Check log weights, and convert them to (chain, draw); (S) is one chain."""
    log_w = np.atleast_2d(np.asarray(log_weights, dtype=np.float64))
    if log_w.ndim > 2:
        raise ValueError(f"Log weights have shape (draw) or (chain, draw); got {log_w.shape}.")
    check_weights(log_w)
    return log_w


def check_weights(log_w: np.ndarray) -> None:
    """Reject log weights, (chain, draw) or (chain, draw, row), that are too few or undefined."""
    chains, draws = log_w.shape[:2]
    if draws < MIN_DRAWS:
        raise ValueError(
            f"A diagnosis needs >= {MIN_DRAWS} draws in each chain; got {draws} in each of "
            f"{chains}. Draw more, for example fit.draw(4000)."
        )
    wrong = int(np.sum(np.isnan(log_w) | (log_w == np.inf)))
    if wrong:
        raise ValueError(
            f"{wrong} of {log_w.size} log weights are NaN or +inf. A draw outside the support "
            "has log weight -inf; anything else is an error of the model or the guide."
        )
    if not np.isfinite(log_w).any():
        raise ValueError(
            "Every log weight is -inf: no draw has positive density under the model. "
            "Check the model's supports and the start of the fit."
        )


def khat_threshold(draws: int) -> float:
    """Largest k-hat at which S draws estimate a mean reliably: min(1 - 1 / log10 S, 0.7).

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed
        importance sampling", JMLR 25(72), section 3.2.4.
    """
    return min(1.0 - 1.0 / math.log10(draws), MOST_KHAT)


def khat_error(khat: float, draws: int) -> float:
    r"""Standard error of a k-hat from S draws; infinite if k-hat is.

    .. math:: \frac{1 + k}{\sqrt{M}} \cdot \frac{M}{M + 10}

    for a tail of M draws: the asymptotic error of maximum likelihood, shrunk by the prior of k-hat.

    Args:
        khat: Shape of the tail, from `psis`.
        draws: Number of draws S.

    References:
        Smith (1987), "Estimating tails of probability distributions", Annals of Statistics 15(3).
    """
    size = tail_size(draws)
    return (1 + max(khat, -0.5)) * math.sqrt(size) / (size + PRIOR[1])


def psis(log_w: np.ndarray) -> Psis:
    """Smooth the largest weights by a generalised Pareto fit to their tail.

    If the weights of the tail are equal up to rounding, as when the guide equals the
    target, they are bounded: k-hat is -inf, and nothing is smoothed. If a few draws
    carry all the weight, k-hat is +inf.

    Args:
        log_w: Log weights, (S).

    References:
        Vehtari et al. (2024), JMLR 25(72). See `psislw`.
    """
    return psis_of_rows(log_w[None]).row(0)


def psis_of_rows(log_w: np.ndarray) -> RowPsis:
    """Smooth the weights of each row separately, as `psis` does. (R, S)."""
    top = np.partition(log_w, -tail_size(log_w.shape[1]), axis=1)[:, -tail_size(log_w.shape[1]) :]
    with np.errstate(all="ignore"):  # hopeless weights overflow inside the fit: k-hat is then inf
        smooth, khat = psislw(log_w)
        equal = top.max(1) - top.min(1) <= ROUNDING
    # No fit is possible for tails with few distinct values, or with such weights.
    failed = np.isnan(smooth).any(1)
    khat[equal] = -math.inf
    khat[np.isnan(khat)] = math.inf
    plain = equal | failed
    with np.errstate(invalid="ignore"):  # for weights that are all zero
        smooth[plain] = log_w[plain] - log_sum(log_w[plain])[:, None]
    return RowPsis(smooth, khat)


def log_evidence(log_w: np.ndarray) -> Estimate:
    r"""Importance-sampling estimate of the log evidence.

    .. math:: \log \hat p(x) = \log \tfrac{1}{S} \sum_s w_s

    The weights are not smoothed, so that their mean is unbiased for the evidence of
    any guide. The error follows from the delta method, sd(w) / (mean(w) sqrt(S));
    it is unreliable if k-hat is too large.

    Args:
        log_w: Log weights, (S).
    """
    value = log_sum(log_w) - math.log(len(log_w))
    return Estimate(float(value), _standard_error(np.exp(log_w - value)))


def with_tail(estimate: Estimate, log_w: np.ndarray, khat: float) -> Estimate:
    r"""Estimate of the log evidence with an error that includes the unobserved tail.

    Heavy weights are rare: most samples contain none, underestimate the mean, and have
    a small standard error. For a generalised Pareto tail with threshold u, shape k and
    scale :math:`\sigma`, above which M of S relative weights lie, the part of the mean
    weight beyond the quantile 1 - 1 / S is on average

    .. math:: \frac{1}{S} \Big(q + \frac{\sigma + k (q - u)}{1 - k}\Big), \qquad
              q = u + \sigma \frac{M^k - 1}{k},

    It is added to the standard error in quadrature, and is of the order of max(w) / S
    for small k.

    Args:
        estimate: The log of the mean weight, with its standard error.
        log_w: Log weights, (S).
        khat: Pareto shape of their tail, from `psis`.
    """
    if khat == -math.inf:
        return estimate
    size, k = tail_size(len(log_w)), min(max(khat, 0.01), 0.95)
    largest = np.sort(np.exp(log_w - estimate.value))[-size - 1 :]
    u, above = largest[0], largest[1:]
    sigma = (above.mean() - u) * (1 - k)
    q = u + sigma * (size**k - 1) / k
    unseen = (q + (sigma + k * (q - u)) / (1 - k)) / len(log_w)
    return Estimate(estimate.value, math.hypot(estimate.se, unseen))


def smoothed_evidence(log_w: np.ndarray, smooth: Psis) -> Estimate:
    """Log of the mean Pareto-smoothed weight: less noisy than `log_evidence`, slightly biased.

    Args:
        log_w: Log weights, (S).
        smooth: Result of `psis` for these weights.
    """
    # Smoothing does not change the smallest weight, which thus relates the two scales.
    least = int(np.argmin(np.where(np.isfinite(log_w), log_w, np.inf)))
    value = log_w[least] - smooth.log_weights[least] - math.log(len(log_w))
    relative = np.exp(smooth.log_weights) * len(log_w)
    return Estimate(float(value), _standard_error(relative))


def debiased(log_w: np.ndarray, particles: int) -> Estimate:
    r"""Importance-weighted bound without its leading bias: an estimate, no longer a bound.

    .. math:: L_K + \mathrm{CV}^2 / 2K, \qquad
              \mathrm{CV}^2 = \mathrm{Var}(w) / E(w)^2

    Args:
        log_w: Log weights, (S).
        particles: Number of particles K, with at least two blocks of K draws.

    References:
        Domke and Sheldon (2018), "Importance weighting and variational
        inference", arXiv:1808.09034: K (log p - L_K) -> CV^2 / 2.
    """
    value, error = debiased_of_rows(log_w[:, None], particles)
    return Estimate(float(value[0]), float(error[0]))


def debiased_of_rows(log_w: np.ndarray, particles: int) -> tuple[np.ndarray, np.ndarray]:
    """The estimate of `debiased` for each row, and its error. (S, R) -> (R), (R)."""
    draws, rows = log_w.shape
    relative = np.exp(log_w - (log_sum(log_w.T) - math.log(draws)))  # mean 1
    square = (relative**2).mean(0)
    value = _iw_bound(log_w, particles).bound + (square - 1) / (2 * particles)
    # Influence of each draw on CV^2, by the delta method; blocks combine the errors of both terms.
    influence = relative**2 - square - 2 * square * (relative - 1)
    shape = draws // particles, particles, rows
    w, i = (a[: shape[0] * particles].reshape(shape) for a in (log_w, influence))
    return value, _standard_errors(log_sum(w.swapaxes(1, 2)) + i.mean(1) / (2 * particles))


def elbo(log_w: np.ndarray) -> Estimate:
    """Mean of the log weights; -inf if a draw is outside of the target's support."""
    return Estimate(float(log_w.mean()), _standard_error(log_w))


def gap(log_w: np.ndarray) -> Estimate:
    r"""Estimate of KL(q || p) from log weights (S): log evidence minus ELBO.

    Both are estimated from the same draws. The error of their difference is far
    smaller than that of either if q is close to p.
    """
    evidence, bound = log_evidence(log_w).value, elbo(log_w).value
    return Estimate(evidence - bound, _standard_error(np.exp(log_w - evidence) - log_w))


def iw_bounds(log_w: np.ndarray, particles: Sequence[int]) -> Bounds:
    r"""Importance-weighted bounds from one set of draws.

    .. math:: L_K = E \log \tfrac{1}{K} \sum_{k=1}^K w_k \le \log p(x)

    Each bound is a mean over disjoint blocks of K draws, averaged over random
    partitions into blocks. It is unbiased for L_K, hence a lower bound in
    expectation. The standard error is that of one partition, which is at least the
    error of the average. It is NaN for one block; both are NaN for fewer than K
    draws.

    Args:
        log_w: Log weights, (S).
        particles: Numbers of particles K.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519.
    """
    rows = iw_bounds_of_rows(log_w[:, None], particles).rows
    return Bounds(Bound(k, float(bound[0]), float(se[0])) for k, bound, se in rows)


def iw_bounds_of_rows(log_w: np.ndarray, particles: Sequence[int]) -> Bounds:
    """Sums of the bounds of rows, whose draws are independent, with the bounds of each row.

    Args:
        log_w: Log weights, (S, R).
        particles: Numbers of particles K.
    """
    rows = tuple(_iw_bound(log_w, check_integer("particles", count)) for count in particles)
    sums = Bounds(
        Bound(k, float(bound.sum()), float(np.sqrt((se**2).sum()))) for k, bound, se in rows
    )
    sums.rows = rows
    return sums


def _iw_bound(log_w: np.ndarray, particles: int) -> RowBound:
    draws, rows = log_w.shape
    blocks = draws // particles
    if blocks == 0:
        none = np.full(rows, math.nan)
        return RowBound(particles, none, none)
    rng = np.random.default_rng(0)
    means, variances = np.zeros(rows), np.zeros(rows)
    # A sum over many rows already averages over many partitions.
    partitions = 1 if particles == 1 else max(FEWEST, PARTITIONS // rows)
    for _ in range(partitions):
        parts = log_w[rng.permutation(draws)[: blocks * particles]]
        values = log_sum(parts.reshape(blocks, particles, rows).swapaxes(1, 2))
        values -= math.log(particles)
        means += values.mean(0) / partitions
        variances += _standard_errors(values) ** 2 / partitions
    return RowBound(particles, means, np.sqrt(variances))


def _standard_errors(values: np.ndarray) -> np.ndarray:
    """Standard errors of means along the first axis; NaN for one value or infinite values."""
    if len(values) < 2:
        return np.full(values.shape[1:], math.nan)
    finite = np.isfinite(values).all(0)
    spread = np.where(finite, values, 0.0).std(0, ddof=1) / math.sqrt(len(values))
    return np.where(finite, spread, math.nan)


def _standard_error(values: np.ndarray) -> float:
    return float(_standard_errors(values))
