"""Randomised quasi-Monte Carlo noise: normal, or wide and periodic for units of few latents."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Largest number of latents of a unit for which a lattice with wide noise integrates well.
LATTICE_DIM = 3
# Scale a of the wide noise, for units of one, two and three latents.
WIDTH = (3.0, 3.0, 2.5)
# Numbers of points of the lattices, for one, two and three latents.
POINTS = (
    (5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024),
    (34, 55, 89, 144, 233, 377, 610, 987),
    (89, 144, 233, 377, 610, 987),
)
# Numbers of draws where no lattice helps.
MANY = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Uniform numbers are kept that far from 0 and 1.
EDGE = 1e-12


def counts(dim: int) -> tuple[int, ...]:
    """Numbers of draws to choose from, for units of that many latents."""
    return POINTS[dim - 1] if dim <= LATTICE_DIM else MANY


def is_wide(particles: int, dim: int) -> bool:
    """Whether so many draws of units of that many latents are a lattice of wide noise."""
    return particles > 1 and dim <= LATTICE_DIM


def normal_noise(
    particles: int, shape: tuple[int, ...], generator: torch.Generator, like: Tensor
) -> Tensor:
    """K draws of standard normal noise for each point and unit, (K, *shape).

    The draws are pairs of opposite ones. Averages over them are unbiased, and those of different
    units are independent.

    Args:
        particles: Number of draws K.
        shape: Points, units, and latents of a unit: (S, G, d).
        generator: Generator of the noise.
        like: A tensor of the precision and device.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": like.dtype, "device": like.device}
    half = torch.randn((particles + 1) // 2, *shape, **options)
    return torch.cat([half, -half])[:particles]


def wide_noise(
    particles: int, shape: tuple[int, ...], generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    r"""K draws of wide noise for each point and unit, and their log density.

    Each coordinate is :math:`x = a v / \sqrt{1 - v^2}` with v uniform on (-1, 1): Student's t with
    two degrees of freedom and the scale :math:`a / \sqrt 2`. The v are a rank-1 lattice with a
    random shift of each point and unit (Cranley and Patterson, 1976, doi:10.1137/0713071). An
    average of p / q over them is unbiased. Because p / q and all of its derivatives vanish at
    the ends of v for a density p with normal or exponential tails, it is smooth and periodic, and
    the error of the average falls faster than every power of K (Sloan and Joe, 1994, "Lattice
    Methods for Multiple Integration").

    Args:
        particles: Number of draws K.
        shape: Points, units, and latents of a unit: (S, G, d), d at most 3.
        generator: Generator of the shifts.
        like: A tensor of the precision and device.

    Returns:
        Noise (K, S, G, d) and its log density (K, S, G).
    """
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    lattice = torch.tensor(_lattice(shape[-1], particles), **options)
    shift = torch.rand(1, *shape, generator=generator, **options)
    lattice = lattice.view(particles, *[1] * (len(shape) - 1), shape[-1])
    v = (lattice + shift).frac_().clamp_(EDGE, 1 - EDGE).mul_(2).sub_(1)
    inside = (1 - v * v).rsqrt_()
    noise = v.mul_(WIDTH[shape[-1] - 1]).mul_(inside)
    # 1 / (1 - v^2) = 1 + x^2 / a^2, dx / dv = a (1 - v^2)^(-3/2), and v has the density 1/2.
    return noise, inside.log_().sum(-1).mul_(-3).sub_(_log_constant(shape[-1]))


def wide_log_density(x: Tensor) -> Tensor:
    """Log density of wide noise at values of units. (..., d) -> (...)."""
    a = WIDTH[x.shape[-1] - 1]
    return (x / a).square().log1p().sum(-1).mul(-1.5).sub(_log_constant(x.shape[-1]))


def _log_constant(dim: int) -> float:
    return dim * math.log(2 * WIDTH[dim - 1])


@lru_cache
def normal_variance(dim: int) -> float:
    """Relative variance of the weights of a standard normal of so many latents, by wide noise."""
    a = WIDTH[dim - 1]
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    wide = (1 + (x / a).square()).pow(-1.5) / (2 * a)
    square = torch.trapezoid((-x.square()).exp() / (2 * math.pi) / wide, x)
    return float(square) ** dim - 1


@lru_cache
def _lattice(dim: int, particles: int) -> list[list[float]]:
    """Points of a rank-1 lattice, (K, d): Korobov's with the least error P_2 of all."""
    place = torch.arange(particles)
    best: tuple[float, Tensor] = (math.inf, place.unsqueeze(-1))
    for step in range(1, particles if dim > 1 else 2):
        if math.gcd(step, particles) > 1:
            continue
        powers = torch.tensor([pow(step, k, particles) for k in range(dim)])
        at = (place.unsqueeze(-1) * powers % particles).double() / particles
        error = float((1 + 2 * math.pi**2 * (at * at - at + 1 / 6)).prod(-1).mean())
        if error < best[0]:
            best = error, at
    found: list[list[float]] = best[1].tolist()
    return found
