"""Units whose conditional no normal approximation fits: two modes, unbounded, or without a mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flowvi.targets.structure.laplace import Conditional, Laplace
from flowvi.targets.structure.marginal import MarginalTarget
from flowvi.targets.structure.structure import UNITS

# Nats that Newton's method may leave at a mode.
SETTLED = 1e-3
# Standard deviations away from a mode at which a density that has an integral has fallen, and
# the nats by which it has: half of those of 1 / x, which has none.
AWAY = 1e4
FALLEN = 0.5 * math.log(AWAY)
# Standard deviations from the mode at which Newton's method starts again, and for many numbers.
MOVES, FEW_MOVES = (4.0, 16.0, 64.0), (16.0,)
MANY = 20_000
# Two modes are different if that many standard deviations lie between them; draws of a normal at
# one reach the other if they are nearer. A mode of a smaller share of the mass does not matter.
APART, SHARE = 3.0, 1e-3
# Latents of a unit that is searched, and latents whose axes are searched one by one.
MOST_SEARCHED, MOST_AXES = 200, 4
# Share of the values of the shared latents at which Newton's method may fail.
FAILS = 0.05
# Largest number of units that a sentence names.
NAMED = 10


def faults(target: MarginalTarget, theta: Tensor, labels: Sequence[str], seed: int) -> list[str]:
    """Sentences on units whose conditional has no mode, has several, or is unbounded.

    The conditionals are searched at the reference of the target. The weights of draws say nothing
    of a second mode that no draw reaches.

    Args:
        target: The density of the shared latents.
        theta: Draws of the shared latents, (S, p).
        labels: Names of the units: "group[17]".
        seed: Seed of the start points.
    """
    laplace = target.laplace
    if not laplace.columns.numel():
        return []
    with torch.no_grad():
        centre = laplace.reference.unsqueeze(0)
        found = laplace.at(centre)
        unbounded = _unbounded(laplace, found)
        sentences = []
        if unbounded.any():
            names, verb = _names(labels, unbounded, ("is", "are"))
            sentences.append(
                f"{names} {verb} not determined: the log density does not fall {AWAY:,.0f} "
                "standard deviations from its mode. Give these latents a proper prior."
            )
        modes = _Modes(laplace, found)
        if target.structure.size <= MOST_SEARCHED:
            for start in _starts(target, found, seed):
                modes.search(start)
        share = modes.left_out.where(~unbounded, 0.0)
        if (share > SHARE).any():
            names, verb = _names(labels, share > SHARE, ("has", "have"))
            sentences.append(
                f"{names} {verb} a second mode, with up to {float(share.max()):.0%} of the mass, "
                "that the conditional of the guide leaves out."
            )
        lost = ~modes.any & ~unbounded
        lost |= (_failures(target, theta) > FAILS) & ~unbounded
        if lost.any():
            names, _ = _names(labels, lost, ("", ""))
            sentences.append(
                f"Newton's method finds no mode of the conditional of {names} at some values of "
                "the shared latents."
            )
    return sentences


class _Modes:
    """Modes of each unit's conditional at the reference, as they are found."""

    def __init__(self, laplace: Laplace, first: Conditional) -> None:
        self.laplace = laplace
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
        """Share of the mass of each unit beyond its first mode, (G)."""
        shares = torch.softmax(torch.stack(self.masses), 0).nan_to_num(0.0)
        first = torch.where(self.masses[0].isneginf(), shares.amax(0), shares[0])
        return (1 - first).where(self.any, 0.0)


def _unbounded(laplace: Laplace, found: Conditional) -> Tensor:
    """Units whose log density does not fall far from the mode along some axis, (G)."""
    before = laplace.derivatives.by_unit(found.z)[0, :-1]
    unbounded = torch.zeros_like(before, dtype=torch.bool)
    for axis in _axes(found):
        for side in (AWAY, -AWAY):
            z = laplace.points(laplace.reference.unsqueeze(0), found.mode + side * axis)
            after = laplace.derivatives.by_unit(z)[0, :-1]
            unbounded |= before - after < FALLEN
    return unbounded


def _axes(found: Conditional) -> Iterator[Tensor]:
    """Directions of one standard deviation of each unit, (1, G, d)."""
    size = found.mode.shape[-1]
    for k in range(size if size <= MOST_AXES else 0):
        noise = torch.zeros_like(found.mode)
        noise[..., k] = 1
        yield found.factor.spread(noise)


def _starts(target: MarginalTarget, found: Conditional, seed: int) -> Iterator[Tensor]:
    """Places to start Newton's method of all units, (G, d)."""
    mode, columns = found.mode[0], target.laplace.columns
    yield -mode
    few = target.structure.kind != UNITS or columns.numel() > MANY
    generator = torch.Generator(target.device).manual_seed(seed)
    yield from target.whole.starts(generator)[: 1 if few else None, columns]
    for axis in _axes(found):
        for move in FEW_MOVES if few else MOVES:
            yield mode + move * axis[0]
            yield mode - move * axis[0]


def _failures(target: MarginalTarget, theta: Tensor) -> Tensor:
    """Share of the values of theta at which Newton's method ends at no mode, (G)."""
    failed = [
        ~(found.definite & (found.left < SETTLED))
        for found in map(target.laplace.at, theta.split(target.chunk()))
    ]
    return torch.cat(failed).to(theta.dtype).mean(0)


def _names(labels: Sequence[str], which: Tensor, verbs: tuple[str, str]) -> tuple[str, str]:
    places = which.nonzero().flatten().tolist()
    names = [labels[i] for i in places[:NAMED]]
    more = f" and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
    return ", ".join(names) + more, verbs[len(places) > 1]
