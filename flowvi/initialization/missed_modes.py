"""Modes that the search for a start saw and the finished guide does not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowvi.guides.guide import Guide
from flowvi.initialization.gaussian import GaussianApproximation, evaluate
from flowvi.targets import Target

DRAWS = 200
# Least mass of a missed mode that is reported, relative to the mass that the guide covers.
SHARE = 0.02
# Least difference in nats between the median log weight in a missed mode and that of the guide.
EXCESS = 3.0
# Scale of the draws, relative to the sds of the mode: a guide without correlations covers only
# the middle of a mode.
DRAW_SCALE = 0.5


def missed_modes(
    target: Target, guide: Guide, covered: float, modes: Sequence[GaussianApproximation], seed: int
) -> list[GaussianApproximation]:
    """Find modes that hold mass which the guide does not cover.

    Where the mass of a mode is not small beside what the guide covers, and the
    weights p / q in the middle of the mode are far above those at the guide's own
    draws, these cannot show what is missing.

    Args:
        target: The log density.
        guide: The finished guide.
        covered: Log of the mass that it covers.
        modes: Converged modes with their masses, from `further_modes`.
        seed: Of the draws.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    noise = DRAW_SCALE * torch.randn(
        DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )

    def outside(g: GaussianApproximation) -> bool:
        z = g.at(noise)
        with torch.no_grad():
            excess = evaluate(target, z) - guide.log_prob(z) - covered
        return bool(excess.nanmedian() > EXCESS)

    found = [g for g in sorted(modes, key=lambda g: -g.mass) if outside(g)]
    return found if _share(found, covered)[0] >= SHARE else []


def describe_missed_modes(found: Sequence[GaussianApproximation], covered: float) -> str:
    """Sentence on the modes that `missed_modes` found."""
    modes = "another mode" if len(found) == 1 else f"{len(found)} other modes"
    share, error = _share(found, covered)
    return (
        f"The search for a start found {modes} that the guide leaves out, with about "
        f"{share:.2g} times the mass that it covers (standard error {error:.1g}); there may be "
        "more. Its draws cannot show them."
    )


def _share(found: Sequence[GaussianApproximation], covered: float) -> tuple[float, float]:
    """Mass relative to what is covered, with its standard error."""
    shares = [math.exp(min(g.mass - covered, 50.0)) for g in found]
    errors = [share * g.mass_se for share, g in zip(shares, found, strict=True)]
    return sum(shares), math.hypot(*errors)
