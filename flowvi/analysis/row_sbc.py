"""Simulation-based calibration of an amortised guide: one fit serves all simulated rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from flowvi.diagnostics import MIN_DRAWS, diagnose, psis
from flowvi.diagnostics.calibration import Calibration, rank
from flowvi.diagnostics.moments import blocks
from flowvi.draws.draws import RowDraws
from flowvi.fitting.result import RowFit
from flowvi.runtime.rng import stream

AT_ONCE = 50


def sbc_rows(
    fit: RowFit, *, fits: int = 1000, draws: int = 1000, levels: int = 127, seed: int = 0
) -> Calibration:
    """Rank the true latents of simulated rows among the draws of one amortised guide.

    Latents come from the prior and rows from the model given them, both with the
    parameters that were trained. `flowvi.sbc` calls this for a `RowFit`.

    Args:
        fit: A fit whose guide reads its rows.
        fits: Number M of simulated rows.
        draws: Draws for each, behind its weights and the probabilities.
        levels: Number L of draws behind a rank.
        seed: Of everything random.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788.
    """
    if fits < 2 or draws < MIN_DRAWS or not 1 <= levels <= draws:
        raise ValueError(
            f"sbc needs fits >= 2, draws >= {MIN_DRAWS} and levels from 1 to draws; got "
            f"{fits}, {draws} and {levels}."
        )
    target = fit.target
    simulated = target.prior(fits, stream(seed, 0) % 2**32)
    rows = target.replaced(target.batch(torch.arange(fits) % target.rows), simulated)
    truth = {name: simulated[name] for name in target.sites}
    rng = np.random.default_rng(seed)
    plain, better, below, verdicts = [], [], [], []
    for start in range(0, fits, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        some = fit.draw(draws, tuple(t[part] for t in rows.data), stream(seed, 1, start) % 2**32)
        for i in range(some.z.shape[2]):
            labels, values = _flat({n: some[n][0, :, i] for n in truth})
            _, true = _flat({n: truth[n][start + i][None] for n in truth})
            weights, verdict = _judged(some, i)
            chosen = rng.choice(len(values), size=levels, p=weights)
            plain.append(rank(values[:levels], true[0], rng))
            better.append(rank(values[chosen], true[0], rng))
            below.append((rank(values, true[0], rng) + 0.5) / (len(values) + 1))
            verdicts.append(verdict)
    return Calibration(
        labels, levels, np.stack(plain), np.stack(better), np.stack(below), tuple(verdicts)
    )


def _judged(draws: RowDraws, row: int) -> tuple[np.ndarray, str]:
    """Smoothed weights of a row's draws, and their verdict."""
    log_w = draws.log_weights[0, :, row].astype(np.float64)
    weights = np.exp(psis(log_w).log_weights)
    return weights / weights.sum(), diagnose(log_w).verdict


def _flat(values: Mapping[str, np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels of all scalars, and their draws, (draw, P)."""
    parts = [
        (name + i, x[0, :, k])
        for name, s, x in blocks({n: v[None] for n, v in values.items()})
        for k, i in enumerate(s)
    ]
    return tuple(label for label, _ in parts), np.stack([x for _, x in parts], axis=-1)
