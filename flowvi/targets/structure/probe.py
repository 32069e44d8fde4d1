"""Elements of a log density, and on which latents they depend."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.candidates import Group
from flowvi.targets.structure.terms import Terms
from flowvi.targets.structure.walk import Walk

# Elements that change by less than this, relative to their size, do not depend on what moved.
SAME = 1e-9
# Points at which latents are moved. A term that is flat at one of them is not at all of them.
PAIRS = 3
# Widths, in units of one, at which terms are sought that are switched on by a threshold, and the
# sides of zero on which all local latents are then: above, below, or both.
FAR, SIDES = 10.0, (1, -1, 0, 0)
# Latents of a chain in a window whose elements must not depend on the rest of the chain.
WINDOW = 16
# Numbers in one evaluation of the elements.
AT_ONCE = 20_000_000
# Largest distance in time at which the latents of a chain depend on each other.
MOST_ORDER = 4
# Latents of a unit whose Hessian may be sparse enough that this is worth knowing.
FEWEST_SPARSE, MOST_SPARSE = 3, 200


class Probe:
    """Elements of a log density, and which of them change where latents move."""

    def __init__(self, target: GlobalTarget, seed: int) -> None:
        generator = torch.Generator(target.device).manual_seed(seed)
        with isolated_rng():
            points = target.starts(generator).to(target.dtype)
        self.terms = Terms(target.density.batched, (points[0], *target._behind))
        self.target, self.behind = target, target._behind
        near = torch.cat([points] * PAIRS)
        noise = torch.randn(
            2, *near.shape, generator=generator, dtype=target.dtype, device=target.device
        )
        base, moved = near + 0.1 * noise[0], near + 0.5 * noise[1]
        with torch.no_grad():
            fine = target.log_prob(base).isfinite() & target.log_prob(moved).isfinite()
        # Far from where the density is positive, its elements say nothing.
        keep = fine.nonzero().flatten()[:PAIRS]
        if not len(keep):
            raise TypeError("no point of finite density")
        self.walk = Walk(torch.arange(target.dim))
        self.base, self.moved = base[keep], moved[keep]
        self.values = self._evaluate(self.base)

    def of_sums(self, group: Group, sums: int) -> Probe:
        """A probe that moves sums of the latents of a group, instead of these."""
        other = copy.copy(self)
        other.walk = Walk(group.columns.flatten().to(self.base.device), sums)
        return other

    def independent(self, group: Group) -> tuple[Tensor | None, str]:
        """As `units`, and far from the start points too."""
        element, tie = self.units(group)
        if element is not None:
            tie = self.hidden_tie(group, element)
        return (None if tie else element), tie

    def units(self, group: Group) -> tuple[Tensor | None, str]:
        """The unit of each element, (T), or why there is none.

        Every two units differ in a digit of their binary numbers. An element of one unit alone
        changes with exactly one of each digit's two halves, and these digits are its unit.
        """
        count = len(group.columns)
        digits = max(1, math.ceil(math.log2(count)))
        number = torch.arange(count)
        unit = torch.zeros(self.values.shape[-1], dtype=torch.long)
        ever = torch.zeros(self.values.shape[-1], dtype=torch.bool)
        for digit in range(digits):
            half = (number >> digit) % 2 == 1
            ones, zeros = (self._changed(group.latents(one)) for one in (half, ~half))
            both = ones & zeros
            if both.any():
                return None, self._tie(group, int(both.nonzero()[0]))
            unit += ones.long() << digit
            ever = ones | zeros if digit == 0 else ever
            if (ever != (ones | zeros)).any():
                return None, f"the terms of '{group.name}' change at some points only"
        if not ever.any():
            return None, f"nothing depends on {', '.join(group.sites)}"
        return torch.where(ever, unit, count), ""

    def order(self, group: Group) -> int:
        """Largest distance between two positions on which one element depends.

        One more than MOST_ORDER if the elements of windows depend on what is outside of them.
        """
        count = len(group.columns)
        first = torch.full(self.values.shape[-1:], count)
        last = torch.full(self.values.shape[-1:], -1)
        # Beside a start point, one where every latent is above the threshold of a term.
        away = self.base[:1].clone()
        away[:, group.columns.flatten()] += FAR
        base = torch.cat([self.base[:1], away, *self._far_increments(group)])
        values = self._evaluate(base)
        for place in range(count):
            z, column = base.clone(), int(group.columns[place])
            z[:, column] = self.moved[0, column]
            changed = _differ(values, self._evaluate(z))
            first = torch.where(changed & (first == count), place, first)
            last = torch.where(changed, place, last)
            if (last - first).max() > MOST_ORDER and place > 4 * MOST_ORDER:
                break
        order = int((last - first).max())
        for offset in (0, WINDOW // 2) if order <= MOST_ORDER else ():
            number = (torch.arange(count) + offset) // WINDOW
            inside = number[first.clamp(max=count - 1)]
            inside = torch.where(inside == number[last], inside, -1)
            inside = torch.where(last < 0, int(number[-1]) + 1, inside)
            if self._stray(group, number, inside) is not None:
                return MOST_ORDER + 1
        return order

    def _far_increments(self, group: Group) -> list[Tensor]:
        """Points where every increment of a walk is above the threshold of a term, or below it."""
        points = []
        for side in (FAR, -FAR) if self.walk.sums else ():
            z = self.walk.differenced(self.base[:1])
            z[:, group.latents()] += side
            points.append(self.walk.summed(z))
        return points

    def pattern(self, columns: Tensor) -> Tensor:
        """Pairs of places in a unit that share an element, (d, d); empty for very few or many.

        Args:
            columns: Columns of each unit's latents, (G, d); those behind the last latent fill up.
        """
        size = columns.shape[1]
        if not FEWEST_SPARSE <= size <= MOST_SPARSE:
            return torch.empty(0, 0, dtype=torch.bool)
        fine = Terms(self.target.density.batched, (self.base[0], *self.behind), fine=True)
        before = self._evaluate(self.base, fine)
        changed = []
        for place in range(size):
            z, some = self.base.clone(), columns[:, place]
            some = some[some < self.target.dim]
            z[:, some] = self.moved[:, some]
            changed.append(_differ(before, self._evaluate(z, fine)))
        both = torch.stack(changed).float()
        return both @ both.T > 0

    def of_one(self) -> Tensor:
        """The unit of each element of a chain or a field: all of them belong to the one."""
        return torch.zeros(self.values.shape[-1], dtype=torch.long)

    def hidden_tie(self, group: Group, unit: Tensor) -> str:
        """A sentence on a tie that shows only far from the start points; empty without one.

        Args:
            group: The units.
            unit: Unit of each element, (T).
        """
        stray = self._stray(group, torch.arange(len(group.columns)), unit)
        if stray is None:
            return ""
        name = group.sites[0]
        own = f"{name}[{int(unit[stray])}]" if unit[stray] < len(group.columns) else name
        return f"units of '{group.name}' depend on each other (a term of {own}, at some points)"

    def _stray(self, group: Group, number: Tensor, unit: Tensor) -> int | None:
        """An element that changes though its own unit does not move, far from the start points.

        All local latents are far above zero, far below it, or spread widely, so that a term that
        is switched on by a threshold is on at one point at least.

        Args:
            group: Latents along an axis, (G, d).
            number: Unit of each place of the axis, (G).
            unit: Unit of each element, (T); -1 if it is not to be looked at.
        """
        generator = torch.Generator().manual_seed(len(number))
        columns = group.latents()
        spread = torch.randn(
            2 * len(SIDES), len(columns), generator=generator, dtype=self.target.dtype
        ).to(self.base)
        sides = zip(SIDES, spread[: len(SIDES)], spread[len(SIDES) :], strict=True)
        for side, away, there in sides:
            base, moved = self.base[:1].clone(), self.base[:1].clone()
            base[:, columns] += FAR * (side * (1 + away.abs()) if side else away)
            moved[:, columns] += FAR * there
            values = self._evaluate(base)
            for digit in range(max(1, int(number.max()).bit_length())):
                for on in (0, 1):
                    half = (number >> digit) % 2 == on
                    z = base.clone()
                    some = group.latents(half)
                    z[:, some] = moved[:, some]
                    changed = _differ(values, self._evaluate(z))
                    still = ((unit >> digit) % 2 != on) | (unit > number.max())
                    found = (changed & still & (unit >= 0)).nonzero()
                    if len(found):
                        return int(found[0])
        return None

    def _changed(self, columns: Tensor) -> Tensor:
        """Elements that depend on columns, (T)."""
        z = self.base.clone()
        z[:, columns] = self.moved[:, columns]
        return _differ(self.values, self._evaluate(z))

    @torch.no_grad()
    def _evaluate(self, z: Tensor, terms: Terms | None = None) -> Tensor:
        terms = terms or self.terms
        z = self.walk.differenced(z)
        return torch.cat([terms(one, *self.behind) for one in z.split(1)]).cpu()

    def _tie(self, group: Group, element: int) -> str:
        """Two units on which one element depends, in words."""
        units = range(len(group.columns))
        tied: list[int] = []
        # Halve the set of units until it holds one; then look for another.
        for avoid in (None, 0):
            rest = [i for i in units if avoid is None or i != tied[0]]
            while len(rest) > 1:
                half = rest[: len(rest) // 2]
                hit = bool(self._changed(group.latents(torch.tensor(half)))[element])
                rest = half if hit else rest[len(rest) // 2 :]
            tied.append(rest[0])
        first, second = sorted(tied)
        name = group.sites[0]
        return (
            f"units of '{group.name}' depend on each other ({name}[{first}] and {name}[{second}] "
            "share a term)"
        )


def _differ(before: Tensor, after: Tensor) -> Tensor:
    """Elements that differ at one point at least. (S, T), (S, T) -> (T)."""
    scale = before.abs().clamp(min=1.0)
    differs = ((after - before).abs() > SAME * scale) | (after.isfinite() != before.isfinite())
    return differs.any(0)
