"""Training in stages: a step-size search, steps until a plateau, selection of an iterate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from flowvi.draws.sampling import piece, sampler
from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import distributed
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.runtime.rng import derive_seed
from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.targets import Target
from flowvi.training.averaging import Average
from flowvi.training.draw_gradient import DrawGradient
from flowvi.training.evaluation import best_of, evaluate, particles_of
from flowvi.training.learning_rate import (
    WARM_UP,
    BoundLevel,
    constant,
    decayed,
    warm_up_rate,
)
from flowvi.training.noise_gap import noise_gap
from flowvi.training.records import (
    EVALUATE,
    TRAIN,
    TRIAL,
    Evaluation,
    Record,
    Row,
    Stage,
    Step,
    Trial,
)
from flowvi.training.settings import Session, Settings
from flowvi.training.state import TrainState
from flowvi.training.trainer import Phase, Taken, Trainer

# Steps between two checks for a finished compilation.
POLL = 20
# Averaging starts once the step size is at this share: the last fifth of a decay.
LAST_RATE = 0.1
# Share of a time budget at which training on tempered densities ends.
COOL = 0.6
# Steps between two estimates of the gap from the noise of the steps.
READY_EVERY = 10
# Share of a stage's time budget at which its decay begins.
STEADY_SHARE = 0.7


class Stages:
    """Trains one guide in stages, together with the target's own parameters.

    Args:
        target: The log density. A tempered density can replace it.
        guide: The guide, changed in place.
        settings: The user's settings.
        session: Clock, checkpointer and callback of the fit.
        restart: Number of the restart.
        record: Record of steps and decisions.

    Attributes:
        halvings: Number of times the step size was halved in the last stage.
    """

    def __init__(
        self,
        target: Target,
        guide: Guide,
        settings: Settings,
        session: Session,
        restart: int,
        record: Record,
    ) -> None:
        self.target, self.guide, self.settings, self.session = target, guide, settings, session
        self.restart, self.record = restart, record
        self.gradient = DrawGradient(target, guide, settings, session.clock, record.log.append)
        self.trainer = Trainer(self.gradient, session, record, target.name)
        self.halvings = 0
        self._evaluated: tuple[Tensor, Evaluation] | None = None

    @property
    def trained(self) -> Sequence[Tensor]:
        """Trained parameters of the guide and the target."""
        return self.gradient.trained

    def seed(self, place: int) -> int:
        """Return the seed for one random operation of this restart."""
        return derive_seed(self.settings.seed, 1 + self.restart, place)

    def search(self) -> Trial:
        """Try step sizes briefly from one start, on the same noise, and keep the best result.

        Each step size warms up and decays within its trial, as in a stage: the noise of a large
        one hides its progress until it decays. The largest comes first. If it removes enough of
        the gap, no smaller one is tried.
        """
        schedule = self.settings.schedule
        start, tried, best = self.vector(), {}, Trial(schedule.rates[-1], -math.inf)
        place, top = start, self.evaluate()
        try:
            with abort_on_interrupt():
                for lr in schedule.rates:
                    self.set(start)
                    found = self._briefly(lr, schedule.trial_steps)
                    tried[lr] = bound = found.bound
                    if math.isfinite(bound) and bound > best.bound:
                        best = Trial(lr, bound)
                    before = top
                    if bound > top.bound:
                        place, top = self.vector(), found
                    if found.bound - before.bound > schedule.convincing * before.gap:
                        break
        except Interrupted as interrupt:
            raise Interrupted(top) from interrupt
        finally:
            self.set(place)
        words = ", ".join(f"{lr:g}: {bound:.3f}" for lr, bound in tried.items())
        self.record.log.append(
            f"learning rate {best.lr:g}: the best bound after {schedule.trial_steps} steps "
            f"({words})"
        )
        return best

    def briefly(self, lr: float, steps: int) -> float:
        """Take steps outside of any stage, and return the bound afterwards."""
        return self._briefly(lr, steps).bound

    def _briefly(self, lr: float, steps: int) -> Evaluation:
        torch.manual_seed(self.seed(TRIAL))
        clock, share = self.session.clock, self.settings.schedule.trial_share
        phase = Phase(
            steps,
            partial(decayed, steps=steps, lr=lr),
            lambda i: self.gradient(self.settings.repeats),
            lambda taken: clock.budget_spent(share),
        )
        self.trainer.try_out(phase, self.trainer.begin())
        return self.evaluate()

    def cool(self, powers: Sequence[float], steps: int, repeats: int, lr: float) -> None:
        """Train on the target raised to a sequence of powers, the last one below one.

        Args:
            powers: Increasing powers of the density.
            steps: Steps at each power.
            repeats: Estimates of the objective in a step.
            lr: Step size.
        """
        torch.manual_seed(self.seed(TRAIN))
        state, clock = self.trainer.begin(), self.session.clock
        self.record.stages.append("tempered")
        for power in powers:
            self.gradient.log_density = partial(_to_power, self.target, power)
            stage = Stage("tempered", steps, None, repeats, lr)
            self._take(stage, constant(lr), steps, state, lambda taken: clock.budget_spent(COOL))
            if self.record.stopped or state.exhausted or clock.budget_spent(COOL):
                break
            # Each power has a bound level of its own.
            state.step, state.ended, state.level = 0, False, BoundLevel()
        self.gradient.log_density = self.target.log_prob

    def run(self, stage: Stage) -> Evaluation:
        """Train for one stage, and keep the best of its start, its last iterate and the average.

        Raises:
            Interrupted: The stage was interrupted; the best guide so far is kept.
        """
        return self.session.checkpointer.run_once(
            stage.name or "stage",
            self.record,
            lambda: self._run(stage),
            self.state,
            lambda state: Evaluation(*self.restore(state)),
        )

    def _run(self, stage: Stage) -> Evaluation:
        # A guide that the user passed may differ between processes.
        self.set(distributed.broadcast(self.vector()))
        before, number = len(self.record.rows), len(self.record.stages)
        state = self.trainer.begin()
        torch.manual_seed(self.seed(TRAIN) + number + 1)
        saved = self.session.checkpointer.latest_state()
        if saved is None:
            self.record.stages.append(stage.name)
        else:
            state.load_state_dict(saved)
            if state.halvings:
                self.gradient.in_double()
        interrupted = False
        try:
            self._train(stage, state)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                self.session.clock.interrupt()
            interrupted, state.average = True, Average()
        self.halvings = state.halvings
        steps = len(self.record.rows) - before
        found = self._choose(stage, steps, state.start, state.average.mean)
        if interrupted:
            raise Interrupted(found)
        return found

    def state(self, found: Sequence[float]) -> dict[str, Any]:
        """Return the numbers of a training part, with the parameters, for a checkpoint."""
        return {
            "guide": cpu_state_dict(self.guide),
            "parameters": self.vector(),
            "found": list(found),
        }

    def restore(self, state: Mapping[str, Any]) -> list[float]:
        """Set the parameters to those of a checkpoint, and return its numbers."""
        load_tensors(self.guide, state["guide"], "The checkpoint")
        self.set(state["parameters"].to(self.trained[0]))
        return list(state["found"])

    def evaluate(self) -> Evaluation:
        """Bound and gap on fresh draws; all compared guides share the same noise."""
        draws, density = self.settings.schedule.evaluation_draws, self.gradient.in_parts
        # Restarts share the noise too, because their bounds are compared.
        seed = derive_seed(self.settings.seed, 0, EVALUATE)
        vector = self.vector()
        if self._evaluated is not None and torch.equal(vector, self._evaluated[0]):
            return self._evaluated[1]
        found = evaluate(
            self.settings.objective, density, self.guide, seed, draws, self._draws_at_once
        )
        self._evaluated = vector, found
        return found

    @cached_property
    def _draws_at_once(self) -> int:
        return piece(sampler(self.guide))

    def vector(self) -> Tensor:
        """Copy of all parameters as one vector."""
        return self.gradient.vector()

    def set(self, vector: Tensor) -> None:
        """Set all parameters from one vector."""
        self.gradient.set(vector)

    def _train(self, stage: Stage, state: TrainState) -> None:
        clock = self.session.clock
        if not state.falling:
            if stage.steady:

                def end(taken: Taken) -> bool:
                    # The decay takes about a third of the time.
                    late = clock.budget_spent(STEADY_SHARE * stage.share)
                    flat = state.plateau.add(taken.bound)
                    return flat or late or self._ready(stage, state.plateau.values)

                self._take(stage, lambda i: warm_up_rate(i, stage.lr), stage.steady, state, end)
            if self.record.stopped or state.exhausted:
                return
            state.start_decay(clock.seconds)
        least = self.settings.schedule.least_decay
        self._decay(stage, stage.decay or max(least, state.steady // 2), state)

    def _ready(self, stage: Stage, bounds: Sequence[float]) -> bool:
        """Whether the noise of the last steps shows a gap that is small enough."""
        schedule, objective = self.settings.schedule, self.settings.objective
        last, n = schedule.ready_steps, len(bounds)
        if not isinstance(objective, Renyi) or objective.alpha < 1.0:
            return False
        # The noise of draws says nothing of the target's own parameters.
        if n < WARM_UP + last or n % READY_EVERY or list(self.target.parameters()):
            return False
        draws = stage.repeats * objective.particles * distributed.size()
        return noise_gap(bounds[-last:], draws) <= schedule.ready

    def _decay(self, stage: Stage, steps: int, state: TrainState) -> None:
        clock, warm, before = self.session.clock, stage.steady == 0, state.rate

        def rate(i: int) -> float:
            # Near the end of the budget the step size falls with the remaining time.
            limit = (clock.budget or math.inf) * stage.share
            spent = clock.seconds - state.began if limit < math.inf else 0.0
            late = spent / max(limit - state.began, 1e-9)
            return decayed(max(i, min(int(late * steps), steps - 1)), steps, stage.lr, warm)

        def end(taken: Taken) -> bool:
            nonlocal before
            if before >= taken.rate and taken.rate <= LAST_RATE * stage.lr:
                state.average.add(self.vector())
            before = taken.rate
            return clock.budget_spent(stage.share)

        self._take(stage, rate, steps, state, end, falling=", smaller steps")

    def _take(
        self,
        stage: Stage,
        rate: Callable[[int], float],
        steps: int,
        state: TrainState,
        end: Callable[[Taken], bool] = lambda taken: False,
        falling: str = "",
    ) -> None:
        """Take the steps of a stage, and compile the step if enough steps remain."""
        first, began = state.step, time.thread_time()
        draws = stage.repeats * particles_of(self.settings.objective)
        place = len(self.record.stages) - 1

        def gradient(i: int) -> tuple[Tensor, Tensor]:
            if self.gradient.fast.pending and i % POLL == POLL - 1 and i > first:
                self._accelerate(stage, steps, (time.thread_time() - began) / (i - first))
            return self.gradient(stage.repeats)

        def after(taken: Taken) -> bool:
            row = Row(taken.bound, taken.norm, taken.rate, taken.skipped, draws, place)
            self.record.rows.append(row)
            return end(taken)

        phase = Phase(
            steps,
            rate,
            gradient,
            after,
            lambda taken: self._tell(steps, state),
            f"{self.record.stages[-1] if self.record.stages else ''}{falling}",
        )
        self.trainer.take(phase, state)

    def _tell(self, steps: int, state: TrainState) -> None:
        """Call the callback after a step, and stop if its answer is true."""
        step, row = len(self.record.rows), self.record.rows[-1]
        most = self.settings.steps or max(steps, step)
        self.trainer.callback(Step(step, most, *row[:3], state.guard.skipped, self.restart))
        if self.gradient.agrees():
            self.record.log.append(f"stopped by the callback after {step} steps")
            self.record.stopped = True

    def _accelerate(self, stage: Stage, steps: int, seconds: float) -> None:
        """Compile the step if enough steps remain.

        Args:
            stage: The stage.
            steps: Largest number of its steps.
            seconds: Time of this thread for one step, which other load does not change.
        """
        if self.settings.steps is None:
            # Most stages end long before their limit: as many steps are expected as were taken.
            decay = self.settings.schedule.least_decay
            steps = min(steps, len(self.record.rows) + decay)
        self.gradient.consider(min(steps * seconds, self.session.clock.seconds_left))

    def _choose(
        self, stage: Stage, steps: int, start: Tensor, average: Tensor | None
    ) -> Evaluation:
        """Keep the best of the start, the last iterate and the average of the last iterates."""
        vectors = {"start": start, "last": self.vector()}
        if average is not None:
            vectors["average"] = average
        found = {}
        for name, vector in vectors.items():
            self.set(vector)
            found[name] = self.evaluate()
        best = best_of(found)
        self.set(vectors[best])
        tried = ", ".join(f"{name} {e.bound:.3f}" for name, e in found.items())
        gained = found[best].bound - found["start"].bound
        draws = stage.repeats * particles_of(self.settings.objective)
        by = self.settings.schedule.evaluation_draws
        self.record.log.append(
            f"{stage.name}: {steps} steps of {draws} draws, learning rate {stage.lr:g}, gained "
            f"{gained:.3g} nats; kept the {best} iterate, which has the best bound on {by} draws "
            f"({tried})" + _known(found[best])
        )
        return found[best]


def _known(found: Evaluation) -> str:
    if math.isnan(found.gap):
        return ""
    return f"; KL(q || p) about {found.gap:.2g}, k-hat {found.khat:.2f}"


def _to_power(target: Target, power: float, z: Tensor) -> Tensor:
    return power * target.log_prob(z)
