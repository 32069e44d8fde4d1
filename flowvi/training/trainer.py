"""Training of one guide: steps of a right size, until more of them would bring nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowvi.draws.sampling import piece, sampler
from flowvi.guides.guide import Guide
from flowvi.runtime import distributed
from flowvi.runtime.clock import Interrupted, droppable
from flowvi.runtime.rng import stream
from flowvi.runtime.tensors import fill, tensors_of
from flowvi.targets import Target
from flowvi.training.adam import Adam
from flowvi.training.averaging import Average
from flowvi.training.evaluation import best_of, judge, particles_of
from flowvi.training.flat import give, vector_of
from flowvi.training.gradients import Gradients
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import Level, constant, decayed, warmed
from flowvi.training.records import JUDGE, TRAIN, TRIAL, Judged, Record, Row, Stage, Step, Trial
from flowvi.training.settings import Settings
from flowvi.training.state import MOST_HALVINGS, Course

# Step sizes to try; the middle one where there is no time for that.
RATES = (1e-2, 5e-3, 1e-3)
TRIAL_STEPS = 60
# Share of a time budget at which trials end.
TRIAL_SHARE = 0.5
JUDGE_DRAWS = 2000
# Steps with a falling step size, at least.
LEAST_DECAY = 200
# Steps between two looks for a compiled step.
POLL = 20
# Iterates are averaged once the step size has fallen to this share: the last fifth of a decay.
LAST_RATE = 0.1


class Trainer:
    """Trains one guide, and the target's own parameters with it.

    Args:
        target: The log density; one of another temperature can take its place.
        guide: The guide, changed in place.
        settings: What the user asked for.
        restart: Number of the restart.
        record: Where steps and decisions are written.
        judge_draws: Draws by which guides are compared; as many as for any target without.

    Attributes:
        trained: Parameters of the guide and the target's own.
        halvings: How many times the step was halved in the last stage, after it failed.
    """

    def __init__(
        self,
        target: Target,
        guide: Guide,
        settings: Settings,
        restart: int,
        record: Record,
        judge_draws: int | None = None,
    ) -> None:
        self.target, self.guide, self.settings = target, guide, settings
        self.restart, self.record = restart, record
        self.gradients = Gradients(target, guide, settings, record.log.append)
        self.trained = self.gradients.trained
        self.halvings = 0
        self._draws = JUDGE_DRAWS if judge_draws is None else judge_draws

    def seed(self, place: int) -> int:
        """The seed of one of the places where this restart is random."""
        return stream(self.settings.seed, 1 + self.restart, place)

    def search(self) -> Trial:
        """Try step sizes briefly from the same start, on the same noise; stay where the best led.

        Each rises and falls within its trial, as it will in a stage: what a large one has
        reached is hidden by its noise until it falls.
        """
        start, tried, best = self.vector(), {}, Trial(RATES[-1], -math.inf)
        place, top = start, self.judge()
        try:
            with droppable():
                for lr in RATES:
                    self.set(start)
                    found = self._briefly(lr, TRIAL_STEPS)
                    tried[lr] = bound = found.bound
                    if math.isfinite(bound) and bound > best.bound:
                        best = Trial(lr, bound)
                    if bound > top.bound:
                        place, top = self.vector(), found
        except Interrupted as interrupt:
            raise Interrupted(top) from interrupt
        finally:
            self.set(place)
        words = ", ".join(f"{lr:g}: {bound:.3f}" for lr, bound in tried.items())
        self.record.log.append(
            f"step size {best.lr:g}, by the bound after {TRIAL_STEPS} steps ({words})"
        )
        return best

    def briefly(self, lr: float, steps: int) -> float:
        """Take steps that are no stage of their own, and return the bound to which they led."""
        return self._briefly(lr, steps).bound

    def _briefly(self, lr: float, steps: int) -> Judged:
        torch.manual_seed(self.seed(TRIAL))
        stage = Stage("", 0, steps, self.settings.repeats, lr)
        rate = partial(decayed, steps=steps, lr=lr)
        self._go(stage, rate, steps, self._course(lr), quiet=True)
        return self.judge()

    def cool(self, powers: Sequence[float], steps: int, repeats: int, lr: float) -> None:
        """Train on the target to one power after the other, the last of them below one.

        Args:
            powers: Rising powers of the density.
            steps: Steps at each.
            repeats: Estimates of the objective a step.
            lr: Step size.
        """
        torch.manual_seed(self.seed(TRAIN))
        course = self._course(lr)
        self.record.stages.append("tempered")
        for power in powers:
            self.gradients.log_density = partial(_to_power, self.target, power)
            stage = Stage("tempered", steps, None, repeats, lr)
            self._go(stage, constant(lr), steps, course)
            if self.record.stopped or course.lost:
                break
            # Each power has a level of its own.
            course.step, course.ended, course.level = 0, False, Level()
        self.gradients.log_density = self.target.log_prob

    def run(self, stage: Stage) -> Judged:
        """Train for one stage and keep the best of its start, its last iterate and the average.

        Raises:
            Interrupted: The stage was interrupted; the best so far is kept.
        """
        return self.settings.journal.once(
            stage.name or "stage",
            self.record,
            lambda: self._run(stage),
            self.state,
            lambda state: Judged(*self.restore(state)),
        )

    def _run(self, stage: Stage) -> Judged:
        # A guide of the user's own may have been made differently in every process.
        self.set(distributed.shared(self.vector()))
        before, number = len(self.record.rows), len(self.record.stages)
        course = self._course(stage.lr)
        torch.manual_seed(self.seed(TRAIN) + number + 1)
        standing = self.settings.journal.standing()
        if standing is None:
            self.record.stages.append(stage.name)
        else:
            course.restore(standing)
            if course.halvings:
                self.gradients.in_double()
        interrupted = False
        try:
            self._train(stage, course)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                self.settings.clock.interrupt()
            interrupted, course.average = True, Average()
        self.halvings = course.halvings
        steps = len(self.record.rows) - before
        judged = self._choose(stage, steps, course.start, course.average.mean)
        if interrupted:
            raise Interrupted(judged)
        return judged

    def state(self, found: Sequence[float]) -> dict[str, Any]:
        """What a piece of the training found, and the guide with it, as `write_state` takes it."""
        return {
            "guide": tensors_of(self.guide),
            "parameters": self.vector(),
            "found": list(found),
        }

    def restore(self, state: Mapping[str, Any]) -> list[float]:
        """Be where a state was taken, and read what was found there."""
        fill(self.guide, state["guide"], "The checkpoint")
        self.set(state["parameters"].to(self.trained[0]))
        return list(state["found"])

    def judge(self) -> Judged:
        """Bound and gap on fresh draws, the same noise for all that are judged."""
        settings, density = self.settings, self.gradients.in_parts
        # The same noise for all restarts, whose bounds are compared.
        seed = stream(settings.seed, 0, JUDGE)
        return judge(settings.objective, density, self.guide, seed, self._draws, self._at_once)

    @cached_property
    def _at_once(self) -> int:
        return piece(sampler(self.guide))

    def vector(self) -> Tensor:
        """All parameters in one vector, a copy."""
        whole = self.gradients.fast.whole
        return vector_of(self.trained) if whole is None else whole.clone()

    def set(self, vector: Tensor) -> None:
        """Give the parameters the values of a vector."""
        give(self.trained, vector)
        self.gradients.follow()

    def _course(self, lr: float) -> Course:
        optimiser = Adam(self.trained)
        return Course(self.guide, self.trained, self.set, optimiser, self.vector(), self.record)

    def _train(self, stage: Stage, course: Course) -> None:
        clock = self.settings.clock
        if not course.falling:
            if stage.steady:

                def end(row: Row) -> bool:
                    # The decay takes about a third of the time.
                    return course.plateau.add(row.bound) or clock.spent(0.7 * stage.share)

                self._go(stage, lambda i: warmed(i, stage.lr), stage.steady, course, end)
            if self.record.stopped or course.lost:
                return
            course.fall(clock.seconds)
        self._decay(stage, stage.decay or max(LEAST_DECAY, course.steady // 2), course)

    def _decay(self, stage: Stage, steps: int, course: Course) -> None:
        clock, warm, before = self.settings.clock, stage.steady == 0, course.rate

        def rate(i: int) -> float:
            # Where time runs short, the step size falls with the time.
            limit = (clock.budget or math.inf) * stage.share
            spent = clock.seconds - course.began if limit < math.inf else 0.0
            late = spent / max(limit - course.began, 1e-9)
            return decayed(max(i, min(int(late * steps), steps - 1)), steps, stage.lr, warm)

        def end(row: Row) -> bool:
            nonlocal before
            if before >= row.lr and row.lr <= LAST_RATE * stage.lr:
                course.average.add(self.vector())
            before = row.lr
            return clock.spent(stage.share)

        self._go(stage, rate, steps, course, end)

    def _go(
        self,
        stage: Stage,
        rate: Callable[[int], float],
        steps: int,
        course: Course,
        end: Callable[[Row], bool] = lambda row: False,
        quiet: bool = False,
    ) -> None:
        """Take steps until there are enough, or `end` or the callback says so, or they fail."""
        settings, first, began = self.settings, course.step, time.perf_counter()
        together, listening = self.gradients.together(), settings.clock.listening()
        # A step is done to its end, and its state kept.
        with self._bar(steps, quiet) as bar, together, listening, droppable(False):
            while course.step < steps and not (course.ended or self.record.stopped):
                i = course.step
                if self.gradients.fast.pending and not quiet and i % POLL == POLL - 1 and i > first:
                    self._accelerate(stage, steps, (time.perf_counter() - began) / (i - first))
                course.rate = rate(i) * 0.5**course.halvings
                row = self._step(stage, course)
                course.step += 1
                if quiet:
                    course.ended = course.guard.failed or settings.clock.spent(TRIAL_SHARE)
                    if settings.clock.interrupted:
                        raise Interrupted
                    continue
                self.record.rows.append(row)
                course.level.add(row.bound)
                bar.update()
                self._tell(bar, i)
                course.ended = end(row) or self._failing(stage, course)
                self._ask(row, steps, course.guard)
                settings.journal.offer(course.state)
                if settings.clock.interrupted:
                    settings.journal.keep(course.state)
                    raise Interrupted
        if not quiet and distributed.size() > 1:
            # What was said to the very last step.
            self.record.stopped |= bool(distributed.agreed(self.gradients.answer))
        if course.guard.skipped and not quiet:
            self.record.log.append(
                f"{course.guard.skipped} of {course.step} steps skipped by the gradient guard"
            )

    def _failing(self, stage: Stage, course: Course) -> bool:
        """Go back where too many steps could not be taken; whether that was tried enough."""
        course.note()
        if not (course.guard.failed or course.level.collapsed):
            return False
        words = f"{course.guard.skipped} of {course.step} steps had no finite gradient"
        if not course.guard.failed:
            level = course.level
            words = f"the bound fell from {level.best:.4g} to {level.median:.4g}"
        why = self.gradients.blamed(stage.repeats) if course.halvings == MOST_HALVINGS else ""
        self.gradients.in_double()
        course.back()
        if not course.lost:
            self.record.log.append(f"{words}: back to the last good state, with half the step")
            return False
        self.record.failures.append(
            f"Training of {self.target.name} ended early: {words}, also after the step was halved "
            f"{MOST_HALVINGS} times. {why} The best state before was kept."
        )
        self.record.log.append(self.record.failures[-1])
        return True

    def _accelerate(self, stage: Stage, steps: int, seconds: float) -> None:
        """Compile the step if enough of them are ahead.

        Args:
            stage: What is trained.
            steps: Its steps, at most.
            seconds: What one takes.
        """
        if self.settings.steps is None:
            # The decay, and a stage of twice the draws.
            steps = steps + steps // 2 if stage.steady else steps
            steps *= 3
        self.gradients.consider(min(steps * seconds, self.settings.clock.left))

    def _tell(self, bar: tqdm[Any], i: int) -> None:
        if i % 20 == 0:
            recent = [r.bound for r in self.record.rows[-50:] if math.isfinite(r.bound)]
            bar.set_postfix_str(f"bound {np.mean(recent):.3f}" if recent else "")

    def _ask(self, row: Row, steps: int, guard: Guard) -> None:
        """Tell the callback of a step, and stop if it says so; several processes, a step later."""
        step = len(self.record.rows)
        if self.settings.callback is not None:
            most = self.settings.steps or max(steps, step)
            told = Step(step, most, *row[:3], guard.skipped, self.restart)
            try:
                self.gradients.answer = bool(self.settings.callback(told))
            except KeyboardInterrupt:
                self.settings.clock.interrupt()
        if self.gradients.answer if distributed.size() == 1 else self.gradients.stopped:
            self.record.log.append(f"stopped by the callback after {step} steps")
            self.record.stopped = True

    def _step(self, stage: Stage, course: Course) -> Row:
        bound, flat = self.gradients(stage.repeats)
        value = bound.item()
        admitted, norm = course.guard.admits(value, flat)
        if admitted:
            course.optimiser.step(flat, course.rate, self.gradients.fast.whole)
            self.gradients.follow()
        draws = stage.repeats * particles_of(self.settings.objective)
        return Row(value, norm, course.rate, not admitted, draws, len(self.record.stages) - 1)

    def _choose(self, stage: Stage, steps: int, start: Tensor, average: Tensor | None) -> Judged:
        vectors = {"start": start, "last": self.vector()}
        if average is not None:
            vectors["average"] = average
        found = {}
        for name, vector in vectors.items():
            self.set(vector)
            found[name] = self.judge()
        best = best_of(found)
        self.set(vectors[best])
        tried = ", ".join(f"{name} {j.bound:.3f}" for name, j in found.items())
        gained = found[best].bound - found["start"].bound
        draws = stage.repeats * particles_of(self.settings.objective)
        self.record.log.append(
            f"{stage.name}: {steps} steps of {draws} draws at {stage.lr:g} brought {gained:.3g}; "
            f"kept the {best} iterate, by the bound on {self._draws} draws ({tried})"
            + _known(found[best])
        )
        return found[best]

    def _bar(self, steps: int, quiet: bool) -> tqdm[Any]:
        hidden = (
            quiet or distributed.rank() or not self.settings.progress or not sys.stderr.isatty()
        )
        name = self.record.stages[-1] if self.record.stages else ""
        words = f"{self.target.name} ({name})" if name else self.target.name
        return tqdm(total=steps, desc=words, unit="step", disable=bool(hidden), dynamic_ncols=True)


def _known(judged: Judged) -> str:
    if math.isnan(judged.gap):
        return ""
    return f"; KL(q || p) about {judged.gap:.2g}, k-hat {judged.khat:.2f}"


def _to_power(target: Target, power: float, z: Tensor) -> Tensor:
    return power * target.log_prob(z)
