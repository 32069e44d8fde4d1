"""Ranks of true values among the draws of a fit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowvi.diagnostics.calibration import rank
from flowvi.diagnostics.moments import blocks


def scalars(values: Mapping[str, np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels of all scalars, and their draws in the first chain, (draw, P)."""
    parts = [(name + i, x[0, :, k]) for name, s, x in blocks(values) for k, i in enumerate(s)]
    return tuple(label for label, _ in parts), np.stack([x for _, x in parts], axis=-1)


def ranks_of(
    plain: np.ndarray, better: np.ndarray, truth: np.ndarray, levels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of the truth among plain and resampled draws, and P_q(theta < truth), (P) each."""
    below = rank(plain, truth, rng)
    return (
        rank(plain[:levels], truth, rng),
        rank(better, truth, rng),
        (below + 0.5) / (len(plain) + 1),
    )
