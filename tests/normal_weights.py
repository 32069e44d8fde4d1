"""Log weights with known answers: one normal as a guide for another."""

import math

import numpy as np


def gaussian(
    rng: np.random.Generator,
    loc: float = 0.0,
    scale: float = 1.0,
    draws: int = 4000,
    dim: int = 3,
    evidence: float = 0.0,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draws of N(loc, scale^2 I), and their log weights under N(0, I) times e^evidence."""
    eps = rng.normal(size=(draws, dim))
    z = loc + scale * eps
    log_w = (eps**2 - z**2).sum(-1) / 2 + dim * math.log(scale) + evidence
    return log_w, {"x": z}
