"""Ranks of true values among posterior draws, with tests of uniformity and symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics.finding import VERDICTS
from flowvi.runtime.display import Displayed

# Significance level of the tests.
LEVEL = 0.01
# Samples of uniform numbers behind a simultaneous band.
SIMULATED = 2000
# With fewer fits the tests have little power: for one scalar, 100 fits detect a standard
# deviation that is 20 % too small with probability 0.6.
ENOUGH = 100


class Uniformity(NamedTuple):
    """p-values of two tests of uniform ranks, one entry per scalar, (P)."""

    ks: np.ndarray
    width: np.ndarray


def rank(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of draws (L, P) below the truth (P), ties broken at random: 0 to L."""
    equal = (draws == truth).sum(0)
    return (draws < truth).sum(0) + rng.integers(0, equal + 1)


def uniformity(ranks: np.ndarray, levels: int) -> Uniformity:
    """Test that ranks are uniform on 0, ..., L, as for a calibrated posterior.

    The Kolmogorov-Smirnov test detects shifts. The sum of squares of the normal scores,
    chi-squared with M degrees of freedom, detects wrong widths. Each rank is spread
    uniformly over its cell, which makes both tests exact.

    Args:
        ranks: Ranks of M simulations and P scalars, (M, P).
        levels: Number L of draws for each rank.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788.
    """
    from scipy import stats  # slow to import

    u = (ranks + np.random.default_rng(0).random(ranks.shape)) / (levels + 1)
    ks = np.array([stats.kstest(column, "uniform").pvalue for column in u.T])
    squares = (stats.norm.ppf(u) ** 2).sum(0)
    lower = stats.chi2.cdf(squares, len(ranks))
    return Uniformity(ks, 2 * np.minimum(lower, 1 - lower))


