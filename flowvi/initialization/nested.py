"""Where a nested fit begins: a normal of the shared latents and those of some rows together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.flows import Diagonal, Triangular
from flowvi.guides.amortized import Amortised, SharedAmortised
from flowvi.guides.pushforward import Pushforward
from flowvi.initialization.candidates import best_gaussian
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.targets import LocalTarget

# Largest number of row latents in the normal, beside the shared latents.
MOST_ROW_LATENTS = 60
# Largest total dimension of a normal with correlations.
MOST_DENSE = 150


class NestedStart(NamedTuple):
    """A normal of theta, and the linear regression of a row's latents on theta.

    Attributes:
        loc: Mean of theta, (G).
        scale_tril: Its lower triangular scale, (G, G), or its standard deviations, (G).
        centre: Mean of the latents of a row, (D).
        spread: Their standard deviations over rows, given theta, (D).
        slope: Their change with theta, (D, G).
    """

    loc: Tensor
    scale_tril: Tensor
    centre: Tensor
    spread: Tensor
    slope: Tensor

    @property
    def widths(self) -> Tensor:
        """Standard deviations of theta, (G)."""
        return self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.norm(dim=1)

    def begin(self, inner: Amortised, sees_theta: bool) -> None:
        """Start a fresh guide of rows at their mean and spread, and at their slope in theta.

        Args:
            inner: The guide; its context ends with theta in units of `loc` and `widths`.
            sees_theta: Whether the context contains theta.
        """
        inner.start(self.centre, self.spread)
        if isinstance(inner, SharedAmortised):
            inner.origin.copy_(self.loc)
            inner.widths.copy_(self.widths)
        affine = inner.guide.affine if isinstance(inner.guide, Pushforward) else None
        if sees_theta and isinstance(affine, Diagonal | Triangular):
            slope = self.slope * self.widths
            weight = affine.params.weight
            assert weight is not None
            unread = slope.new_zeros(len(slope), weight.shape[1] - slope.shape[1])
            affine.lean(torch.cat([unread, slope], -1))


class RowSubsetDensity:
    """The log density of theta and the latents of some rows, in one vector (G + B D).

    Args:
        target: The model.
        places: The rows, (B).
    """

    def __init__(self, target: LocalTarget, places: Tensor) -> None:
        assert target.shared is not None
        self.target, self.shared, self.name = target, target.shared, target.name
        self.batch = target.batch(places)
        self.dim = self.shared.dim + len(places) * target.dim
        self.dtype, self.device = self.shared.dtype, self.shared.device

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density. (*S, G + B D) -> (*S)."""
        theta, rows = z.reshape(-1, self.dim).split(
            [self.shared.dim, self.dim - self.shared.dim], -1
        )
        latents = rows.reshape(len(theta), -1, self.target.dim)
        of_rows = self.target.log_prob(latents, self.batch, theta).sum(-1)
        return (self.shared.log_prob(theta) + of_rows).reshape(z.shape[:-1])

    def starts(self, generator: torch.Generator) -> Tensor:
        """Points to start from, those of theta with rows around zero, (P, G + B D)."""
        theta = self.shared.starts(generator)[[0, -3, -1]]
        shape = (len(theta), self.dim - self.shared.dim)
        rows = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return torch.cat([theta, 0.1 * rows], -1)

    def chunk(self) -> int:
        """How many points to evaluate at a time."""
        return self.shared.chunk()


def start(target: LocalTarget, seed: int) -> NestedStart | None:
    """The best normal of theta and some rows, from their data alone; None if there is none.

    With fewer rows than the data have, the normal is wider than the posterior, and covers it.

    Args:
        target: The model.
        seed: Of the rows, points and draws.
    """
    assert target.shared is not None
    many = min(target.rows, max(1, MOST_ROW_LATENTS // target.dim))
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(target.rows, generator=generator)[:many].sort().values
    density = RowSubsetDensity(target, places)
    try:
        found = best_gaussian(density, seed, density.dim > MOST_DENSE, lambda line: None)
    except (ValueError, torch.linalg.LinAlgError):
        return None
    return _split_start(found.best, target.shared.dim, target.dim)


def _split_start(g: GaussianApproximation, shared: int, dim: int) -> NestedStart:
    loc, rows = g.loc[:shared], g.loc[shared:].reshape(-1, dim)
    if g.scale_tril.dim() == 1:
        scale, own = g.scale_tril[:shared], g.scale_tril[shared:].square()
        slope = g.loc.new_zeros(dim, shared)
    else:
        scale = g.scale_tril[:shared, :shared]
        own = g.scale_tril[shared:, shared:].square().sum(-1)
        follow = torch.linalg.solve_triangular(
            scale, g.scale_tril[shared:, :shared], upper=False, left=False
        )
        slope = follow.reshape(-1, dim, shared).mean(0)
    variance = rows.var(0, correction=0) + own.reshape(-1, dim).mean(0)
    return NestedStart(loc, scale, rows.mean(0), variance.sqrt(), slope)
