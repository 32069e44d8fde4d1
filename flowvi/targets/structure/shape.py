"""A cubic map of normal noise for each unit: heavier tails and skew of its conditional."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Least and largest cubic coefficient; above 1/3 the map is not monotone at zero.
LEAST_CUBIC, MOST_CUBIC = 0.003, 0.06
# Largest quadratic coefficient as a share of that where the map stops to be monotone.
STEEPEST = 0.7
# Range of a scale, and largest shift.
NARROWEST, WIDEST, FARTHEST = 0.5, 3.0, 2.0


class Shape:
    r"""The map x = m + s (e + a (e^2 - 1) + c (e^3 - 3 e)) of standard normal noise e.

    To first order in a and c, x has skewness 6 a and excess kurtosis 24 c (Cornish and Fisher,
    1938; Fleishman, 1978, doi:10.1007/BF02293811). The map is monotone since
    a^2 < 3 c (1 - 3 c); with c > 0 the tails are heavier than those of every normal.

    Args:
        coefficients: m, s, a and c of each latent of each unit, (4, G, d).
    """

    def __init__(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients
        # Units whose map is not the identity.
        self.bent = bool((coefficients != self.identity(coefficients[0])).any())

    @staticmethod
    def identity(like: Tensor) -> Tensor:
        """Coefficients of the identity for latents (G, d)."""
        zero = torch.zeros_like(like)
        return torch.stack([zero, zero + 1, zero, zero])

    @staticmethod
    def from_moments(mean: Tensor, sd: Tensor, skewness: Tensor, kurtosis: Tensor) -> Tensor:
        """Coefficients of given moments, (G, d) each; kurtosis is the excess. (4, G, d)."""
        cubic = (kurtosis / 24).clamp(LEAST_CUBIC, MOST_CUBIC)
        skew = skewness / 6
        # More skew needs a larger cubic part.
        cubic = torch.maximum(cubic, (skew.square() / (3 * STEEPEST**2)).clamp(max=MOST_CUBIC))
        limit = STEEPEST * (3 * cubic * (1 - 3 * cubic)).sqrt()
        skew = skew.clamp(-limit, limit)
        variance = 1 + 2 * skew.square() + 6 * cubic.square()
        scale = (sd / variance.sqrt()).clamp(NARROWEST, WIDEST)
        return torch.stack([mean.clamp(-FARTHEST, FARTHEST), scale, skew, cubic])

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their log density by unit. (..., G, d) -> (..., G, d), (..., G)."""
        log_density = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        if not self.bent:
            return noise, log_density
        shift, scale, a, c = self.coefficients
        square = noise.square()
        x = shift + scale * (noise + a * (square - 1) + c * noise * (square - 3))
        slope = 1 + 2 * a * noise + 3 * c * (square - 1)
        return x, log_density - (scale * slope).log().sum(-1)

    def spread(self, noise: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale noise of a known log density. (..., G, d), (..., G) -> as `forward`."""
        if not self.bent:
            return noise, log_density
        shift, scale = self.coefficients[:2]
        return shift + scale * noise, log_density - scale.log().sum(-1)

    def gathered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that `spread` takes to values, and the log of its scale, (..., G, d), (G)."""
        shift, scale = self.coefficients[:2]
        return (x - shift) / scale, scale.log().sum(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of values, and the log density of the values. As `forward`."""
        if not self.bent:
            return self.forward(x)
        shift, scale, a, c = self.coefficients
        y = (x - shift) / scale
        safe = c.clamp(min=1e-12)
        # c t^3 + p t + q = 0 with e = t - a / (3 c); p > 0 where the map is monotone.
        p = 1 - 3 * c - a.square() / (3 * safe)
        e0 = -a / (3 * safe)
        q = e0 + a * (e0.square() - 1) + c * e0 * (e0.square() - 3) - y
        w = 2 * (p / (3 * safe)).clamp(min=1e-300).sqrt()
        t = -w * torch.sinh(torch.asinh(3 * q / (p * w)) / 3)
        noise = torch.where(c > 0, e0 + t, y)
        return noise, self.forward(noise)[1]
