"""Groups of units that are joined: classes with their schools, or two plates side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.targets.structure.candidates import NOTHING, SEVERAL, Group

# Most latents of a unit that is joined from others: its conditional is one dense block.
MOST_JOINED = 24


class Units(NamedTuple):
    """Independent units.

    Attributes:
        group: Their latents.
        element: Unit of each element of the log density, (T); G for one of none of them.
    """

    group: Group
    element: Tensor


def joined(first: Units, second: Units) -> Units | None:
    """Join two groups of units: what one element depends on becomes one unit.

    Units of a group are independent given all other latents. An element of the log density thus
    has at most one unit of each group, and ties the two. The parts of this graph that do not hang
    together are units that are independent given the latents of neither group. They may differ in
    size; the shorter rows end with `NOTHING`.

    Args:
        first: Units of one group.
        second: Units of a group of other latents.

    Returns:
        The joined units; None if one of them has more than 24 latents, or if they all hang
        together.
    """
    from scipy.sparse import coo_array, csgraph  # slow to import

    (one, at_one), (two, at_two) = first, second
    a, b = len(one.columns), len(two.columns)
    both = ((at_one < a) & (at_two < b)).numpy()
    tied = (at_one.numpy()[both], a + at_two.numpy()[both])
    graph = coo_array((np.ones(len(tied[0]), dtype=np.int8), tied), shape=(a + b, a + b))
    count, part = csgraph.connected_components(graph, directed=False)
    rows: list[list[int]] = [[] for _ in range(count)]
    # Of a unit, the latents of the group with fewer units are first, in the same places everywhere.
    parts = [(one.columns, part[:a]), (two.columns, part[a:])]
    for columns, places in sorted(parts, key=lambda group: len(group[0])):
        for place, own in zip(places, columns.tolist(), strict=True):
            rows[place] += [column for column in own if column != NOTHING]
    size = max(map(len, rows))
    if count < 2 or size > MOST_JOINED:
        return None
    name, names, order = _named(one, two, part, count)
    number = torch.empty(count + 1, dtype=torch.long)
    number[torch.tensor([*order, count])] = torch.arange(count + 1)
    padded = [rows[i] + [NOTHING] * (size - len(rows[i])) for i in order]
    where = torch.tensor([*part.tolist(), count])
    at = torch.where(at_one < a, at_one, torch.where(at_two < b, a + at_two, a + b))
    group = Group(name, (*one.sites, *two.sites), torch.tensor(padded), names)
    return Units(group, number[where[at]])


def _named(
    one: Group, two: Group, part: np.ndarray, count: int
) -> tuple[str, tuple[str, ...], list[int]]:
    """The axis of joined units, their names, and their order: those of a group with one in each."""
    parts = part[: len(one.columns)].tolist(), part[len(one.columns) :].tolist()
    for group, own in ((two, parts[1]), (one, parts[0])):
        if len(own) == count == len(set(own)):
            return group.name, group.names, own
    names: dict[int, str] = {}
    for group, own in ((one, parts[0]), (two, parts[1])):
        for unit, place in enumerate(own):
            names.setdefault(place, group.name_of(unit))
    return f"{one.name}{SEVERAL}{two.name}", tuple(names.values()), list(names)
