"""Fit the conditional of each unit to its weights, and choose the number of draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.targets.structure.correction import Correction
from flowvi.targets.structure.laplace import Laplace
from flowvi.targets.structure.noise import LATTICE_DIM, counts
from flowvi.targets.structure.shape import Shape

# Draws of each unit for its moments, and rounds of moments.
PILOT, ROUNDS = 32, 2
# Draws and values of theta by which normal conditionals are told.
FEW = 4
# Variance of the log of an estimate, all units together, that is small beside the error of a mean.
ENOUGH = 0.06
# Variance of the weights of a unit below which its conditional is normal.
EXACT = 1e-12
# Relative variance of the weights of a unit above which its conditional is fitted.
NOTICED = 1e-5
# Units of more latents than that keep the normal: their weights are too few for its moments.
MOST_BENT = 8
# Largest number of values of theta for the choice.
POINTS = 16


class Moments(NamedTuple):
    """Weighted moments of whitened latents, and the relative variance of the weights.

    Attributes:
        mean: Means, (G, d).
        sd: Standard deviations, (G, d).
        skewness: Skewness, (G, d).
        kurtosis: Excess kurtosis, (G, d).
        variance: Variance of the weights over the square of their mean, (G).
    """

    mean: Tensor
    sd: Tensor
    skewness: Tensor
    kurtosis: Tensor
    variance: Tensor


def adapt(
    laplace: Laplace,
    theta: Tensor,
    others: Sequence[Laplace],
    seed: int,
    say: Callable[[str], object],
) -> tuple[Shape, int]:
    """Choose the conditionals and the number of draws of each unit.

    Args:
        laplace: Normal approximations of the units.
        theta: Values of theta, (S, p).
        others: Those at further modes of some units.
        seed: Seed of the draws.
        say: Function that takes a line of the log.

    Returns:
        The map of each unit's noise, and the number of draws K.
    """
    generator = torch.Generator(theta.device).manual_seed(seed)
    theta = theta[:POINTS]
    plain = Shape(Shape.identity(laplace.mode))
    first = moments(Correction(laplace, plain), theta[:FEW], FEW, generator)
    if not (first.variance > EXACT).any():
        say("the conditional of every unit is normal: one draw of each is exact")
        return plain, 1
    wide = laplace.structure.size <= LATTICE_DIM
    shape = _from_wide(laplace, theta, generator) if wide else _by_rounds(laplace, theta, generator)
    particles = draws_needed(Correction(laplace, shape, others=others), theta, generator)
    count = int((shape.coefficients != plain.coefficients).any(0).any(-1).sum())
    say(
        f"{count} of {len(first.variance)} units have a conditional with skew and tails of its own"
        + (", some with further modes" if others else "")
        + f"; {particles} draws of each unit"
    )
    return shape, particles


def _from_wide(laplace: Laplace, theta: Tensor, generator: torch.Generator) -> Shape:
    """Maps from the moments of wide draws, which cover every conditional near its mode."""
    plain = Shape(Shape.identity(laplace.mode))
    pilot = pilot_draws(laplace.structure.size)
    found = moments(Correction(laplace, plain), theta, pilot, generator, wide=True)
    wanted = _wanted(laplace, found)
    fair = wanted.isfinite().all(0).all(-1)
    normal = (found.mean.square() + (found.sd - 1).square()).amax(-1) < NOTICED
    return Shape(torch.where((fair & ~normal).view(1, -1, 1), wanted, plain.coefficients))


def _by_rounds(laplace: Laplace, theta: Tensor, generator: torch.Generator) -> Shape:
    """Maps from the weighted moments of normal draws, round by round."""
    plain = Shape(Shape.identity(laplace.mode))
    best, chosen = moments(Correction(laplace, plain), theta, PILOT, generator), plain
    for _ in range(ROUNDS if laplace.structure.size <= MOST_BENT else 0):
        wanted = _wanted(laplace, best)
        bent = best.variance > NOTICED
        coefficients = torch.where(bent.view(1, -1, 1), wanted, chosen.coefficients)
        found = moments(Correction(laplace, Shape(coefficients)), theta, PILOT, generator)
        # Each unit keeps the better of the two.
        gain = (found.variance < best.variance).view(1, -1, 1)
        chosen = Shape(torch.where(gain, coefficients, chosen.coefficients))
        best = Moments(
            *(
                torch.where(gain[0] if new.dim() > 1 else gain[0, :, 0], new, old)
                for new, old in zip(found, best, strict=True)
            )
        )
    return chosen


def _wanted(laplace: Laplace, found: Moments) -> Tensor:
    """Coefficients of given moments; what fills up units with fewer latents stays normal."""
    wanted = Shape.from_moments(*found[:4])
    return torch.where(laplace.derivatives.filled, Shape.identity(laplace.mode), wanted)


def pilot_draws(dim: int) -> int:
    """Number of wide draws of units of that many latents that give their moments."""
    return next(count for count in counts(dim) if count >= PILOT)


def moments(
    correction: Correction,
    theta: Tensor,
    particles: int,
    generator: torch.Generator,
    wide: bool = False,
) -> Moments:
    """Weighted moments of the latents of each unit, over draws at values of theta (S, p)."""
    powers: list[Tensor] = []
    variance: list[Tensor] = []
    for one in theta.split(correction.pieces(particles)):
        white, log_w = correction.weighted_noise(one, particles, generator, wide)
        weights = torch.softmax(log_w, 0)
        whole = torch.stack([white, white**2, white**3, white**4])
        powers.append((whole * weights.unsqueeze(-1)).sum(1).sum(1))
        variance.append((len(log_w) * weights.square().sum(0) - 1).sum(0))
    m1, m2, m3, m4 = torch.stack(powers).sum(0) / len(theta)
    var = (m2 - m1**2).clamp(min=1e-6)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return Moments(
        m1,
        var.sqrt(),
        third / var**1.5,
        fourth / var**2 - 3,
        torch.stack(variance).sum(0).nan_to_num(nan=torch.inf) / len(theta),
    )


def draws_needed(correction: Correction, theta: Tensor, generator: torch.Generator) -> int:
    """The least number of draws whose noise in the weights of theta is small enough."""
    parts = 1 + len(correction.others)
    choices = [parts * count for count in counts(correction.laplace.structure.size)]
    for particles in choices:
        if estimator_variance(correction, theta, particles, generator) <= ENOUGH:
            return particles
    return choices[-1]


def estimator_variance(
    correction: Correction, theta: Tensor, particles: int, generator: torch.Generator
) -> float:
    """Variance of the log of an estimate of the density of theta, from pairs of estimates."""
    differences = []
    for one in theta.split(correction.pieces(particles)):
        first, second = (correction(one, particles, generator).log_p for _ in range(2))
        differences.append((first - second).square() / 2)
    found = torch.cat(differences)
    return float(found[found.isfinite()].mean()) if found.isfinite().any() else float("inf")
