"""Units whose conditional no normal approximation fits: two modes, unbounded, or without a mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.targets.structure.laplace import Conditional, Laplace
from flowvi.targets.structure.marginal import MarginalTarget
from flowvi.targets.structure.modes import SETTLED, SHARE, axes, search_modes

# Standard deviations away from a mode at which a density that has an integral has fallen, and
# the nats by which it has: half of those of 1 / x, which has none.
AWAY = 1e4
FALLEN = 0.5 * math.log(AWAY)
# Share of the values of the shared latents at which Newton's method may fail.
FAILS = 0.05
# Largest number of units that a sentence names.
NAMED = 10


def faults(target: MarginalTarget, theta: Tensor, labels: Sequence[str]) -> list[str]:
    """Sentences on units whose conditional has no mode, has several, or is unbounded.

    The conditionals are searched at the reference of the target. The weights of draws say nothing
    of a second mode that no draw reaches.

    Args:
        target: The density of the shared latents.
        theta: Draws of the shared latents, (S, p).
        labels: Names of the units: "group[17]".
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
        modes = target.modes or search_modes(laplace, 0)
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


def _unbounded(laplace: Laplace, found: Conditional) -> Tensor:
    """Units whose log density does not fall far from the mode along some axis, (G)."""
    before = laplace.derivatives.by_unit(found.z)[0, :-1]
    unbounded = torch.zeros_like(before, dtype=torch.bool)
    for axis in axes(found):
        for side in (AWAY, -AWAY):
            z = laplace.points(laplace.reference.unsqueeze(0), found.mode + side * axis)
            after = laplace.derivatives.by_unit(z)[0, :-1]
            unbounded |= before - after < FALLEN
    return unbounded


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
