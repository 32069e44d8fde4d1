"""Normal approximations of a field whose log density is quadratic but for terms of each latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowvi.runtime.clock import drop_if_late
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.factors import Dense, Factor
from flowvi.targets.structure.laplace import (
    CHECKED,
    CONVERGED,
    MOST_HALVINGS,
    MOST_STEPS,
    RIDGES,
    Conditional,
    Laplace,
    Normal,
)
from flowvi.targets.structure.local_terms import Local, LocalTerms, Rest
from flowvi.targets.structure.structure import CHAIN, UNITS, Structure

# Fewest latents of a field for which the split is made.
FEWEST_LATENTS = 17
# Nodes of Gauss and Hermite's rule, and rounds of the search for the normal of the largest ELBO.
NODES, ROUNDS = 15, 4
# Numbers of the precision matrices in one evaluation.
AT_ONCE = 8_000_000


@dataclass
class FieldConditional(Conditional):
    """As `Conditional`, with the quadratic part around the mode.

    Attributes:
        rest: The quadratic part.
        local: Terms of single latents at the mode.
    """

    rest: Rest
    local: Local


@dataclass
class FieldNormal(Normal):
    """As `Normal`, with the quadratic part around the centre.

    Attributes:
        z: Points (theta, centre), (S, D).
        rest: The quadratic part around the centre.
        added: Diagonal that the precision has beside that of the quadratic part, (S, N).
    """

    z: Tensor
    rest: Rest
    added: Tensor


class Field(Laplace):
    r"""Laplace's approximation of log p = R(theta, u) + sum_k l_k(theta, u_k), R quadratic in u.

    The precision of R is found once for each theta. A step of Newton's method then needs the
    single terms alone, and one Cholesky factor.

    Args:
        target: The log density.
        structure: Its structure, a field.

    Raises:
        TypeError: The log density has no such form.
    """

    def __init__(self, target: GlobalTarget, structure: Structure) -> None:
        super().__init__(target, structure)
        self.terms = LocalTerms(target, structure)

    @property
    def at_once(self) -> int:
        return max(1, min(256, AT_ONCE // self.columns.numel() ** 2))

    def _search(self, theta: Tensor, enough: float) -> Conditional:
        parts = [self._search_some(one, enough) for one in theta.split(self.at_once)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _search_some(self, theta: Tensor, enough: float) -> FieldConditional:
        start = self._start(theta)
        rest = self.terms.rest(self.points(theta, start), start[:, 0])
        found = self._step(theta, start, rest)
        for number in range(MOST_STEPS):
            drop_if_late()
            if not (found.left > enough).any():
                break
            step = self._bounded(found.factor.solve(found.slope), number)
            tried = self._tried(theta, found, step)
            if tried is None:
                break
            stuck = not (tried.left < 0.9 * found.left)[found.left > enough].any()
            near = not (found.left > CHECKED).any()
            found = tried
            if stuck and near:
                break
        return found

    def _tried(
        self, theta: Tensor, found: FieldConditional, step: Tensor
    ) -> FieldConditional | None:
        """The end of a step, halved where it loses; None if that does not help."""
        size = torch.ones_like(found.left)
        for _ in range(MOST_HALVINGS):
            move = size.unsqueeze(-1) * step
            tried = self._step(theta, found.mode + move, found.rest.at(move[:, 0]))
            if not (found.left > CHECKED).any() and found.definite.all():
                return tried
            gained = (tried.log_p - found.log_p).unsqueeze(-1)
            rounding = 1e-10 * found.log_p.abs().clamp(min=1.0).unsqueeze(-1)
            worse = ~(gained >= 1e-4 * size * found.left - rounding) & (found.left > CONVERGED)
            if not worse.any():
                return tried
            size = torch.where(worse, 0.5 * size, size)
        return None

    def _step(self, theta: Tensor, mode: Tensor, rest: Rest) -> FieldConditional:
        """The conditional around a point, without a search."""
        z, u = self.points(theta, mode), mode[:, 0]
        local = self.terms.evaluate(z, u, second=True)
        assert local.second is not None
        slope = rest.slope + local.first
        factor, definite, _ = _factor(rest.precision, -local.second)
        left = 0.5 * (slope.unsqueeze(1) * factor.solve(slope.unsqueeze(1))).sum(-1)
        left = torch.where(left.isfinite(), left, torch.inf)
        log_p = rest.value + local.value
        return FieldConditional(
            z, mode, log_p, slope.unsqueeze(1), factor, left, definite, rest, local
        )

    def normal(self, found: Conditional) -> Normal:
        r"""The normal of the largest ELBO of those with precision P + diag(d).

        P is the precision of the quadratic part. At the optimum
        d = -E l''(u) and H^-1 (R'(m) + E l'(u)) = 0, by Gauss and Hermite's rule (Opper and
        Archambeau, 2009, doi:10.1162/neco.2008.08-07-592). Where an iteration fails, the normal
        at the mode is returned.
        """
        assert isinstance(found, FieldConditional)
        assert found.local.second is not None
        theta = found.z[:, self.shared]
        best = FieldNormal(
            theta, found.mode, found.factor, found.z, found.rest, -found.local.second
        )
        if not self.refined or not bool(found.definite.all()):
            # A ridge belongs to what is added.
            return best if bool(found.definite.all()) else self._with_ridge(found)
        now = best
        for _ in range(ROUNDS):
            assert isinstance(now.factor, Dense)
            sd = now.factor.sd()
            moved = now.centre[:, 0] + self._nodes[:, None, None] * sd
            points = now.z.repeat(NODES, 1)
            local = self.terms.evaluate(points, moved.flatten(0, 1), second=True)
            assert local.second is not None
            first, second = (
                (self._weights[:, None, None] * x.view(NODES, *sd.shape)).sum(0)
                for x in (local.first, local.second)
            )
            factor, ok, _ = _factor(now.rest.precision, -second)
            move = factor.solve((now.rest.slope + first).unsqueeze(1))
            if not ok.all() or not move.isfinite().all():
                return best
            centre = now.centre + move
            z = self.points(theta, centre)
            now = FieldNormal(theta, centre, factor, z, now.rest.at(move[:, 0]), -second)
        return now

    def _with_ridge(self, found: FieldConditional) -> FieldNormal:
        assert found.local.second is not None
        factor, _, ridge = _factor(found.rest.precision, -found.local.second)
        added = ridge - found.local.second
        theta = found.z[:, self.shared]
        return FieldNormal(theta, found.mode, factor, found.z, found.rest, added)

    @cached_property
    def _nodes(self) -> Tensor:
        nodes, _ = np.polynomial.hermite_e.hermegauss(NODES)
        return torch.as_tensor(nodes).to(self.mode)

    @cached_property
    def _weights(self) -> Tensor:
        _, weights = np.polynomial.hermite_e.hermegauss(NODES)
        return torch.as_tensor(weights / weights.sum()).to(self.mode)

    def log_weight(self, normal: Normal, white: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(normal, FieldNormal)
        lead, count = white.shape[:-2], white.shape[-1]
        v = normal.factor.spread(white)[..., 0, :]
        centre = normal.centre[:, 0]
        flat = (centre + v).reshape(-1, count)
        z = normal.z if len(normal.z) == 1 else normal.z.expand(*lead, -1).reshape(len(flat), -1)
        local = self.terms.evaluate(z, flat)
        single = local.first.view(v.shape)
        half_log = 0.5 * (count * math.log(2 * math.pi) - normal.factor.log_det[:, 0])
        # The quadratic parts of log p and of log q cancel but for the diagonal that q adds.
        value = normal.rest.value + half_log + (normal.rest.slope * v).sum(-1)
        value = value + 0.5 * (normal.added * v.square()).sum(-1) + local.value.view(v.shape[:-1])
        slope = normal.rest.slope + normal.added * v + single
        return value, normal.factor.pull(slope.unsqueeze(-2))


def laplace_of(target: GlobalTarget, structure: Structure) -> Laplace:
    """Laplace's approximation in the form that suits a structure."""
    if structure.kind not in (UNITS, CHAIN) and structure.size >= FEWEST_LATENTS:
        try:
            return Field(target, structure)
        except TypeError:
            # Not a normal prior with data of single latents.
            pass
    return Laplace(target, structure)


