"""Bijections from R^n to the supports of latent sites."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, distributions
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from flowvi.targets.schema import ModelError

CIRCLE: Constraint = constraints.interval(-math.pi, math.pi)
WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
TRANSFORMED = (dist.TransformedDistribution, distributions.TransformedDistribution)


class VectorToTriangular(Transform):
    r"""A vector as a lower triangular matrix with a positive diagonal.

    The n (n + 1) / 2 entries fill the rows of the triangle in turn; those on
    the diagonal are exponentiated, so the log Jacobian is their sum. With
    `unit=True` the diagonal is one and the vector has n (n - 1) / 2 entries.

    Args:
        unit: Fix the diagonal at one.
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.lower_cholesky

    def __init__(self, unit: bool = False) -> None:
        super().__init__(cache_size=0)
        self.unit = unit

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        n = _side(shape[-1], self.unit)
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        n = shape[-1]
        return torch.Size((*shape[:-2], n * (n - 1) // 2 if self.unit else n * (n + 1) // 2))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self.unit:
            return torch.zeros_like(x).sum(-1)
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        n = _side(x.shape[-1], self.unit)
        # Entries above the triangle read a zero that is appended to the vector.
        index = torch.full((n, n), x.shape[-1], device=x.device)
        rows, columns = torch.tril_indices(n, n, -1 if self.unit else 0, device=x.device)
        index[rows, columns] = torch.arange(x.shape[-1], device=x.device)
        square = torch.cat([x, torch.zeros_like(x[..., :1])], -1)[..., index]
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        diagonal = eye if self.unit else torch.exp(square) * eye
        return square.tril(-1) + diagonal

    def _inverse(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        eye = torch.eye(n, dtype=torch.bool, device=y.device)
        logs = torch.where(eye, y, 1.0).log()
        square = y if self.unit else torch.where(eye, logs, y)
        rows, columns = torch.tril_indices(n, n, -1 if self.unit else 0, device=y.device)
        return square[..., rows, columns]


class VectorToPositiveDefinite(Transform):
    r"""A vector as a positive definite matrix :math:`L L^T` with L from `VectorToTriangular`.

    With d_i the log diagonal of L and i = 1..n,
    :math:`\log|\det| = n \log 2 + \sum_i (n - i + 2) d_i`.
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.positive_definite

    def __init__(self) -> None:
        super().__init__(cache_size=0)
        self.triangular = VectorToTriangular()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.triangular.forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.triangular.inverse_shape(shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        n = y.shape[-1]
        d = x[..., [i * (i + 3) // 2 for i in range(n)]]
        order = torch.arange(n + 1, 1, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2) + (order * d).sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        factor = self.triangular(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return self.triangular.inv(torch.linalg.cholesky(y))


def _side(entries: int, unit: bool) -> int:
    n = round((math.sqrt(1 + 8 * entries) - 1) / 2)
    return n + 1 if unit else n


def bijection(support: Constraint) -> Transform:
    """The bijection from unconstrained vectors to a support.

    Raises:
        NotImplementedError: The support has none, for example a sphere.
    """
    if isinstance(support, constraints.independent):
        base = bijection(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    if support in (constraints.positive_definite, constraints.positive_semidefinite):
        return VectorToPositiveDefinite()
    if isinstance(support, type(pyro_constraints.unit_lower_cholesky)):
        return VectorToTriangular(unit=True)
    if isinstance(support, type(constraints.lower_cholesky)):
        return VectorToTriangular()
    return biject_to(support)


def bijection_of(fn: Any) -> Transform:
    """The bijection from unconstrained vectors to where a distribution's density is positive.

    Raises:
        NotImplementedError: There is none.
    """
    if isinstance(fn, dist.VonMises):
        # torch calls it the real line, on which the density is periodic and has no integral.
        return bijection(CIRCLE)
    if isinstance(fn, distributions.MixtureSameFamily):
        return bijection_of(fn.component_distribution)
    if isinstance(fn, WRAPPERS):
        base = bijection_of(fn.base_dist)
        extra = fn.event_dim - fn.base_dist.event_dim
        return IndependentTransform(base, extra) if extra else base
    if type(fn) in TRANSFORMED and not _is_real(fn.base_dist.support):
        # torch looks at the last transform only: 3 + Exponential would cover the real line.
        return ComposeTransform([bijection_of(fn.base_dist), *fn.transforms])
    return bijection(fn.support)


def site_bijection(name: str, fn: Any) -> Transform:
    """The bijection of a latent site, or an error that names it."""
    try:
        return bijection_of(fn)
    except NotImplementedError:
        pass
    raise ModelError(
        f"Site '{name}' has support {support_of(fn)!r}, which no smooth bijection maps to R^n. For "
        "directions on a sphere, use pyro.infer.reparam.ProjectedNormalReparam; for others, sample "
        "unconstrained values and transform them in the model."
    )


def support_of(fn: Any) -> Constraint:
    """The support of a distribution, by name."""
    base = fn
    while isinstance(base, WRAPPERS):
        base = base.base_dist
    if isinstance(base, dist.VonMises):
        return constraints.independent(CIRCLE, fn.event_dim) if fn.event_dim else CIRCLE
    support: Constraint = fn.support
    return support


def _is_real(support: Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