def ecdf_band(fits: int, cells: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Ends of a band that holds the whole ECDF of uniform numbers with probability 1 - level.

    Args:
        fits: Number M of uniform numbers.
        cells: Points of the unit interval at which the ECDF is looked at, (K).
        level: Probability that the ECDF leaves the band at any of them.

    Returns:
        Lower and upper end at each point, as shares, (K) each.

    References:
        Saeilynoja, Buerkner and Vehtari (2022), "Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison", Statistics and
        Computing 32, algorithm 1.
    """
    from scipy import stats  # slow to import

    rng = np.random.default_rng(0)
    uniform = np.sort(rng.random((SIMULATED, fits)), axis=1)
    counts = np.stack([np.searchsorted(row, cells, side="right") for row in uniform])
    below = stats.binom.cdf(counts, fits, cells)
    above = stats.binom.sf(counts - 1, fits, cells)
    # The pointwise level at which a share `level` of uniform samples leaves the band.
    pointwise = np.quantile(2 * np.minimum(below, above).min(1), level)
    low = stats.binom.ppf(pointwise / 2, fits, cells) / fits
    return low, stats.binom.isf(pointwise / 2, fits, cells) / fits


def symmetry(probabilities: np.ndarray) -> np.ndarray:
    """Test that P_q(theta < truth), (M, P), is symmetric about 1/2: p-values (P).

    By Wilcoxon's signed-rank test. A guide that is too wide or too narrow may pass;
    its mean is right in this case.

    References:
        Yao, Vehtari, Simpson and Gelman (2018), arXiv:1802.02538, section 4.
    """
    from scipy import stats  # slow to import

    return np.array([stats.wilcoxon(column - 0.5).pvalue for column in probabilities.T])


def adjusted(*p_values: np.ndarray) -> float:
    """The smallest of all p-values after Bonferroni's correction; 1 without p-values."""
    joined = np.concatenate([np.ravel(p) for p in p_values])
    return float(min(1.0, joined.min() * joined.size)) if joined.size else 1.0


class Recovery(NamedTuple):
    """True values of parameters and what the draws say of them.

    Attributes:
        truth: True values, (M, P).
        mean: Means of the draws, (M, P): resampled ones, and plain ones where neither is trusted.
        sd: Their standard deviations, (M, P).
    """

    truth: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    @property
    def z_scores(self) -> np.ndarray:
        """(mean - truth) / sd, (M, P)."""
        return (self.mean - self.truth) / self.sd

    @property
    def contraction(self) -> np.ndarray:
        """1 - posterior variance / prior variance, (M, P).

        References:
            Schad, Betancourt and Vasishth (2021), arXiv:1904.12765.
        """
        low, high = np.quantile(self.truth, [0.16, 0.84], axis=0)
        # Half the middle 68 %: a heavy tail of the prior may have no variance.
        return 1 - (self.sd / (0.5 * (high - low))) ** 2


@dataclass(frozen=True, repr=False)
class Calibration(Displayed):
    """Ranks of true values among the draws of fits to simulated data.

    Attributes:
        labels: Names of the P scalars, such as ``theta[3]``.
        levels: Number L of draws for each rank.
        plain: Ranks among the guide's draws, (M, P), from 0 to L.
        resampled: Ranks among the resampled draws, (M, P).
        probabilities: P_q(theta < truth), (M, P).
        verdicts: Verdict on each of the M fits.
        failures: Messages of the fits that failed; these have no row.
        recovery: True values, means and standard deviations, for amortised guides; else None.
    """

    labels: tuple[str, ...]
    levels: int
    plain: np.ndarray
    resampled: np.ndarray
    probabilities: np.ndarray
    verdicts: tuple[str, ...]
    failures: tuple[str, ...] = ()
    recovery: Recovery | None = None

    def coverage(self, levels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Share of true values inside central intervals, for plain and resampled draws.

        Args:
            levels: Probabilities of the intervals, (K).

        Returns:
            Shares, (K, P) each; they equal the levels in expectation for calibrated draws.
        """
        wanted = np.asarray(levels, dtype=np.float64)[:, None, None]
        rng = np.random.default_rng(0)
        found = []
        for ranks in (self.plain, self.resampled):
            u = (ranks + rng.random(ranks.shape)) / (self.levels + 1)
            found.append((np.abs(2 * u - 1) <= wanted).mean(1))
        return found[0], found[1]

    @property
    def trusted(self) -> float:
        """Share of the fits whose plain or resampled draws are trusted."""
        return float(np.mean([verdict in VERDICTS[:2] for verdict in self.verdicts]))

    @property
    def enough(self) -> bool:
        """Whether the number of fits gives the tests enough power."""
        return len(self.plain) >= ENOUGH

    @property
    def uniform(self) -> dict[str, float]:
        """Adjusted p-values of the tests of uniformity, for plain and resampled draws."""
        kinds = {"plain": self.plain, "resampled": self.resampled}
        return {name: adjusted(*uniformity(ranks, self.levels)) for name, ranks in kinds.items()}

    @property
    def symmetric(self) -> float:
        """Adjusted p-value of the test of symmetry (VSBC)."""
        return adjusted(symmetry(self.probabilities))

    def __str__(self) -> str:
        uniform, symmetric = self.uniform, self.symmetric
        good = [name for name, p in uniform.items() if p >= LEVEL]
        by = f"by {len(self.plain)} fits to simulated data"
        if not good:
            head = f"Not calibrated, {by}"
        elif self.enough:
            head = f"The {' and '.join(good)} draws are calibrated, {by}"
        else:
            head = (
                f"Too few fits to decide: there is no evidence against the {' and '.join(good)} "
                f"draws, {by}. "
                f"At least {ENOUGH} fits are needed to detect a standard deviation that is 20 % off"
            )
        lines = [head]
        rows = [(f"ranks among {n} draws uniform", p, self._worst(n)) for n, p in uniform.items()]
        rows.append(("guide symmetric about the truth", symmetric, ""))
        lines += [f"  {what:<36} p = {p:<8.2g}{note}".rstrip() for what, p, note in rows]
        counts = {v: self.verdicts.count(v) for v in dict.fromkeys(self.verdicts)}
        lines.append(
            "  verdicts: " + ", ".join(f"{n} x {verdict}" for verdict, n in counts.items())
        )
        lines.append("  p-values are adjusted for the number of scalars and tests (Bonferroni)")
        if self.failures:
            lines.append(
                f"  - {len(self.failures)} fits failed and are left out, which can bias the ranks; "
                f"the first: {self.failures[0]}"
            )
        return "\n".join(lines)

    def _worst(self, name: str) -> str:
        """The scalar with the smallest p-value."""
        ks, width = uniformity(getattr(self, name), self.levels)
        i = int(np.argmin(np.minimum(ks, width)))
        return f"({self.labels[i]}: KS {ks[i]:.2g}, width {width[i]:.2g})"
