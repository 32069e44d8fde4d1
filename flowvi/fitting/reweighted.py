"""Guides of shared latents fitted to their weighted draws, without further gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flowvi.diagnostics import psis
from flowvi.draws.structured import theta_draws
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.restart import Restart
from flowvi.flows.affine import Triangular
from flowvi.guides.guide import Guide
from flowvi.guides.registry import make_guide
from flowvi.initialization.gaussian import factor_of
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.targets.structure import MarginalTarget
from flowvi.training.adam import Adam
from flowvi.training.learning_rate import decayed
from flowvi.training.records import ADAPT, CHECK, REWEIGHT

# Fewest effective draws for each dimension, and at all, whose moments mean something; and fewest
# for each dimension to which skews are fitted.
FEWEST, FEW_DRAWS, FEWEST_SKEWS = 2, 40, 10
# Factor of these effective draws by which draws have to be more for tempered weights, and steps of
# the search for their power.
LEAST_SIZE, BISECTIONS = 4, 20
# Draws of a pilot, for each dimension where these are more, and of its conditionals.
PILOT, PILOT_DIM, POINTS = 200, 40, 16
# Share of a time budget at which a pilot ends.
PILOT_SHARE = 0.5
# Rounds of a pilot, share of effective draws whose moments are no better than the guide's, and
# effective draws of the check for each dimension whose moments are better than those of a pilot.
ROUNDS, NEAR, ENOUGH = 3, 0.9, 15
# Steps of the training on weighted draws, draws of a step, and step size.
STEPS, BATCH, RATE = 500, 512, 1e-2
# Largest dimension of a flow that is fitted to draws alone.
MOST_DIM = 50


class WeightedDraws(NamedTuple):
    """Shared latents with smoothed, normalised weights: (S, p) and (S).

    The weights may be a power of theirs: fewer draws than moments need were effective.
    """

    theta: Tensor
    weight: Tensor
    power: float = 1.0

    @property
    def effective(self) -> float:
        """Effective number of draws."""
        return float(1 / self.weight.square().sum())


def moments(restart: Restart, candidate: Candidate) -> Candidate | None:
    r"""The guide with an affine map behind it, so that it has the weighted moments of its draws.

    .. math:: z' = m_w + L_w L_q^{-1} (z - m_q)

    with the means and Cholesky factors of the weighted draws (w) and of the plain ones (q).
    """
    affine = getattr(candidate.guide, "affine", None)
    if not isinstance(restart.target, MarginalTarget) or not isinstance(affine, Triangular):
        return None
    drawn = _drawn(restart, candidate)
    if drawn is None:
        return None
    (to, scale), (source, before) = _moments(drawn), _plain_moments(drawn)
    turn = torch.linalg.solve_triangular(before, scale, upper=False, left=False)
    new = replace(candidate, guide=copy.deepcopy(candidate.guide), diagnosis=None, weighted=None)
    moved = cast(Triangular, new.guide.affine)
    with torch.no_grad():
        moved.origin.copy_(to + turn @ (moved.origin - source))
        moved.frame.copy_(turn @ moved.frame)
    return new


def pilot(restart: Restart, candidate: Candidate) -> Candidate:
    """The first guide with the weighted moments of few draws, so that its check is not wasted.

    Laplace's formula may be off by many nats for many units, which moves its normal.
    """
    target, size = restart.target, max(PILOT, PILOT_DIM * restart.target.dim)
    if not isinstance(target, MarginalTarget) or restart.settings.steps is not None:
        return candidate

    checked = restart.schedule.check_draws

    def work() -> Candidate:
        with torch.no_grad(), isolated_rng(restart.seed(ADAPT)):
            theta, _ = candidate.guide.sample((POINTS,))
        target.adapt(theta, restart.seed(ADAPT), lambda line: None)
        found = candidate
        for number in range(ROUNDS):
            seed = derive_seed(restart.seed(REWEIGHT), number)
            found.keep(theta_draws(target, [found.guide], size, seed))
            drawn = _drawn(restart, found)
            effective = 0.0 if drawn is None or drawn.power < 1 else drawn.effective
            # The draws of the check give better moments than these, if enough are effective.
            ready = size > PILOT and effective * checked > ENOUGH * target.dim * size
            fits = ready or effective > NEAR * size
            better = None if fits else moments(restart, found)
            found.weighted = None
            if better is None:
                break
            found = better
        return found

    try:
        with abort_on_interrupt(), restart.session.clock.deadline(PILOT_SHARE):
            return restart.session.checkpointer.run_once(
                "pilot",
                restart.record,
                work,
                lambda found: [cpu_state_dict(found.guide), [*target.own_state().items()]],
                lambda state: _restored(restart, candidate, state),
            )
    except Interrupted:
        return candidate


def _restored(restart: Restart, candidate: Candidate, state: Any) -> Candidate:
    load_tensors(candidate.guide, dict(state[0]), "The checkpoint")
    cast(MarginalTarget, restart.target).set_own_state(dict(state[1]))
    return candidate


def likeliest(restart: Restart, candidate: Candidate) -> Candidate | None:
    """Skews of each direction, of the largest weighted likelihood of the guide's draws.

    The gradient of the forward KL divergence needs no density of the target (Naesseth, Lindsten
    and Blei, 2020, arXiv:2003.10374).
    """
    if candidate.name != "fullrank" or not 1 < restart.target.dim <= MOST_DIM:
        return None
    drawn = _drawn(restart, candidate)
    few = drawn is None or drawn.power < 1
    if drawn is None or few or drawn.effective < FEWEST_SKEWS * restart.target.dim:
        return None
    new = Candidate(restart.to_target(make_guide("skewed", restart.target.dim)), "skewed")
    new.guide.start(*_moments(drawn))
    restart.session.checkpointer.run_once(
        "likeliest",
        restart.record,
        lambda: _train(restart, new.guide, drawn),
        lambda _: cpu_state_dict(new.guide),
        lambda tensors: load_tensors(new.guide, tensors, "The checkpoint"),
    )
    return new


def _plain_moments(drawn: WeightedDraws) -> tuple[Tensor, Tensor]:
    """Mean of the draws without weights (p), and Cholesky factor of their covariance (p, p)."""
    loc = drawn.theta.mean(0)
    shift = drawn.theta - loc
    return loc, factor_of(shift.mT @ shift / len(shift))


def _moments(drawn: WeightedDraws) -> tuple[Tensor, Tensor]:
    r"""Weighted mean (p), and Cholesky factor of a covariance (p, p), which is shrunk.

    In the axes in which the plain draws are white, the elements of the weighted covariance W off
    its diagonal are shrunk by the share of their squares that is noise, p (p - 1) / n of n
    effective draws (Schaefer and Strimmer, 2005, doi:10.2202/1544-6115.1175).
    """
    loc, scale = _plain_moments(drawn)
    white = torch.linalg.solve_triangular(scale, (drawn.theta - loc).mT, upper=False).mT
    mean = (drawn.weight[:, None] * white).sum(0)
    shift = white - mean
    covariance = (drawn.weight[:, None] * shift).mT @ shift
    diagonal = covariance.diagonal().diag()
    off = covariance - diagonal
    p, width = len(mean), covariance.diagonal().mean()
    noise = width.square() * p * (p - 1) / drawn.effective
    kept = 1 - (noise / off.square().sum().clamp(min=1e-300)).clamp(max=1.0)
    return loc + scale @ mean, scale @ factor_of(diagonal + kept * off)


def _drawn(restart: Restart, candidate: Candidate) -> WeightedDraws | None:
    """Weighted draws of a guide, with tempered weights where too few are effective.

    None if there are too few to fit anything to. A normal with moments by a power of the weights
    goes a part of the way, after which more draws are effective.
    """
    target = restart.target
    if not isinstance(target, MarginalTarget) or not target.dim:
        return None
    draws = candidate.weighted
    if draws is None:
        n = restart.schedule.check_draws
        draws = theta_draws(target, [candidate.guide], n, restart.seed(CHECK))
    smoothed, _ = psis(draws.log_weights.ravel())
    theta, weight = (
        torch.as_tensor(x, dtype=target.dtype, device=target.device) for x in (draws.z[0], smoothed)
    )
    found = WeightedDraws(theta, weight.exp())
    return _tempered(found, weight, max(FEW_DRAWS, FEWEST * target.dim))


def _tempered(found: WeightedDraws, log_weight: Tensor, least: int) -> WeightedDraws | None:
    """The largest power of the weights, by bisection, with so many effective draws."""
    if found.effective >= least:
        return found
    if len(log_weight) < LEAST_SIZE * least or not log_weight.isfinite().all():
        return None
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        power = 0.5 * (low + high)
        some = WeightedDraws(found.theta, torch.softmax(power * log_weight, 0), power)
        low, high = (power, high) if some.effective >= least else (low, power)
    return WeightedDraws(found.theta, torch.softmax(low * log_weight, 0), low)


def _train(restart: Restart, guide: Guide, drawn: WeightedDraws) -> None:
    """Maximise the weighted log likelihood; half of the draws tell when to stop."""
    trained = [p for p in guide.parameters() if p.requires_grad]
    optimiser = Adam(trained)
    best, kept = math.inf, nn.utils.parameters_to_vector(trained).detach().clone()
    held = torch.arange(len(drawn.theta)) % 4 == 0
    with isolated_rng(restart.seed(REWEIGHT)):
        for step, rows in enumerate(_batches(drawn.weight * ~held)):
            lr = decayed(step, STEPS, RATE)
            loss = -guide.log_prob(drawn.theta[rows]).mean()
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(trained, gradients, strict=True)
            ]
            gradient = torch.cat(flat)
            if not gradient.isfinite().all():
                break
            optimiser.step(gradient, lr)
            if step % 20 == 19:
                with torch.no_grad():
                    log_q = guide.log_prob(drawn.theta[held])
                    loss = -(drawn.weight[held] * log_q).sum() / drawn.weight[held].sum()
                if float(loss) < best:
                    best = float(loss)
                    kept = nn.utils.parameters_to_vector(trained).detach().clone()
    with torch.no_grad():
        nn.utils.vector_to_parameters(kept, trained)
    restart.record.log.append(f"skews fitted to {len(drawn.theta)} weighted draws")


def _batches(weight: Tensor) -> Iterator[Tensor]:
    for _ in range(STEPS):
        yield torch.multinomial(weight, min(BATCH, len(weight)), replacement=True)
