"""A second opinion on draws: short Markov chains that start at them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.diagnostics import psis
from flowvi.diagnostics.bridge_sampling import short_bridge
from flowvi.diagnostics.drift import Chains, Opinion, opinion
from flowvi.diagnostics.moments import blocks
from flowvi.draws.diagnose import axes_of, coordinates
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import stratified
from flowvi.guides.guide import Guide, frozen
from flowvi.guides.pushforward import Pushforward
from flowvi.runtime.rng import isolated_rng
from flowvi.samplers.hmc import Point, SamplingSpace, hmc_transition
from flowvi.targets import Target


class ChainLengths(NamedTuple):
    """Numbers of chains and transitions.

    Attributes:
        chains: Chains, each from another draw.
        tuned: Transitions that adapt the step size, and are dropped.
        kept: Transitions after these.
        time: Length of a trajectory, in units in which the draws have sds of about one.
        acceptance: Acceptance probability aimed at.
        leapfrog: Most steps of a trajectory.
    """

    chains: int = 400
    tuned: int = 5
    kept: int = 8
    time: float = 1.8
    acceptance: float = 0.8
    leapfrog: int = 8

    @property
    def evaluations(self) -> int:
        """Largest number of gradients."""
        return self.chains * (1 + self.leapfrog * (self.tuned + self.kept))


# For draws whose weights are excellent, for others.
SHORT, LONG = ChainLengths(chains=300, tuned=4, kept=6), ChainLengths()
# Largest difference of two log densities, relative to their range, that rounding explains.
SAME = 0.01
# Rate at which the step size follows the acceptance.
RATE = 2.0


class _Whitened(SamplingSpace):
    """The space of z, in which a table of draws has mean zero and unit covariance."""

    def __init__(self, target: Target, z: Tensor, weights: Tensor) -> None:
        self.target, self.chunk = target, target.chunk()
        self.loc = weights @ z
        centred = z - self.loc
        covariance = (weights[:, None] * centred).mT @ centred
        scale = covariance.diagonal().clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        # A little of the diagonal, for fewer draws than dimensions.
        ridge = min(1.0, 0.1 * len(scale) * float(weights.square().sum())) + 1e-6
        correlation = covariance / scale / scale[:, None]
        mixed = (1 - ridge) * correlation + ridge * torch.eye(len(scale)).to(z)
        self.scale_tril = scale[:, None] * torch.linalg.cholesky(mixed)
        self.volume = self.scale_tril.diagonal().log().sum()

    def pull(self, z: Tensor) -> Tensor:
        """Map z to u. (n, D) -> (n, D)."""
        return torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).mT, upper=False).mT

    def map(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        volume = self.volume.expand(len(u))
        return self.loc + u @ self.scale_tril.mT, volume, -0.5 * u.square().sum(-1)

    def at(self, u: Tensor) -> Point:
        parts = [super(_Whitened, self).at(part) for part in u.split(self.chunk)]
        return Point(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Base(_Whitened):
    """The base space of a guide, where its own draws are standard normal or nearly so."""

    guide: Pushforward

    def __init__(self, target: Target, guide: Pushforward) -> None:
        self.target, self.guide, self.chunk = target, guide, target.chunk()

    def pull(self, z: Tensor) -> Tensor:
        y, _ = self.guide.affine.inverse(z, None)
        u, _ = self.guide.flow.inverse(y, None)
        return u

    def map(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, volume = self.guide.transport(u)
        return z, volume, self.guide.base.log_prob(u)


def second_opinion(
    draws: Draws,
    guide: Guide | None,
    resampled: bool = False,
    seed: int = 0,
    lengths: ChainLengths = LONG,
) -> Opinion:
    """Judge draws by short chains that start at them, and leave the posterior unchanged.

    The chains move in the base space of the guide, where it has one, and otherwise in units of
    the draws' covariance. The global generators are unchanged.

    Args:
        draws: Draws of a fit, with their densities.
        guide: The guide that drew them, if there is one.
        resampled: Whether to judge the draws by their weights, not as they are.
        seed: Seed of the chains.
        lengths: Numbers of chains and transitions.

    Raises:
        ValueError: The density of the draws is not that of their target, or an estimate of it.
    """
    target = draws.target
    assert isinstance(target, Target)
    table = draws.z.reshape(len(draws), -1)
    log_p = draws.log_p.ravel()
    weights = np.isfinite(log_p).astype(np.float64)
    if resampled:
        weights = np.exp(psis(draws.log_weights.ravel()).log_weights)
    weights = weights / weights.sum()
    with torch.no_grad(), isolated_rng(seed):
        rng = np.random.default_rng(seed)
        places = _starts(weights, min(lengths.chains, len(table)), rng)
        z = torch.as_tensor(table, dtype=target.dtype, device=target.device)
        with frozen(target) if guide is None else frozen(target, guide):
            space = _space(target, guide, z, torch.as_tensor(weights).to(z))
            path, path_log_p, path_log_w, acceptance = _run(
                space, z[places], log_p[places], lengths
            )
    found = Chains(
        table.astype(np.float64),
        log_p,
        weights,
        table[places].astype(np.float64),
        log_p[places],
        path,
        path_log_p,
    )
    named = blocks(coordinates(draws), axes_of(draws))
    labels = [name + index for name, indices, _ in named for index in indices]
    said = opinion(found, labels, acceptance)
    if not isinstance(space, _Base) or not said.mixed:
        return said
    value, error = short_bridge(draws.log_weights.ravel(), path_log_w.T)
    return replace(said, bridge=(value, error))


def _starts(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows at which the chains start: half of them even ones, half of them odd ones."""
    places = []
    for first in (0, 1):
        own = weights[first::2]
        if own.any():
            places.append(first + 2 * stratified(own / own.sum(), n // 2, rng))
    return np.concatenate(places)


def _space(target: Target, guide: Guide | None, z: Tensor, weights: Tensor) -> _Whitened:
    if isinstance(guide, Pushforward):
        base = _Base(target, guide)
        if base.pull(z[:8]).isfinite().all():
            return base
    return _Whitened(target, z, weights)


def _run(
    space: _Whitened, z: Tensor, log_p: np.ndarray, lengths: ChainLengths
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Points of the chains (T, N, D), log densities and weights (T, N), and mean acceptance.

    Args:
        space: The space in which they move.
        z: Where they start, (N, D).
        log_p: The log densities there, (N).
        lengths: Numbers of transitions.
    """
    point = space.at(space.pull(z))
    _check_density(_log_p(point), log_p)
    step = min(1.0, 1.2 * z.shape[-1] ** -0.25)
    taken, points, densities, log_w = [], [], [], []
    for i in range(lengths.tuned + lengths.kept):
        number = min(lengths.leapfrog, max(1, math.ceil(lengths.time / step)))
        point, chance = hmc_transition(space, point, 1.0, step, number)
        if i < lengths.tuned:
            step *= math.exp(RATE * (chance - lengths.acceptance))
            continue
        taken.append(chance)
        points.append(point.z.double().cpu().numpy())
        densities.append(_log_p(point))
        log_w.append(point.log_w.double().cpu().numpy())
    return np.stack(points), np.stack(densities), np.stack(log_w), float(np.mean(taken))


def _log_p(point: Point) -> np.ndarray:
    """Log density of the target with respect to z, (N)."""
    found: np.ndarray = (point.density(1.0) - point.log_det).double().cpu().numpy()
    return found


def _check_density(found: np.ndarray, stated: np.ndarray) -> None:
    """Refuse draws whose log density, up to rounding, is another one than that of their target."""
    both = np.isfinite(found) & np.isfinite(stated)
    if both.any() and np.median(np.abs(found - stated)[both]) > SAME * (1 + np.ptp(stated[both])):
        raise ValueError(
            "Chains cannot start at these draws: their log density is a bound or an estimate, not "
            "that of the target. The verdict by weights applies: diagnose(draws)."
        )
