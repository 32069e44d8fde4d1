"""Estimate the evidence from draws of the guide and draws of the posterior."""

import math

import numpy as np

from flowvi.compat.arviz_stats import ess
from flowvi.diagnostics.importance import Estimate, log_evidence


def eubo(chains: np.ndarray) -> Estimate:
    """Mean log weight of posterior draws, with an error that includes autocorrelation.

    The mean is an upper bound on the log evidence, in excess by KL(p || q).

    Args:
        chains: Log weights of posterior draws, (chain, draw).
    """
    error = chains.std(ddof=1) / math.sqrt(_effective(chains))
    return Estimate(float(chains.mean()), float(error))


def _effective(chains: np.ndarray) -> float:
    """Effective number of draws for the mean of a chain's log weights."""
    return ess(chains, "mean")


def bridge_evidence(log_w: np.ndarray, chains: np.ndarray) -> Estimate:
    r"""Bridge sampling between draws of the guide and of the posterior.

    With shares s of the two sets of draws, the estimate is the fixed point of

    .. math:: Z = \frac{E_q[w / (s_p w + s_q Z)]}{E_p[1 / (s_p w + s_q Z)]}

    Every term is bounded, so the error is finite for any tail of the weights.

    Args:
        log_w: Log weights of independent draws of the guide, (S).
        chains: Log weights of posterior draws, (chain, draw).

    References:
        Meng and Wong (1996), "Simulating ratios of normalizing constants via a
        simple identity", Statistica Sinica 6.
        Fruehwirth-Schnatter (2004), "Estimating marginal likelihoods",
        Econometrics Journal 7: the standard error.
    """
    effective = _effective(chains)
    value, at_q, at_p = _bridge(log_w, chains, effective)
    square = (at_q.std() / at_q.mean()) ** 2 / len(log_w)
    square += (at_p.std() / at_p.mean()) ** 2 / effective
    return Estimate(value, math.sqrt(square))


def short_bridge(log_w: np.ndarray, chains: np.ndarray) -> Estimate:
    """Bridge sampling by many short chains, whose independence gives the error.

    Args:
        log_w: Log weights of independent draws of the guide, (S).
        chains: Log weights along the chains, (chain, draw).
    """
    value, at_q, at_p = _bridge(log_w, chains, chains.size / 2)
    square = (at_q.std() / at_q.mean()) ** 2 / len(log_w)
    square += (at_p.mean(1).std() / at_p.mean()) ** 2 / len(chains)
    return Estimate(value, math.sqrt(square))


def with_bridge(weights: Estimate, bridge: Estimate) -> Estimate:
    """The bridge by short chains, whose error includes its distance from the mean weight.

    Weights leave out what no draw visits, and short chains visit but a part of it: their
    difference is of the order of what both leave out.

    Args:
        weights: Log of the mean weight.
        bridge: Result of `short_bridge`.
    """
    return Estimate(bridge.value, math.hypot(bridge.se, bridge.value - weights.value))


def _bridge(
    log_w: np.ndarray, chains: np.ndarray, effective: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """The fixed point, and the terms at draws of the guide, (S), and of the chains."""
    share = effective / (effective + len(log_w))
    value = log_evidence(log_w).value
    for _ in range(1000):
        at_q, at_p = _terms(log_w - value, share)[0], _terms(chains - value, share)[1]
        step = math.log(at_q.mean()) - math.log(at_p.mean())
        value += step
        if abs(step) < 1e-10:
            break
    return value, at_q, at_p


def _terms(log_ratio: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The ratios p / (s_p p + s_q q) and q / (s_p p + s_q q), from log p / q."""
    below = np.logaddexp(math.log(share) + log_ratio, math.log1p(-share))
    return np.exp(log_ratio - below), np.exp(-below)
