"""Tempered densities: a wide start, and annealing from it, which finds mass that a guide lacks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.diagnostics import Diagnosis, Estimate, log_evidence
from flowvi.guides.gaussian import FullRank
from flowvi.initialization.gaussian import (
    GaussianApproximation,
    LogDensityProtocol,
    refine,
    with_elbo,
)
from flowvi.samplers.ais import annealed_importance_sampling
from flowvi.targets import Target

# Power of the density at which most modes merge into one.
LOW_POWER = 0.05
WIDTHS = (1.0, 10.0)
ROUNDS = 8
JUDGE_DRAWS = 200
# Settings of the annealing from the wide normal.
DRAWS, TEMPERATURES, LEAPFROG = 500, 40, 3
REPEATS = 2
# Draws of a first look, which ends the search unless it finds `EXCESS` more.
FEW_DRAWS = 125
# Evaluations of the density and its gradient in one of these runs.
EVALUATIONS = DRAWS * TEMPERATURES * LEAPFROG
# Least excess of log mass, in nats and beyond three standard errors, required in every run.
EXCESS = 0.15
# Largest dimension: more dimensions need too many temperatures.
MOST_DIM = 200


class Tempered:
    """A density raised to a power, as a target of the search for a Gaussian.

    Args:
        target: The log density.
        beta: The power.
    """

    def __init__(self, target: Target, beta: float) -> None:
        self.target, self.beta = target, beta
        self.dim = target.dim

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density times the power. (*S, D) -> (*S)."""
        return self.beta * self.target.log_prob(z)

    def chunk(self) -> int:
        """How many points to evaluate at a time."""
        return self.target.chunk()


def wide_gaussian(
    target: Target, others: list[GaussianApproximation], seed: int
) -> GaussianApproximation:
    """The best normal for the target at a high temperature, where most modes are one.

    Args:
        target: The log density.
        others: Normals at the target's modes, to start from beside wide ones at zero.
        seed: Of the draws.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    hot: LogDensityProtocol = Tempered(target, LOW_POWER)
    shape = (JUDGE_DRAWS, target.dim)
    judge = torch.randn(shape, generator=generator, dtype=target.dtype, device=target.device)
    identity = torch.eye(target.dim, dtype=target.dtype, device=target.device)
    starts = [GaussianApproximation(identity[0] * 0, width * identity, "wide") for width in WIDTHS]
    starts += [replace(g, scale_tril=g.scale_tril / math.sqrt(LOW_POWER)) for g in others[:3]]
    scored = [with_elbo(hot, g, judge) for g in starts]
    best = max(scored, key=lambda g: g.elbo if math.isfinite(g.elbo) else -math.inf)
    return refine(hot, best, generator, judge, False, ROUNDS)


def mass_beyond_guide(
    target: Target, diagnosis: Diagnosis, wide: GaussianApproximation, seed: int
) -> str:
    """Whether annealing from a wide start finds mass that a guide's weights do not show.

    Annealed weights are unbiased for the evidence and, where the geometry is
    hard, mostly low: only a value above the guide's means anything, if it is
    found again from other draws. A first look with few draws and no pilot is enough where it
    finds nothing more: with twice the error of the others, it would rarely miss
    what both of these find beyond three errors.

    Args:
        target: The log density.
        diagnosis: Diagnosis of the guide's own draws.
        wide: The Gaussian from which annealing starts.
        seed: Seed of the draws.

    Returns:
        A sentence on the other modes; empty if no mass was found.
    """
    guide = FullRank(target.dim).to(dtype=target.dtype, device=target.device)
    guide.start(wide.loc, wide.scale_tril)
    own = diagnosis.gap + diagnosis.elbo
    least = math.inf

    def anneal(draws: int, seed: int, pilot: bool = True) -> Estimate:
        found = annealed_importance_sampling(
            target,
            guide,
            draws,
            power=1.0,
            temperatures=TEMPERATURES,
            leapfrog=LEAPFROG,
            resample=True,
            pilot=pilot,
            seed=seed,
        )
        return log_evidence(found.log_w.cpu().double().numpy())

    if not anneal(FEW_DRAWS, seed + REPEATS, pilot=False).value > own + EXCESS:
        return ""
    for i in range(REPEATS):
        value, error = anneal(DRAWS, seed + i)
        least = min(least, value - own)
        if not value - 3 * error > own + EXCESS:
            return ""
    return (
        f"Annealing from a wide start finds about {math.exp(min(least, 20.0)):.1f} times the mass "
        "that the guide covers: there are other modes. Its draws cannot show them."
    )
