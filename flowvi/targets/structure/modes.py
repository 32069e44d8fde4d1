"""Modes of the conditional of each unit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from flowvi.targets.structure.laplace import Conditional, Laplace
from flowvi.targets.structure.noise import LATTICE_DIM
from flowvi.targets.structure.structure import UNITS

# Nats that Newton's method may leave at a mode.
SETTLED = 1e-3
# Standard deviations from the mode at which Newton's method starts again, and for many numbers.
MOVES, FEW_MOVES = (4.0, 16.0, 64.0), (16.0,)
MANY = 20_000
# Two modes are different if that many standard deviations lie between them; draws of a normal at
# one reach the other if they are nearer. A mode of a smaller share of the mass does not matter.
APART, SHARE = 3.0, 1e-3
# Latents of a unit that is searched, and latents whose axes are searched one by one.
MOST_SEARCHED, MOST_AXES = 200, 4
# Most modes of a unit that its conditional is a mixture of.
COMPONENTS = 3


@torch.no_grad()
def search_modes(laplace: Laplace, seed: int) -> Modes:
    """Find modes of each unit's conditional at the reference, by Newton's method from many places.

    Args:
        laplace: Normal approximations of the units, which lie at one mode of each.
        seed: Seed of the start points.
    """
    found = laplace.at(laplace.reference.unsqueeze(0))
    modes = Modes(laplace, found)
    if laplace.structure.size <= MOST_SEARCHED:
        for start in _starts(laplace, found, seed):
            modes.search(start)
    return modes


class Modes:
    """Modes of each unit's conditional at a reference, as they are found.

    Args:
        laplace: Normal approximations of the units.
        first: Those at the reference, one mode of each unit.

    Attributes:
        reference: The reference, (p).
        places: Places of a mode of each unit, infinite where there is none, (G, d) each.
        masses: Log of the mass there, (G) each.
    """

    def __init__(self, laplace: Laplace, first: Conditional) -> None:
        self.laplace, self.first, self.reference = laplace, first, laplace.reference
        self.places: list[Tensor] = []
        self.masses: list[Tensor] = []
        self.add(first)

    def search(self, start: Tensor) -> None:
        """Start Newton's method of all units elsewhere, (G, d)."""
        other = copy.copy(self.laplace)
        other.mode, other.slope = start, torch.zeros_like(self.laplace.slope)
        other.forget()
        self.add(other.at(self.laplace.reference.unsqueeze(0)))

    def add(self, found: Conditional) -> None:
        """Keep the modes that are new, (G, d), with the log of their mass, (G)."""
        units = self.laplace.derivatives.by_unit(found.z)[0, :-1]
        mass = units + found.left[0] - 0.5 * found.factor.log_det[0]
        fine = found.definite[0] & (found.left[0] < SETTLED) & mass.isfinite()
        for place in self.places:
            # Places that are no modes are infinite.
            between = found.factor.whiten(found.mode - place).norm(dim=-1)[0]
            fine &= ~(between < APART)
        self.places.append(torch.where(fine.unsqueeze(-1), found.mode[0], torch.inf))
        self.masses.append(mass.where(fine, -torch.inf))

    @property
    def any(self) -> Tensor:
        """Whether a unit has a mode, (G)."""
        return torch.stack(self.masses).isfinite().any(0)

    @property
    def left_out(self) -> Tensor:
        """Share of the mass of each unit at modes that are no component, (G)."""
        if self.places[0].shape[-1] <= LATTICE_DIM:
            order = self._shares().sort(0, descending=True).values
            return order[COMPONENTS:].sum(0).where(self.any, 0.0)
        shares = self._shares()
        first = torch.where(self.masses[0].isneginf(), shares.amax(0), shares[0])
        return (1 - first).where(self.any, 0.0)

    def components(self) -> list[Laplace]:
        """Normal approximations at further modes of units of few latents.

        A unit that has fewer modes is at its first one in the others.
        """
        first = self.first.mode[0]
        if first.shape[-1] > LATTICE_DIM:
            return []
        shares = self._shares()
        # The first mode is a component whatever its mass.
        shares[0] = 2.0
        order = shares.argsort(0, descending=True)
        places = torch.stack(self.places)
        found = []
        for rank in order[1:COMPONENTS]:
            share = shares.gather(0, rank.unsqueeze(0))[0]
            if not (share > SHARE).any():
                break
            place = places.gather(0, rank.view(1, -1, 1).expand(1, *first.shape))[0]
            other = copy.copy(self.laplace)
            other.mode = torch.where((share > SHARE).unsqueeze(-1), place, first)
            other.slope = torch.zeros_like(self.laplace.slope)
            other.forget()
            other.centre(self.reference)
            found.append(other)
        return found

    def _shares(self) -> Tensor:
        """Share of the mass at each mode of each unit, (modes, G); zero where there is none."""
        return torch.softmax(torch.stack(self.masses), 0).nan_to_num(0.0)


def axes(found: Conditional) -> Iterator[Tensor]:
    """Directions of one standard deviation of each unit, (1, G, d)."""
    size = found.mode.shape[-1]
    for k in range(size if size <= MOST_AXES else 0):
        noise = torch.zeros_like(found.mode)
        noise[..., k] = 1
        yield found.factor.spread(noise)


def _starts(laplace: Laplace, found: Conditional, seed: int) -> Iterator[Tensor]:
    """Places to start Newton's method of all units, (G, d)."""
    mode, columns = found.mode[0], laplace.columns
    yield -mode
    few = laplace.structure.kind != UNITS or columns.numel() > MANY
    generator = torch.Generator(mode.device).manual_seed(seed)
    starts = laplace.derivatives.from_target(laplace.target.starts(generator))
    yield from starts[: 1 if few else None, columns]
    for axis in axes(found):
        for move in FEW_MOVES if few else MOVES:
            yield mode + move * axis[0]
            yield mode - move * axis[0]
