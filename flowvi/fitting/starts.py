"""The start of a restart: Gaussian approximations, the best of which initialises the guide."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowvi.fitting.given_start import start_from_given
from flowvi.fitting.start_of_rows import start_from_rows
from flowvi.guides.guide import Guide
from flowvi.guides.registry import starts_diagonal
from flowvi.initialization.candidates import JUDGE_DRAWS, Log, best_gaussian
from flowvi.initialization.gaussian import GaussianApproximation, evaluate
from flowvi.initialization.marginal import marginal_start
from flowvi.initialization.modes import further_modes
from flowvi.initialization.nested import start
from flowvi.initialization.preflight import check_integrable, preflight
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.clock import Clock, Interrupted, abort_on_interrupt
from flowvi.runtime.progress import phase
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Target
from flowvi.targets.structure import MarginalTarget
from flowvi.training.records import BUILD, LOOK, MODES

if TYPE_CHECKING:
    from flowvi.fitting.restart import Restart

# Largest D for a joint normal of the shared latents and the latents of some rows.
JOINT_DIM = 500
# A search ends between two of its parts once its share of the budget is spent. So many times that
# share, and it ends within a part.
LATE = 1.5
# Standard deviation of a start without a Gaussian approximation.
START_WIDTH = 0.3


def find_start(restart: Restart) -> list[GaussianApproximation]:
    """Find the Gaussians of a restart, the best first, or read them from its checkpoint.

    The best Gaussian of full rank can be a poor start of a guide that drops some of its
    correlations: without these, another mode is better. Such a guide begins where mean field
    would, unless it has a higher bound at the Gaussian of full rank.
    """
    target, say = restart.target, restart.record.log.append
    once = restart.session.checkpointer.run_once
    clock, share = restart.session.clock, restart.schedule.start_share

    phase("searching for a start")

    def late() -> bool:
        return clock.out_of_time(share)

    def restored(
        state: Mapping[str, Any], own: Sequence[tuple[str, Tensor]]
    ) -> list[GaussianApproximation]:
        target.set_own_state(dict(own))
        return [restart.gaussian(state)]

    if isinstance(target, NestedTarget | MarginalTarget):
        return once(
            "start",
            restart.record,
            lambda: (
                nested_start(target, restart.seed(BUILD), say)
                if isinstance(target, NestedTarget)
                else _marginal_start(restart, target, late)
            ),
            lambda found: [found[0].state(), [*target.own_state().items()]],
            lambda state: restored(*state),
        )
    given, first = restart.given, restart.settings.start
    flat = starts_diagonal(restart.name) if given is None else given.flat

    partial = given if given is not None and given.partial and restart.fresh else None

    def search(diagonal: bool) -> list[GaussianApproximation]:
        def everywhere() -> list[GaussianApproximation]:
            return global_start(target, restart.seed, clock, say, diagonal, share)

        if first is None:
            return everywhere()
        return start_from_given(target, first, restart.seed(BUILD), say, diagonal, late, everywhere)

    def suited() -> list[GaussianApproximation]:
        """Gaussians of the kind, with or without correlations, at which the guide is better."""
        if partial is None:
            return search(flat)
        plain = search(True)
        if late():
            return plain
        dense = search(False)
        bounds = [bound_at(target, partial, g[0], restart.seed(BUILD)) for g in (plain, dense)]
        say("guide at mean field: {:.3f}; at the Gaussian of full rank: {:.3f}".format(*bounds))
        return dense if bounds[1] > bounds[0] else plain

    return once(
        "start",
        restart.record,
        suited,
        lambda found: [g.state() for g in found],
        lambda found: [restart.gaussian(g) for g in found],
    )


def bound_at(target: Target, guide: Guide, g: GaussianApproximation, seed: int) -> float:
    """The ELBO of a copy of a guide that is initialised at a Gaussian, on draws of a seed."""
    fresh = copy.deepcopy(guide).to(dtype=target.dtype, device=target.device)
    fresh.start(g.loc, g.scale_tril)
    with torch.no_grad(), isolated_rng(seed):
        z, log_q = fresh.sample((JUDGE_DRAWS,))
        bound = float((evaluate(target, z) - log_q).mean())
    return bound if math.isfinite(bound) else -math.inf


def global_start(
    target: Target,
    seed: Callable[[int], int],
    clock: Clock,
    say: Log,
    diagonal: bool,
    share: float,
) -> list[GaussianApproximation]:
    """Return the best Gaussian, then other modes, then the ends of other searches.

    Args:
        target: The log density.
        seed: Purpose -> seed.
        clock: Clock of the fit.
        say: Function that takes a line of the log.
        diagonal: Whether the guide has a diagonal covariance.
        share: Share of a time budget for the search.

    Raises:
        ModelError: The density is finite nowhere, or has no integral.
    """
    found = start_from_rows(target, seed, clock, say, diagonal, share)
    if found is not None:
        say(check_integrable(target, found[0]))
        return found
    seen = preflight(target, seed(LOOK))
    say(str(seen))
    with clock.deadline(LATE * share):
        best, others, ends = best_gaussian(
            target,
            seed(BUILD),
            diagonal,
            say,
            lambda: clock.out_of_time(share),
            seen.median,
            seen.places,
        )
    modes: list[GaussianApproximation] = []
    phase("searching for further modes")
    with suppress(Interrupted), abort_on_interrupt():
        say(check_integrable(target, best))
        with clock.deadline(2 * LATE * share):
            modes = further_modes(
                target,
                best,
                ends,
                seen.places,
                seed(MODES),
                say,
                lambda: clock.out_of_time(2 * share),
            )
    return [best, *modes, *others]


def _marginal_start(
    restart: Restart, target: MarginalTarget, late: Callable[[], bool]
) -> list[GaussianApproximation]:
    share = LATE * restart.schedule.start_share
    with restart.session.clock.deadline(share):
        given = restart.settings.start
        return marginal_start(target, restart.seed(BUILD), restart.record.log.append, late, given)


def nested_start(target: NestedTarget, seed: int, say: Log) -> list[GaussianApproximation]:
    """Fit a normal of theta from some rows, and initialise a fresh guide of rows at it.

    Args:
        target: The density over theta; a fresh guide of rows is changed in place.
        seed: Seed of the rows, points and draws.
        say: Function that takes a line of the log.
    """
    found = start(target.target, seed) if target.dim <= JOINT_DIM else None
    if found is None:
        zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
        say(f"start: a normal with mean 0 and sd {START_WIDTH}")
        return [GaussianApproximation(zero, torch.full_like(zero, START_WIDTH), "zero")]
    if target.inner_name != "own":
        found.begin(target.inner, target.sees_theta)
    say("start: a joint normal of the shared latents and the latents of a few rows")
    return [GaussianApproximation(found.loc, found.scale_tril, "theta and some rows")]
