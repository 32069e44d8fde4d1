"""Randomised quasi-Monte Carlo normal noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Beyond this number of latents a lattice is no better than antithetic draws.
LATTICE_DIM = 8


def normal_noise(
    particles: int, shape: tuple[int, ...], generator: torch.Generator, like: Tensor
) -> Tensor:
    """K draws of standard normal noise for each point and unit, (K, *shape).

    Each draw has the normal distribution; together they are more even than independent ones:
    a Kronecker lattice with a random shift of each unit (Cranley and Patterson, 1976,
    doi:10.1137/0713071) for few latents, pairs of opposite draws for many. Averages over them are
    unbiased, and those of different units are independent.

    Args:
        particles: Number of draws K.
        shape: Points, units, and latents of a unit: (S, G, d).
        generator: Generator of the shifts.
        like: A tensor of the precision and device.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": like.dtype, "device": like.device}
    if particles == 1:
        return torch.randn(1, *shape, **options)
    if shape[-1] > LATTICE_DIM:
        half = torch.randn((particles + 1) // 2, *shape, **options)
        return torch.cat([half, -half])[:particles]
    place = torch.arange(particles, dtype=like.dtype, device=like.device)
    steps = torch.tensor(_steps(shape[-1], particles), dtype=like.dtype, device=like.device)
    shift = torch.rand(1, *shape, **options)
    lattice = place.view(-1, *[1] * (len(shape) - 1), 1) * steps
    uniform = (lattice + shift).frac().clamp(1e-12, 1 - 1e-12)
    return torch.special.ndtri(uniform)


def _steps(dim: int, particles: int) -> list[float]:
    """Steps of the lattice: 1 / K, then powers of the root of x^(d) = x + 1 (Roberts, 2018)."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / max(dim, 1))
    return [1 / particles, *(math.pow(1 / root, k + 1) for k in range(dim - 1))]
