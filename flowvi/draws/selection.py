"""The scalars that a reader wants to see first."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from flowvi.draws.draws import Draws
from flowvi.draws.scalars import Scalar, scalars_of

# Draws that decide whether a value is a function of another one, and the tolerance.
TRIED, EQUAL = 200, 1e-4
# Fewest elements of which a straight line is no accident.
FEWEST = 4
# Parts of names that people give to standardised latents.
STANDARD = ("raw", "trans", "std", "tilde", "offset", "eta", "z", "eps", "decentered", "unit")


def first_scalars(draws: Draws, sites: Collection[str] = ()) -> Iterator[Scalar]:
    """Scalars in the order in which a reader wants them.

    Numbers come before elements of vectors. Left out are constants, copies of other scalars,
    standardised latents, whose scaled values the model reports as deterministics, and the diagonal
    of factors of correlation matrices, which the other elements determine.

    Args:
        draws: The draws.
        sites: Names of the latent sites, if the draws do not know them.
    """
    folded = standardised(draws, sites)
    order = sorted((n for n in draws.values if n not in folded), key=lambda n: draws[n].ndim > 2)
    seen: set[bytes] = set()
    for name in order:
        factor = _is_correlation_factor(draws[name])
        for one in scalars_of(draws, name):
            if factor and one.place[-1] == one.place[-2]:
                continue
            if not np.isfinite(one.draws).all() or np.ptp(one.draws) == 0:
                continue
            first = one.draws[:TRIED].tobytes()
            if first not in seen:
                seen.add(first)
                yield one


def standardised(draws: Draws, sites: Collection[str] = ()) -> set[str]:
    """Latents that a deterministic of the same shape shows on the scale of the model.

    These are latents of which the deterministic is a straight line in every draw, as in
    ``theta = mu + tau * eta``, and those whose name says so, such as ``theta_raw``.

    Args:
        draws: The draws.
        sites: Names of the latent sites, if the draws do not know them.
    """
    latents = [name for name in (sites or draws.target.sites) if name in draws.values]
    others = [name for name in draws.values if name not in latents]
    found = set()
    for name in latents:
        value = draws[name]
        alike = [o for o in others if draws[o].shape == value.shape and value.ndim > 2]
        spelt = any(part in STANDARD for part in name.lower().split("_"))
        if alike and (spelt or any(_is_line(value, draws[other]) for other in alike)):
            found.add(name)
    return found


def _is_line(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether y is a + b x over the elements of each draw."""
    some = x.reshape(-1, math.prod(x.shape[2:]))[:TRIED]
    other = y.reshape(-1, some.shape[1])[:TRIED]
    if some.shape[1] < FEWEST:
        return False
    u, v = (a.astype(np.float64) - a.mean(1, keepdims=True) for a in (some, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (u * v).sum(1, keepdims=True) / (u * u).sum(1, keepdims=True)
        rest = np.abs(v - slope * u).max(1)
    scale = np.abs(v).max(1)
    return bool((rest <= EQUAL * np.maximum(scale, 1e-300)).all()) and bool((scale > 0).all())


def _is_correlation_factor(x: np.ndarray) -> bool:
    """Whether a value is a lower triangular matrix with rows of length one, in every draw."""
    if x.ndim < 4 or x.shape[-1] != x.shape[-2] or x.shape[-1] < 2:
        return False
    some = x.reshape(-1, *x.shape[2:])[:TRIED]
    if not np.isfinite(some).all() or np.triu(some, 1).any():
        return False
    return bool(np.allclose((some**2).sum(-1), 1.0, atol=EQUAL))
