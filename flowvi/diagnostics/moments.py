"""Compare means and standard deviations of draws under two weightings, and over restarts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

# For each name of an array, the labels of each axis after chain and draw; None for an axis
# that is numbered from zero.
Axes = Mapping[str, Sequence[Sequence[Any] | None]]
# Largest number of scalars in one comparison, and of their draws, to limit memory.
COLUMNS, NUMBERS = 256, 4_000_000


@dataclass(frozen=True)
class Comparison:
    """Comparison of plain and reweighted draws; one entry per scalar, (P).

    Attributes:
        labels: Names of the scalars, such as ``theta[3]``.
        skipped: Names with a scalar that is not finite.
        shift, shift_se: Reweighted minus plain mean, in reweighted sds.
        stretch, stretch_se: Log of reweighted over plain sd.
        ess_mean, ess_sd: Effective draws of the reweighted mean and sd: the number of
            independent draws of the target with the same error.
        rhat: R-hat of the restarts' plain draws; 1 if they agree.
        rhat_weighted: R-hat after each restart is reweighted separately.
    """

    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    shift: np.ndarray
    shift_se: np.ndarray
    stretch: np.ndarray
    stretch_se: np.ndarray
    ess_mean: np.ndarray
    ess_sd: np.ndarray
    rhat: np.ndarray
    rhat_weighted: np.ndarray


def compare(
    weights: np.ndarray,
    inside: np.ndarray,
    values: Mapping[str, np.ndarray],
    axes: Axes | None = None,
) -> Comparison:
    """Compare every scalar that varies, under equal weights and under given weights.

    Args:
        weights: Normalised weights, (chain, draw).
        inside: Whether a draw has positive density, (chain, draw); others are left out.
        values: Arrays (chain, draw, ...) by name.
        axes: Labels of their elements.
    """
    labels: list[str] = []
    skipped: dict[str, None] = {}
    columns = [np.empty((8, 0))]
    for name, indices, x in blocks(values, axes):
        x = np.where(inside[..., None], x, 0.0)
        finite = np.isfinite(x).all((0, 1))
        if not finite.all():
            skipped[name] = None
        with np.errstate(invalid="ignore"):  # inf - inf, in columns that are left out
            varies = finite & (np.ptp(x[inside], 0) > 1e-8 * np.abs(x[inside]).max(0))
        labels += [name + index for index, kept in zip(indices, varies, strict=True) if kept]
        columns.append(_columns(weights, inside, x[..., varies]))
    return Comparison(tuple(labels), tuple(skipped), *np.concatenate(columns, axis=1))


def blocks(
    values: Mapping[str, np.ndarray], axes: Axes | None = None
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Name, indices such as "[3]" or labels, and columns (chain, draw, part) of every array."""
    for name, array in values.items():
        flat = array.reshape(*array.shape[:2], -1)
        indices = _indices(array.shape[2:], (axes or {}).get(name, ()))
        width = int(np.clip(NUMBERS // max(1, flat.shape[0] * flat.shape[1]), 1, COLUMNS))
        for start in range(0, flat.shape[-1], width):
            block = slice(start, start + width)
            yield name, indices[block], flat[..., block].astype(np.float64)


def _indices(shape: tuple[int, ...], axes: Sequence[Sequence[Any] | None]) -> list[str]:
    """Labels of the elements of an array, in order."""
    if not shape:
        return [""]
    known = [*axes, *(None for _ in shape)]
    names = [
        axis if axis is not None and _tell_apart(axis, size) else range(size)
        for size, axis in zip(shape, known, strict=False)
    ]
    return [f"[{','.join(map(str, place))}]" for place in product(*names)]


def _tell_apart(labels: Sequence[Any], size: int) -> bool:
    return len(labels) == len({*map(str, labels)}) == size


def _columns(weights: np.ndarray, inside: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The numbers of a Comparison, (8, P), for x of shape (chain, draw, P)."""
    before = inside / inside.sum()
    flat = x.reshape(weights.size, x.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):  # the shift of a sd of 0 is inf or NaN
        mean, variance, to_mean, to_sd = _moments(before.ravel(), flat)
        new_mean, new_variance, to_new_mean, to_new_sd = _moments(weights.ravel(), flat)
        sd = np.sqrt(new_variance)
        return np.stack(
            [
                (new_mean - mean) / sd,
                np.sqrt(((to_new_mean - to_mean) ** 2).sum(0)) / sd,
                np.log(new_variance / variance) / 2,
                np.sqrt(((to_new_sd - to_sd) ** 2).sum(0)),
                _effective(to_new_mean, weights),
                _effective(to_new_sd, weights),
                _rhat(before, x),
                _rhat(weights, x),
            ]
        )


def _moments(weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weighted mean and variance, (P), and influence of the draws on mean and log sd, (S, P).

    Both weightings share their draws. The standard error of a difference therefore follows
    from the difference of the influences, and vanishes as the weights become equal.
    """
    mean = weights @ x
    centred = x - mean
    variance = weights @ centred**2
    column = weights[:, None]
    return mean, variance, column * centred, column * (centred**2 / variance - 1) / 2


def _effective(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Effective draws of a weighted mean, from the influence of each draw, (P).

    The variance of one independent draw of the target, divided by the variance of the weighted
    mean. Unlike 1 / sum w^2, it depends on where the heavy weights are.
    """
    squares = influence**2
    per_weight = np.divide(squares, weights.reshape(-1, 1), where=squares > 0, out=squares * 0)
    return per_weight.sum(0) / squares.sum(0)


def _rhat(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sqrt(1 + variance of the chains' means / mean of the chains' variances), (P)."""
    if len(x) == 1:
        return np.ones(x.shape[-1])
    own = weights / weights.sum(1, keepdims=True)
    means = np.einsum("cd,cdp->cp", own, x)
    variances = np.einsum("cd,cdp->cp", own, (x - means[:, None]) ** 2)
    return np.sqrt(1 + means.var(0, ddof=1) / variances.mean(0))
