"""The stages in which a restart trains a guide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowvi.fitting.candidate import Candidate
from flowvi.training.records import Stage
from flowvi.training.stages import Stages

if TYPE_CHECKING:
    from flowvi.fitting.restart import Restart


def train_fixed_stages(restart: Restart, stages: Stages, candidate: Candidate) -> None:
    """Train stages of fixed lengths; halve the step size after a stage without a gain."""
    rate, clock = candidate.lr, restart.session.clock
    for i, length in enumerate(restart.schedule.counted(restart.settings.steps)):
        if clock.out_of_time() or restart.record.stopped:
            break
        before = candidate.evaluation
        stage = Stage(f"stage {i + 1}", 0, length, restart.settings.repeats, rate)
        candidate.evaluation = stages.run(stage)
        gained = candidate.bound - before.bound
        left = candidate.gap
        enough = left <= restart.schedule.enough or 0 < gained < restart.schedule.worth * (
            left + gained
        )
        if restart.settings.steps is None and i and enough:
            break
        rate *= 0.5 ** max(stages.halvings, int(not gained > 0))
    candidate.lr = rate


def train_until_plateaus(
    restart: Restart,
    stages: Stages,
    candidate: Candidate,
    share: float,
    name: str,
    draws: int,
) -> None:
    """Train stages with more draws and smaller steps, until one reduces the gap too little.

    A guide that is good enough or the best of its kind where it starts takes a few steps.
    """
    schedule = restart.schedule
    if restart.needs_little(candidate):
        before = candidate.evaluation
        title, repeats = f"{name} stage 1".strip(), restart.settings.repeats * draws
        candidate.evaluation = stages.run(
            Stage(title, 0, schedule.polish_steps, repeats, candidate.lr, share)
        )
        if not candidate.bound - before.bound > schedule.enough:
            return
    for i in range(schedule.most_stages):
        if restart.session.clock.out_of_time(share) or restart.record.stopped:
            return
        before, failures, restart.checked = candidate.evaluation, len(restart.record.failures), None
        few = before.gap < schedule.little
        close = before.gap <= schedule.ready and not list(restart.target.parameters())
        stage = Stage(
            f"{name} stage {i + 1}".strip(),
            0 if close else schedule.few_steps if few else schedule.steady_steps,
            schedule.least_decay if close else None,
            restart.settings.repeats * draws * 2**i,
            candidate.lr / 2**i,
            share,
        )
        candidate.evaluation = stages.run(stage)
        gained, left = candidate.bound - before.bound, candidate.gap
        if len(restart.record.failures) > failures:
            return
        if restart.is_enough(candidate):
            return
        if i and gained < schedule.worth * (left + gained):
            return
        if restart.settings.escalate and restart.find_missed_modes(candidate):
            # Further steps cannot recover modes that this guide misses.
            return
