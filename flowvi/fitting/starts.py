"""The start of a restart: Gaussian approximations, the best of which initialises the guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowvi.fitting.given_start import start_from_given
from flowvi.fitting.start_of_rows import start_from_rows
from flowvi.guides.registry import starts_diagonal
from flowvi.initialization.candidates import JUDGE_DRAWS, Log, best_gaussian, refine_fully
from flowvi.initialization.gaussian import GaussianApproximation, diagonal_of, with_elbo
from flowvi.initialization.marginal import marginal_start
from flowvi.initialization.modes import further_modes
from flowvi.initialization.nested import start
from flowvi.initialization.preflight import check_integrable, preflight
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.clock import Clock, Interrupted, abort_on_interrupt
from flowvi.runtime.progress import phase
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
# Rounds in which a normal near the posterior is refined.
WARM_ROUNDS = 20
# Share of effective draws from which that normal is near enough.
NEAR_SHARE = 0.05
# Standard deviation of a start without a Gaussian approximation.
START_WIDTH = 0.3


def find_start(restart: Restart) -> list[GaussianApproximation]:
    """Find the Gaussians of a restart, the best first, or read them from its checkpoint."""
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
                else marginal_start(target, restart.seed(BUILD), say, late, restart.settings.start)
            ),
            lambda found: [found[0].state(), [*target.own_state().items()]],
            lambda state: restored(*state),
        )
    given, first, near = restart.given, restart.settings.start, restart.settings.near
    flat = starts_diagonal(restart.name) if given is None else given.flat
    return once(
        "start",
        restart.record,
        lambda: (
            start_from_given(target, first, restart.seed(BUILD), say, flat, late)
            if first is not None
            else global_start(target, restart.seed, clock, say, flat, share)
            if near is None
            else warm_start(target, near, restart.seed, clock, say, flat, share)
        ),
        lambda found: [g.state() for g in found],
        lambda found: [restart.gaussian(g) for g in found],
    )


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


def warm_start(
    target: Target,
    near: GaussianApproximation,
    seed: Callable[[int], int],
    clock: Clock,
    say: Log,
    diagonal: bool,
    share: float,
) -> list[GaussianApproximation]:
    """Refine a normal that is near the posterior; search for a start where that fails.

    Args:
        target: The log density.
        near: The normal.
        seed: Purpose -> seed.
        clock: Clock of the fit.
        say: Function that takes a line of the log.
        diagonal: Whether the guide has a diagonal covariance.
        share: Share of a time budget for the search.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed(BUILD))
    judge = torch.randn(
        JUDGE_DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    start = replace(near, loc=near.loc.to(judge), scale_tril=near.scale_tril.to(judge))
    start = diagonal_of(start) if diagonal else start
    before = with_elbo(target, start, judge)
    found = refine_fully(
        target,
        before,
        generator,
        judge,
        lambda: clock.out_of_time(share),
        WARM_ROUNDS,
        diagonal=diagonal,
    )
    say(f"start: {near.name}, refined from ELBO {before.elbo:.3f} to {found.elbo:.3f}")
    if _effective(target, found, judge) >= NEAR_SHARE:
        return [found]
    say("that is not near the posterior: a start is searched for")
    return sorted(
        [found, *global_start(target, seed, clock, say, diagonal, share)],
        key=lambda g: g.elbo if math.isfinite(g.elbo) else -math.inf,
        reverse=True,
    )


def _effective(target: Target, g: GaussianApproximation, eps: Tensor) -> float:
    """Share of draws of a normal that are effective; 0 where none has a density."""
    with torch.no_grad():
        z = g.at(eps)
        log_w = target.log_prob(z) + 0.5 * eps.square().sum(-1)
    w = (log_w - log_w[log_w.isfinite()].max()).exp() if log_w.isfinite().any() else 0 * log_w
    w = w.nan_to_num(0.0)
    return float(w.sum() ** 2 / w.square().sum().clamp(min=1e-300) / len(w))


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
