"""Modes that the search for a start saw and the finished guide does not cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from flowvi.gaussians import Gaussian, evaluate, near
from flowvi.guides import Guide
from flowvi.init import settled
from flowvi.target import Target

DRAWS = 200
# Mass that matters, relative to what the guide holds.
SHARE = 0.02
# As many separate modes, reached blindly from five starts, are a sign of far more.
MANY = 3
# Nats a dimension under the guide's bound, below which a place is a trap of the search.
DEPTH = 1.0
# A typical log weight that is this far above the guide's own marks a place that it leaves out.
EXCESS = 3.0


def left_out(
    target: Target,
    guide: Guide,
    bound: float,
    others: Sequence[Gaussian],
    seed: int,
    over: Callable[[], bool] = lambda: False,
) -> list[Gaussian]:
    """Find Gaussians of the search that hold mass which the guide does not cover.

    The ELBO of a Gaussian bounds from below the mass around it. Where that is
    not small beside the guide's bound, and the weights p / q at the Gaussian's
    own draws are far above those at the guide's, draws of the guide cannot show
    what is missing. Several modes that are small each, every one found from
    another start, are a sign of many that none was started near.

    Args:
        target: The log density.
        guide: The finished guide.
        bound: Its bound on the log mass.
        others: Refined Gaussians from other start points.
        seed: Of the draws.
        over: Asked whether to make do with Gaussians that have not settled.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    noise = torch.randn(
        DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )

    def outside(g: Gaussian) -> bool:
        z = g.at(noise)
        with torch.no_grad():
            excess = evaluate(target, z) - guide.log_prob(z) - bound
        return bool(excess.nanmedian() > EXCESS)

    found: list[Gaussian] = []
    for g in sorted(others, key=lambda g: -g.elbo):
        heavy = g.elbo > bound + math.log(SHARE)
        if not heavy and not (g.blind and g.elbo > bound - 10 - DEPTH * target.dim):
            continue
        if outside(g) and not heavy:
            # What has not settled yet may be on its way to where the guide is.
            g = settled(target, g, generator, noise, over)
        if outside(g) and not any(near(g, f) for f in found):
            found.append(g)
    return found if _share(found, bound) >= SHARE or len(found) >= MANY else []


def sentence(found: Sequence[Gaussian], bound: float) -> str:
    """Say what `left_out` found."""
    modes = "another mode" if len(found) == 1 else f"{len(found)} other modes"
    return (
        f"The search for a start found {modes} that the guide leaves out, with at least "
        f"{_share(found, bound):.1g} times the mass that it covers; there may be more. Its draws "
        "cannot show them."
    )


def _share(found: Sequence[Gaussian], bound: float) -> float:
    return sum(math.exp(min(g.elbo - bound, 50.0)) for g in found)
