"""Ranks of true values among posterior draws: tests of uniformity and of symmetry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class Uniformity(NamedTuple):
    """p-values of two tests of uniform ranks, one entry per scalar, (P)."""

    ks: np.ndarray
    width: np.ndarray


def rank(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of draws (L, P) below the truth (P), ties broken at random: 0 to L."""
    equal = (draws == truth).sum(0)
    return (draws < truth).sum(0) + rng.integers(0, equal + 1)


def uniformity(ranks: np.ndarray, levels: int) -> Uniformity:
    """Test that ranks are uniform on 0, ..., L, as those of a calibrated posterior are.

    Kolmogorov and Smirnov's test sees shifts; a wrong width is seen by the
    sum of squares of the normal scores, chi-squared with M degrees of freedom.
    A rank is spread evenly over its cell, which makes both tests exact.

    Args:
        ranks: Of M simulations and P scalars, (M, P).
        levels: Number L of draws behind each rank.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788.
    """
    u = (ranks + np.random.default_rng(0).random(ranks.shape)) / (levels + 1)
    ks = np.array([stats.kstest(column, "uniform").pvalue for column in u.T])
    squares = (stats.norm.ppf(u) ** 2).sum(0)
    lower = stats.chi2.cdf(squares, len(ranks))
    return Uniformity(ks, 2 * np.minimum(lower, 1 - lower))


def symmetry(probabilities: np.ndarray) -> np.ndarray:
    """Test that P_q(theta < truth), (M, P), is symmetric about 1/2: p-values (P).

    A guide that is too wide or too narrow may pass; its mean is then right all
    the same. By Wilcoxon's signed ranks.

    References:
        Yao, Vehtari, Simpson and Gelman (2018), arXiv:1802.02538, section 4.
    """
    return np.array([stats.wilcoxon(column - 0.5).pvalue for column in probabilities.T])


def adjusted(*p_values: np.ndarray) -> float:
    """The smallest of all p-values by Bonferroni's correction; 1 where there are none."""
    joined = np.concatenate([np.ravel(p) for p in p_values])
    return float(min(1.0, joined.min() * joined.size)) if joined.size else 1.0