def _factor(precision: Tensor, added: Tensor) -> tuple[Dense, Tensor, Tensor]:
    """The factor of a precision plus a diagonal, with a ridge where it needs one."""
    matrix = precision + torch.diag_embed(added)
    matrix = matrix.nan_to_num(nan=-1.0).unsqueeze(1)
    first = Dense(matrix)
    ridge = torch.zeros_like(added)
    if first.ok.all():
        return first, first.ok, ridge
    scale = matrix.diagonal(dim1=-2, dim2=-1)[:, 0].abs() + 1
    factor = first
    for size in RIDGES[1:]:
        ridge = torch.where(factor.ok, ridge, size * scale)
        factor = Dense(matrix + torch.diag_embed(ridge).unsqueeze(1))
        if factor.ok.all():
            break
    return factor, first.ok, ridge


def _joined(some: Sequence[FieldConditional]) -> FieldConditional:
    plain = {
        name: torch.cat([getattr(part, name) for part in some])
        for name in ("z", "mode", "log_p", "gradient", "left", "definite")
    }
    rest = Rest(*(torch.cat(x) for x in zip(*(part.rest for part in some), strict=True)))
    local = Local(*(torch.cat(x) for x in zip(*(part.local for part in some), strict=True)))
    factor: Factor = Dense.joined([part.factor for part in some])
    return FieldConditional(**plain, factor=factor, rest=rest, local=local)
