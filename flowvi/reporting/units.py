"""Units of a structured fit in a report: those that are doubtful, and those that are extreme."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flowvi.draws.draws import Draws
from flowvi.draws.scalars import Scalar
from flowvi.plots.caterpillar import unit_values

# Units in the table of the posterior, and in that of doubtful units.
SHOWN, DOUBTFUL = 10, 20


def chosen_units(draws: Draws) -> list[int]:
    """Units that are not to be trusted, the worst first, then those of the most extreme means."""
    units, names = draws.units, unit_values(draws)
    if units is None or not names:
        return []
    worst = [int(i) for i in np.argsort(-units.khat, kind="stable") if units.bad[i]]
    value = np.moveaxis(draws[names[0]], 2 + draws.dims[names[0]].index(units.plate), 2)
    mean = value.reshape(len(draws), len(units.bad), -1).mean(0)
    distance = (np.abs(mean - mean.mean(0)) / np.maximum(mean.std(0), 1e-300)).max(1)
    extreme = [int(i) for i in np.argsort(-distance, kind="stable")]
    return [*dict.fromkeys([*worst, *extreme])][:SHOWN]


def elements_of_units(draws: Draws, name: str, units: list[int]) -> Iterator[Scalar]:
    """The elements of some units."""
    value, dims = draws[name], draws.dims[name]
    assert draws.units is not None
    axis = dims.index(draws.units.plate)
    coords = [draws.coords.get(dim, ()) for dim in dims]
    rest = [range(size) for size in value.shape[2:]]
    for unit in units:
        rest[axis] = range(unit, unit + 1)
        for index in np.ndindex(*map(len, rest)):
            place = [r[i] for r, i in zip(rest, index, strict=True)]
            words = [c[i] if len(c) > i else i for c, i in zip(coords, place, strict=True)]
            label = f"{name}[{', '.join(map(str, words))}]"
            yield Scalar(label, name, tuple(place), value[(..., *place)].ravel())


def doubtful_units(draws: Draws) -> list[tuple[str, str, str, str]]:
    """Table lines of the units of the largest k-hat: label, judgement, k-hat, variance."""
    if draws.units is None:
        return []
    units = draws.units
    order = np.lexsort((-units.khat, ~units.bad))
    kept = [i for i in order if units.bad[i] or np.isfinite(units.khat[i])][:DOUBTFUL]
    return [
        (
            f"{units.plate}[{units.labels[i]}]",
            "not to be trusted" if units.bad[i] else "trust",
            f"{units.khat[i]:.2f}",
            f"{units.variance[i]:.2g}",
        )
        for i in kept
    ]
