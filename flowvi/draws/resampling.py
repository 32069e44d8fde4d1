"""Draws of equal weight, by stratified resampling."""

import warnings
from dataclasses import replace

import numpy as np

from flowvi import diagnostics
from flowvi.diagnostics import Diagnosis
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import EXPECTED, Draws, weights_of
from flowvi.runtime.arguments import check_integer, check_type, draws_wanted, optional


def resample(draws: Draws, seed: int = 0, n: int | None = None) -> Draws:
    """Resample by Pareto-smoothed importance weights: draws of p, if k-hat allows.

    Stratified, with replacement. All chains are pooled into one, because
    their weights are on one scale: a guide that found little of the posterior
    contributes little. Draws of rows are resampled row by row: their posteriors
    are independent. The diagnosis of the original draws stays with the
    result, and `diagnose` returns it.

    Args:
        draws: Draws of a fit, not resampled yet.
        seed: Seed of the resampling.
        n: Draws wanted, of each row where there are rows; as many as there are without it.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    draws_wanted("resample", draws)
    check_type("draws", draws, Draws, EXPECTED)
    optional(check_integer, "n", n)
    log_w, diagnosis = weights_of("resample", draws), diagnose(draws)
    if diagnosis.khat >= diagnosis.khat_threshold and diagnosis.verdict != diagnostics.VERDICTS[1]:
        warnings.warn(_poor(diagnosis), stacklevel=2)
    log_w = log_w.reshape(len(draws), -1)
    # Of a row without any weight its draws as they are: its verdict says what they are worth.
    log_w = np.where(np.isfinite(log_w).any(0), log_w, 0.0)
    weights = np.exp(diagnostics.psis_of_rows(log_w.T).log_weights)
    rng = np.random.default_rng(seed)
    places = np.stack([stratified(row, n or len(draws), rng) for row in weights], axis=1)
    size = places.shape

    def pick(array: np.ndarray) -> np.ndarray:
        lead = 3 if draws.by_row else 2
        pooled = array.reshape(len(draws), size[1], *array.shape[lead:])
        chosen = pooled[places, np.arange(size[1])]
        return chosen.reshape(1, size[0], *array.shape[2:])

    return replace(
        draws,
        z=pick(draws.z),
        log_p=pick(draws.log_p),
        log_q=pick(draws.log_q),
        values={name: pick(value) for name, value in draws.values.items()},
        meta={**draws.meta, "resampled": True},
        diagnosis=diagnosis,
    )


def _poor(diagnosis: Diagnosis) -> str:
    """What to say of weights that nothing can be resampled by."""
    limit = diagnosis.khat_threshold
    if diagnosis.rows is None:
        return (
            f"Pareto k-hat {diagnosis.khat:.2f} is not below {limit:.2f}: the resampled draws are "
            "no better than the guide."
        )
    many = int((diagnosis.rows.khat >= limit).sum())
    return (
        f"Pareto k-hat is not below {limit:.2f} for {many} of {len(diagnosis.rows)} rows: their "
        "resampled draws are no better than the guide. diagnose(draws).rows says which."
    )


def stratified(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices drawn in proportion to the weights, one from each n-th of their sum, shuffled."""
    heights = np.cumsum(weights)
    points = (np.arange(n) + rng.random(n)) / n
    # Below the top even after rounding; then no weight of zero is ever hit.
    points = np.minimum(points, np.nextafter(1.0, 0.0)) * heights[-1]
    return rng.permutation(np.searchsorted(heights, points, side="right"))
