"""Resample draws to equal weights."""

import warnings
from dataclasses import replace

import numpy as np

from flowvi import diagnostics
from flowvi.diagnostics import Diagnosis
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import EXPECTED, Draws, weights_of
from flowvi.runtime.arguments import check_integer, check_type, optional, refuse_fit


def resample(draws: Draws, seed: int = 0, n: int | None = None) -> Draws:
    """Resample draws by their Pareto-smoothed importance weights.

    Stratified resampling with replacement; the result approximates p where k-hat is
    small. All chains are pooled into one, because their weights share one scale: a guide
    that covers little of the posterior contributes little. Draws of rows are resampled
    row by row, because their posteriors are independent. `diagnose` of the result
    returns the diagnosis of the original draws.

    Args:
        draws: Draws of a fit, not resampled yet.
        seed: Seed of the resampling.
        n: Number of draws, with a row axis of each row; as many as given by default.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    refuse_fit("resample", draws)
    check_type("draws", draws, Draws, EXPECTED)
    optional(check_integer, "n", n)
    log_w, diagnosis = weights_of("resample", draws), diagnose(draws)
    if diagnosis.khat >= diagnosis.khat_threshold and diagnosis.verdict != diagnostics.VERDICTS[1]:
        warnings.warn(_poor(diagnosis), stacklevel=2)
    log_w = log_w.reshape(len(draws), -1)
    # A row whose weights are all zero keeps its draws; its verdict reports them.
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
        unit_scores=None if draws.unit_scores is None else pick(draws.unit_scores),
    )


def _poor(diagnosis: Diagnosis) -> str:
    """Warning about weights that are too heavy for resampling."""
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
    """Stratified sampling of n indices in proportion to weights, in random order."""
    heights = np.cumsum(weights)
    points = (np.arange(n) + rng.random(n)) / n
    # Points stay below one after rounding, so that no weight of zero is selected.
    points = np.minimum(points, np.nextafter(1.0, 0.0)) * heights[-1]
    return rng.permutation(np.searchsorted(heights, points, side="right"))
