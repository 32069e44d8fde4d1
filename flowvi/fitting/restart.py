"""One restart of a fit: a start, training in stages, a check, and escalation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws.diagnose import diagnose
from flowvi.fitting.candidate import UNKNOWN, Candidate
from flowvi.fitting.check import diagnose_fresh_draws
from flowvi.fitting.conditionals import adapt_conditionals
from flowvi.fitting.enough import is_enough, is_trained
from flowvi.fitting.pace import Pace
from flowvi.fitting.plateaus import train_fixed_stages, train_until_plateaus
from flowvi.fitting.starts import find_start
from flowvi.guides.guide import Guide
from flowvi.guides.mixture_overlap import overlap
from flowvi.guides.mixtures import MixtureGuide
from flowvi.initialization.gaussian import GaussianApproximation, distinct_candidates
from flowvi.initialization.missed_modes import missed_modes
from flowvi.objectives.nested import NestedTarget
from flowvi.objectives.registry import weighs
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.runtime.progress import current, phase
from flowvi.runtime.rng import derive_seed
from flowvi.samplers.tempering import MOST_DIM, mass_beyond_guide, wide_gaussian
from flowvi.targets import Target
from flowvi.targets.structure import MarginalTarget
from flowvi.training.records import (
    ANNEAL,
    BUILD,
    CHECK,
    COVER,
    WIDE,
    Evaluation,
    Record,
    Stage,
    Trial,
)
from flowvi.training.schedule import Schedule
from flowvi.training.settings import Session, Settings
from flowvi.training.stages import Stages

# Shares of a time budget after which the check takes fewer draws, and annealing is skipped.
CHECK_SHARE, ANNEAL_SHARE = 0.9, 0.8


class Restart:
    """One independent fit.

    Args:
        target: The log density.
        settings: The user's settings.
        session: State of the running fit.
        number: Number of the restart, from 0.
        name: Name of the guide; empty for a given guide.
        guide: The user's guide.
        fresh: Whether a given guide is initialised at the start; otherwise it keeps its parameters.
    """

    def __init__(
        self,
        target: Target,
        settings: Settings,
        session: Session,
        number: int,
        name: str,
        guide: Guide | None,
        fresh: bool = True,
    ) -> None:
        self.target, self.settings, self.session, self.number = target, settings, session, number
        self.name, self.given, self.fresh = name, guide, fresh
        if isinstance(target, NestedTarget):
            target.weighted = weighs(settings.objective)
        self.record = Record()
        self.interrupted = False
        self.best: GaussianApproximation
        self.other_starts: list[GaussianApproximation] = []
        self._tempered_normal: GaussianApproximation | None = None
        self.candidate: Candidate
        self.checked: tuple[Candidate, Diagnosis] | None = None
        self.pace = Pace(session.clock)

    @property
    def schedule(self) -> Schedule:
        """Numbers of steps, step sizes and thresholds."""
        return self.settings.schedule

    def run(self, first: Callable[[Restart], Candidate]) -> None:
        """Find a start, train the first guide, and check it; an interrupt keeps the best guide.

        Args:
            first: Function that builds the first guide.
        """
        self.best, *self.other_starts = find_start(self)
        torch.manual_seed(self.seed(BUILD))
        self.candidate = first(self)
        share = self.schedule.first_share if self.settings.escalate else 1.0
        if not isinstance(self.target, MarginalTarget) or self.settings.steps is not None:
            # A normal of the shared latents is nearly exact: `escalate` improves it.
            self.train(self.candidate, share)
        self.check(self.candidate)

    def gaussian(self, state: Mapping[str, Any]) -> GaussianApproximation:
        """Restore a Gaussian from its state, on the device of the target."""
        device = self.target.device
        loc, scale = state["loc"].to(device), state["scale_tril"].to(device)
        return GaussianApproximation(**{**state, "loc": loc, "scale_tril": scale})

    def seed(self, place: int) -> int:
        """Return the seed for one random operation of this restart."""
        return derive_seed(self.settings.seed, 1 + self.number, place)

    def stages(self, guide: Guide, settings: Settings | None = None) -> Stages:
        """Create the training of a guide on this restart's target."""
        own = settings or self.settings
        return Stages(self.target, guide, own, self.session, self.number, self.record)

    def evaluate(self, guide: Guide) -> Evaluation:
        """Evaluate a guide before its training, by draws that the time budget allows."""
        return self._paced(guide).evaluate()

    def _paced(self, guide: Guide) -> Stages:
        """The training of a guide, with settings that the time budget allows."""
        self.settings = self.pace.reserve(
            self.settings, lambda settings: self.stages(guide, settings).evaluate()
        )
        return self.stages(guide)

    def to_target(self, guide: Guide) -> Guide:
        """Move a guide to the precision and the device of the target."""
        return guide.to(dtype=self.target.dtype, device=self.target.device)

    def initialised(self, candidate: Candidate) -> Candidate:
        """Initialise a guide at the best Gaussian, or a mixture at several Gaussians."""
        candidate.guide = guide = self.to_target(candidate.guide)
        guide.start(self.best.loc, self.best.scale_tril)
        if isinstance(guide, MixtureGuide):
            starts = distinct_candidates([self.best, *self.other_starts], len(guide.components))
            whole = itertools.islice(itertools.cycle(starts), len(guide.components))
            guide.start_components([(g.loc, g.scale_tril) for g in whole])
            self.record.log.append(f"components initialised at {len(starts)} different Gaussians")
        return candidate

    def train(self, candidate: Candidate, share: float, name: str = "", draws: int = 1) -> None:
        """Train a guide until a stage no longer pays, or for the requested number of steps.

        Args:
            candidate: The guide, changed in place.
            share: Share of the time budget at which training has to end.
            name: Name of the stages.
            draws: Factor of the number of draws of the first stage.
        """
        current().part = f"{candidate.name} guide" if candidate.name else "guide"
        new = candidate.evaluation is UNKNOWN
        stages = self._paced(candidate.guide) if new else self.stages(candidate.guide)
        if new:
            candidate.evaluation = stages.evaluate()
        if self.suffices(candidate):
            self.record.log.append("training: left out, since the guide is as good as the start")
            return
        self.interrupted = self.interrupted or self.session.clock.interrupted
        if not stages.trained or self.interrupted:
            return
        self.checked = None
        try:
            candidate.lr = candidate.lr or self.settings.lr or self._choose_rate(stages, candidate)
            if self.schedule.lengths is not None:
                train_fixed_stages(self, stages, candidate)
            elif self.settings.steps is not None:
                self._train_given_steps(stages, candidate, self.settings.steps)
            else:
                train_until_plateaus(self, stages, candidate, share, name, draws)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                self.session.clock.interrupt()
            elif interrupt.evaluation is not None:
                candidate.evaluation = interrupt.evaluation
            self.interrupted = True
            self.record.log.append(f"interrupted after {len(self.record.rows)} steps")
        finally:
            stages.gradient.fast.stop()
        if isinstance(candidate.guide, MixtureGuide):
            self.record.log.extend(overlap(candidate.guide).complaints)
        if self.schedule.lengths is not None and not math.isfinite(candidate.bound):
            self.record.failures.append(
                f"The bound of {self.target.name} is {candidate.bound:g} on fresh draws, also "
                "after training: the guides put mass where the density is not finite."
            )

    def suffices(self, candidate: Candidate) -> bool:
        """Whether a guide needs no steps: the best of its kind, at a start that leaves little."""
        asked = self.settings.steps is not None or self.schedule.lengths is not None
        found = candidate.evaluation
        # A mean may be off by sqrt(2 KL) sds.
        searched, schedule = self.best.searched, self.schedule
        little = schedule.enough if searched else schedule.nothing_left
        light = found.gap <= little and found.khat < schedule.light
        return light and (searched or self._is_settled(candidate)) and not asked

    def is_enough(self, candidate: Candidate) -> bool:
        """Whether a guide's gap is small enough, or small and trusted by the check."""
        if is_enough(self.schedule, candidate.evaluation):
            return True
        if isinstance(self.target, NestedTarget | MarginalTarget):
            return False
        return candidate.gap <= self.schedule.enough and self.trusts(candidate)

    def check(self, candidate: Candidate) -> None:
        """Check a guide on fresh draws, and against the modes of the search for a start."""
        phase("check by fresh draws")
        candidate.missed = self.find_missed_modes(candidate)
        try:
            # A check that integrates local latents takes long.
            with abort_on_interrupt(), self.session.clock.deadline(1.0):
                if isinstance(self.target, MarginalTarget):
                    candidate.units = adapt_conditionals(self, self.target, candidate.guide)
                candidate.diagnosis = found = self._latest_diagnosis(candidate)
        except Interrupted:
            self.record.log.append("check: interrupted")
            return
        except ValueError as error:
            self.record.log.append(f"check: {error}")
            return
        if found is None:
            self.record.log.append(
                "check: skipped, because an evaluation of all rows takes too long"
            )
            return
        self.record.log.append(
            f"check: {found.verdict}, k-hat {found.khat:.2f}, "
            f"{found.ess:.0f} of {found.draws} draws effective"
            + (f"; {len(candidate.missed)} modes left out" if candidate.missed else "")
        )
        if isinstance(self.target, MarginalTarget):
            # The corrected density counts, not that of Laplace's formula.
            candidate.evaluation = Evaluation(found.elbo, found.elbo_se, found.gap, found.khat)
            self.record.stages.append(f"weights of {candidate.name}")
            self.record.log.extend([candidate.units] if candidate.units else [])
            return
        if self.settings.escalate and not candidate.missed:
            candidate.missed_mass = self._describe_missed_mass(candidate.guide, found)
            self.record.log.extend([candidate.missed_mass] if candidate.missed_mass else [])

    def diagnose_candidate(self, candidate: Candidate) -> Diagnosis | None:
        """The verdict on fresh draws; None if they would take too long."""
        if candidate.chains:
            return diagnose(candidate.chains)
        if isinstance(self.target, NestedTarget) and not self.schedule.check_draws:
            return None
        clock = self.session.clock
        return diagnose_fresh_draws(
            self.target,
            [candidate.guide],
            self.seed(CHECK),
            lambda: clock.out_of_time(CHECK_SHARE),
            self.schedule,
            candidate.keep,
        )

    def trusts(self, candidate: Candidate) -> bool:
        """Whether the check trusts plain draws of a guide; the final check need not repeat it."""
        try:
            found = self.diagnose_candidate(candidate)
        except ValueError:
            return False
        self.checked = None if found is None else (candidate, found)
        return found is not None and found.verdict == VERDICTS[0]

    def _latest_diagnosis(self, candidate: Candidate) -> Diagnosis | None:
        """The verdict of `trusts`, if the guide has not changed since, or a new one."""
        known, self.checked = self.checked, None
        if known is not None and known[0] is candidate:
            return known[1]
        return self.diagnose_candidate(candidate)

    def find_missed_modes(self, candidate: Candidate) -> list[GaussianApproximation]:
        """Modes from the search for a start that a guide misses."""
        modes = [g for g in self.other_starts if math.isfinite(g.mass)]
        return missed_modes(
            self.target, candidate.guide, candidate.covered, modes, self.seed(COVER)
        )

    def tempered_normal(self) -> GaussianApproximation:
        """A normal approximation of the target at a high temperature."""
        if self._tempered_normal is None:
            near = [self.best, *self.other_starts]
            self._tempered_normal = wide_gaussian(self.target, near, self.seed(WIDE))
        return self._tempered_normal

    def _describe_missed_mass(self, guide: Guide, diagnosis: Diagnosis) -> str:
        hopeless = self.target.subsampled or self.target.dim > MOST_DIM or self.best.searched
        # A mixture is always annealed, because a missed mode is likely.
        late = self.session.clock.out_of_time(ANNEAL_SHARE) and not isinstance(guide, MixtureGuide)
        late = late or not self.pace.has_time_to_anneal()
        if hopeless or not math.isfinite(diagnosis.gap) or late:
            return ""
        try:
            phase("search for mass beyond the guide")
            with abort_on_interrupt():
                return mass_beyond_guide(
                    self.target, diagnosis, self.tempered_normal(), self.seed(ANNEAL)
                )
        except Interrupted:
            return ""
        except (ValueError, RuntimeError) as error:
            # Annealing only searches for missed mass; its failure does not affect the guide.
            self.record.log.append(f"annealing from a wide start failed, {error}")
            return ""

    def _choose_rate(self, stages: Stages, candidate: Candidate) -> float:
        if candidate.name == "skewed" and not candidate.sizes:
            return self.schedule.skew_rate
        gap = candidate.evaluation.gap
        fixed = self.schedule.lengths is not None or self.needs_little(candidate)
        if self._is_little(gap) and not fixed:
            return self.schedule.little_rate
        if fixed or not self.should_search_rate(gap):
            return self.schedule.middle_rate
        lr = self.try_rates(stages).lr
        candidate.evaluation = stages.evaluate()
        return lr

    def should_search_rate(self, gap: float) -> bool:
        """Whether to search a step size: not if the gap or the remaining time is small."""
        steps, clock, schedule = self.settings.steps, self.session.clock, self.schedule
        few = steps is not None and steps < schedule.fewest_to_search
        time = clock.seconds_left >= schedule.search_seconds
        return (
            not few
            and not self._is_little(gap)
            and time
            and self.pace.has_time_to_search(self.settings)
        )

    def _is_little(self, gap: float) -> bool:
        return self.settings.steps is None and gap < self.schedule.little

    def try_rates(self, stages: Stages, lr: float | None = None) -> Trial:
        """The best of several step sizes, or the result of a given one."""
        steps = self.schedule.race_steps

        def further(lr: float) -> Trial:
            bound = stages.briefly(lr, steps)
            self.record.log.append(f"after {steps} more steps: {bound:.3f}")
            return Trial(lr, bound)

        return self.session.checkpointer.run_once(
            "rate",
            self.record,
            stages.search if lr is None else lambda: further(lr),
            stages.state,
            lambda state: Trial(*stages.restore(state)),
        )

    def needs_little(self, candidate: Candidate) -> bool:
        """Whether a guide is good enough, or the best of its kind, before its training."""
        if list(self.target.parameters()) or self.settings.steps is not None:
            return False
        return self._is_settled(candidate) or is_enough(self.schedule, candidate.evaluation)

    def _is_settled(self, candidate: Candidate) -> bool:
        """Whether a guide is where the search for a start has put the best of its kind."""
        own = bool(list(self.target.parameters()))
        return self.fresh and is_trained(candidate.guide) and not own

    def _train_given_steps(self, stages: Stages, candidate: Candidate, steps: int) -> None:
        stage = Stage("training", 0, steps, self.settings.repeats, candidate.lr)
        candidate.evaluation = stages.run(stage)
