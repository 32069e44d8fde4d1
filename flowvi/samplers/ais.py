"""Annealed importance sampling from a guide: weighted draws that move to where q lacks mass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.guides.guide import Guide, frozen
from flowvi.runtime.rng import isolated_rng
from flowvi.samplers.hmc import Point, SamplingSpace, hmc_transition, sampling_space
from flowvi.targets import Target

ACCEPTANCE = 0.65
FIRST_STEP = 0.5
PILOT = 64
# Pilot transitions, and adaptation rate of their step size: at the first temperature, and at
# each later one.
PILOT_MOVES = (8, 3)
PILOT_RATES = (4.0, 1.0)


@dataclass(frozen=True, eq=False)
class AnnealedDraws:
    """Draws at the end of the path, with weights.

    Attributes:
        z: Points, (n, D).
        log_w: Log weights, (n), whose mean on the natural scale estimates the
            integral of p^power / q^(power - 1); -inf for a draw at which p or
            q is not finite.
        log_p: Log density of the target at z, (n).
        log_q: Log density of the guide at z, (n).
        acceptance: Average acceptance on every rung, (temperatures).
    """

    z: Tensor
    log_w: Tensor
    log_p: Tensor
    log_q: Tensor
    acceptance: Tensor


def annealed_importance_sampling(
    target: Target,
    guide: Guide,
    n: int,
    *,
    power: float = 2.0,
    temperatures: int = 8,
    leapfrog: int = 5,
    resample: bool = False,
    pilot: bool = True,
    seed: int = 0,
) -> AnnealedDraws:
    r"""Move draws of the guide towards :math:`p^a q^{1 - a}`, a = power, and weigh them.

    The path runs through :math:`\pi_b \propto p^b q^{1 - b}` with b from 0 to a
    in equal parts. At a = 1 it ends at p, and the mean weight is an unbiased
    estimate of the evidence; at a = 2 it goes on to p^2 / q, which is where the
    guide's own importance weights get their variance from: the draws leave
    what q covers for what it does not. Step sizes are set by a pilot run on
    other draws, so that they leave the weights unbiased. The caller's generators
    are left alone.

    Args:
        target: The log density p.
        guide: The density q, unconditional. Its parameters are constants.
        n: Number of draws.
        power: Where the path ends, a.
        temperatures: Rungs between the ends of the path, each with one
            transition of Hamiltonian Monte Carlo. At 0 the weights are (p / q)^a.
        leapfrog: Steps of each transition.
        resample: Resample the draws wherever their effective number is less than half.
            Many rungs then reach distant modes; draws are no longer independent.
        pilot: Whether a pilot run sets the step size of every rung. Otherwise it sets that of the
            first one, and each later one follows the acceptance of the rung before, at a quarter
            of the cost and with a bias of the weights that vanishes as n grows.
        seed: Seed of all random numbers.

    References:
        Neal (2001), "Annealed importance sampling", Statistics and Computing 11.
        Del Moral, Doucet and Jasra (2006), "Sequential Monte Carlo samplers",
        JRSS B 68: with resampling.
        Midgley et al. (2023), "Flow Annealed Importance Sampling Bootstrap",
        arXiv:2208.01893: the path to p^2 / q.
    """
    _check(n, power, temperatures, leapfrog)
    with isolated_rng(seed):
        ladder = AnnealingLadder(target, guide, power, temperatures, leapfrog, resample)
        ladder.tune(temperatures if pilot else 1)
        return ladder.run(n, follow=not pilot)


class AnnealingLadder:
    """The path from a guide through its target, with a step size for every rung.

    Args:
        target: The log density p.
        guide: The density q; it may be trained between runs.
        power: Where the path ends.
        temperatures: Rungs between its ends.
        leapfrog: Steps of each transition.
        resample: Whether to resample on the way.

    Attributes:
        steps: Step sizes, (temperatures), in units of the guide's own scales.
    """

    def __init__(
        self,
        target: Target,
        guide: Guide,
        power: float,
        temperatures: int,
        leapfrog: int,
        resample: bool = False,
    ) -> None:
        self.target, self.guide = target, guide
        self.leapfrog, self.resample = leapfrog, resample
        self.gap = power / (temperatures + 1)
        self.orders = [self.gap * (i + 1) for i in range(temperatures)]
        self.steps = [FIRST_STEP * guide.dim**-0.25] * temperatures

    def tune(self, rungs: int | None = None) -> None:
        """Set the step sizes by a pilot run, each rung from where the one before ended.

        Args:
            rungs: Number of rungs, the first ones; all by default.
        """
        with frozen(self.target, self.guide):
            space = sampling_space(self.target, self.guide)
            point = space.draw(min(PILOT, self.target.chunk()))
            for i, order in enumerate(self.orders[:rungs]):
                self.steps[i] = self.steps[max(i - 1, 0)]
                for k in range(PILOT_MOVES[min(i, 1)]):
                    point, accepted = hmc_transition(
                        space, point, order, self.steps[i], self.leapfrog
                    )
                    self._adapt(i, accepted, PILOT_RATES[min(i, 1)] / (1 + k))

    def run(self, n: int, rate: float = 0.0, follow: bool = False) -> AnnealedDraws:
        """Anneal n new draws of the guide.

        Args:
            n: Number of draws.
            rate: How fast the step sizes follow the acceptance, for the runs to
                come. Weights are unbiased given the step sizes of the run.
            follow: Whether each rung takes its step size from the acceptance of the one before.
        """
        with frozen(self.target, self.guide):
            space = sampling_space(self.target, self.guide)
            sizes = [len(part) for part in torch.ones(n).split(space.chunk)]
            runs = [self._run_chunk(space, size, follow) for size in sizes]
        accepted = torch.stack([run.acceptance * len(run.z) for run in runs]).sum(0) / n
        for i, value in enumerate(accepted.tolist()):
            self._adapt(i, value, rate)
        columns = zip(*((r.z, r.log_w, r.log_p, r.log_q) for r in runs), strict=True)
        z, log_w, log_p, log_q = (torch.cat(column) for column in columns)
        return AnnealedDraws(z, log_w, log_p, log_q, accepted)

    def _run_chunk(self, space: SamplingSpace, n: int, follow: bool) -> AnnealedDraws:
        point = space.draw(n)
        log_w = self.gap * point.log_w
        acceptance: list[float] = []
        for i, order in enumerate(self.orders):
            if self.resample:
                point, log_w = _resample_if_uneven(point, log_w)
            if follow and i:
                self.steps[i] = self.steps[i - 1]
                self._adapt(i, acceptance[-1], PILOT_RATES[1])
            point, accepted = hmc_transition(space, point, order, self.steps[i], self.leapfrog)
            acceptance.append(accepted)
            log_w = log_w + self.gap * point.log_w
        log_p, log_q = (point.density(order) - point.log_det for order in (1.0, 0.0))
        return AnnealedDraws(point.z, log_w, log_p, log_q, torch.tensor(acceptance))

    def _adapt(self, rung: int, accepted: float, rate: float) -> None:
        self.steps[rung] *= math.exp(rate * (accepted - ACCEPTANCE))


def _resample_if_uneven(point: Point, log_w: Tensor) -> tuple[Point, Tensor]:
    """Points drawn by their weights, which become equal, if the weights are too uneven."""
    weights = torch.softmax(log_w, 0)
    # The comparison is with NaN if all weights are zero: no draw can be selected.
    if not 1 / weights.square().sum() < len(weights) / 2:
        return point, log_w
    rows = torch.multinomial(weights, len(weights), replacement=True)
    level = log_w.logsumexp(0) - math.log(len(log_w))
    return Point(*(t[rows] for t in point)), level.expand(len(log_w))


def _check(n: int, power: float, temperatures: int, leapfrog: int) -> None:
    for name, value, least in (("n", n, 1), ("temperatures", temperatures, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    if leapfrog < 1:
        raise ValueError(f"leapfrog must be at least 1; got {leapfrog}.")
    if not 0 < power < math.inf:
        raise ValueError(f"power must be a positive number, 1 for p itself; got {power}.")
