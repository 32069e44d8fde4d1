"""Draws of equal weight, by stratified resampling."""

import warnings
from dataclasses import asdict

import numpy as np

from flowvi import diagnostics
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import EXPECTED, Draws
from flowvi.runtime.arguments import given, shared_alone, wanted, whole


def resample(draws: Draws, seed: int = 0, n: int | None = None) -> Draws:
    """Resample by Pareto-smoothed importance weights: draws of p, if k-hat allows.

    Stratified, with replacement. All chains are pooled into one, because
    their weights are on one scale: a guide that found little of the posterior
    contributes little. The diagnosis of the original draws stays with the
    result, and `diagnose` returns it.

    Args:
        draws: Draws of a fit, not resampled yet.
        seed: Seed of the resampling.
        n: Draws wanted; as many as there are without it.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    shared_alone("resample", draws)
    wanted("draws", draws, Draws, EXPECTED)
    given(whole, "n", n)
    diagnosis = diagnose(draws)
    if diagnosis.khat >= diagnosis.khat_threshold and diagnosis.verdict != diagnostics.VERDICTS[1]:
        warnings.warn(
            f"Pareto k-hat {diagnosis.khat:.2f} is not below {diagnosis.khat_threshold:.2f}: the "
            "resampled draws are no better than the guide.",
            stacklevel=2,
        )
    weights = np.exp(diagnostics.psis(draws.log_weights.ravel()).log_weights)
    rows = stratified(weights, n or len(draws), np.random.default_rng(seed))

    def pick(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, *array.shape[2:])[rows][None]

    return Draws(
        pick(draws.z),
        pick(draws.log_p),
        pick(draws.log_q),
        {name: pick(value) for name, value in draws.values.items()},
        draws.target,
        {**draws.meta, "resampled": True, "diagnosis": asdict(diagnosis)},
    )


def stratified(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices drawn in proportion to the weights, one from each n-th of their sum, shuffled."""
    heights = np.cumsum(weights)
    points = (np.arange(n) + rng.random(n)) / n
    # Below the top even after rounding; then no weight of zero is ever hit.
    points = np.minimum(points, np.nextafter(1.0, 0.0)) * heights[-1]
    return rng.permutation(np.searchsorted(heights, points, side="right"))
