"""Training of one guide: steps of a right size, until more of them would bring nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowvi import parallel
from flowvi.adam import Adam
from flowvi.blame import blamed
from flowvi.compiling import Accelerator, Compile
from flowvi.course import MOST_HALVINGS, Course
from flowvi.diagnostics import MIN_DRAWS, gap, psis
from flowvi.draws import piece, sampler, stream
from flowvi.flat import Flat, give, vector_of
from flowvi.guides import Guide, LogDensity
from flowvi.memory import ANY
from flowvi.objectives import Estimate, ForwardKL, Renyi
from flowvi.randomness import random_state, set_random_state
from flowvi.records import (
    JUDGE,
    TRAIN,
    TRIAL,
    Judged,
    Objective,
    Record,
    Row,
    Settings,
    Stage,
    Step,
    Trial,
)
from flowvi.schedule import Average, Guard, constant, decayed, warmed
from flowvi.states import fill, tensors_of
from flowvi.target import Target

# Step sizes to try; the middle one where there is no time for that.
RATES = (1e-2, 5e-3, 1e-3)
TRIAL_STEPS = 60
JUDGE_DRAWS = 2000
# Steps with a falling step size, at least.
LEAST_DECAY = 200
# Steps between two looks for a compiled step.
POLL = 20
# Gaps below this are known better than bounds.
NARROW = 0.1
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
    """

    def __init__(
        self, target: Target, guide: Guide, settings: Settings, restart: int, record: Record
    ) -> None:
        self.target, self.guide, self.settings = target, guide, settings
        self.restart, self.record = restart, record
        self.log_density: LogDensity = target.log_prob
        self.fast = Accelerator(
            [guide, target],
            self._bound,
            self._unit,
            _compiled(settings),
            record.log.append,
        )
        self.trained = self.fast.trained
        self._before = random_state()

    def seed(self, place: int) -> int:
        """The seed of one of the places where this restart is random."""
        return stream(self.settings.seed, 1 + self.restart, place)

    def search(self) -> Trial:
        """Try step sizes briefly from the same start, on the same noise; stay where the best led.

        Each rises and falls within its trial, as it will in a stage: what a large one has
        reached is hidden by its noise until it falls.
        """
        start, tried, best = self.vector(), {}, Trial(RATES[-1], -math.inf)
        place, top = start, self.judge().bound
        try:
            for lr in RATES:
                self.set(start)
                tried[lr] = bound = self.briefly(lr, TRIAL_STEPS)
                if math.isfinite(bound) and bound > best.bound:
                    best = Trial(lr, bound)
                if bound > top:
                    place, top = self.vector(), bound
        finally:
            self.set(place)
        words = ", ".join(f"{lr:g}: {bound:.3f}" for lr, bound in tried.items())
        self.record.log.append(
            f"step size {best.lr:g}, by the bound after {TRIAL_STEPS} steps ({words})"
        )
        return best

    def briefly(self, lr: float, steps: int) -> float:
        """Take steps that are no stage of their own, and return the bound to which they led."""
        torch.manual_seed(self.seed(TRIAL))
        stage = Stage("", 0, steps, self.settings.repeats, lr)
        rate = partial(decayed, steps=steps, lr=lr)
        self._go(stage, rate, steps, self._course(lr), quiet=True)
        return self.judge().bound

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
            self.log_density = partial(_to_power, self.target, power)
            stage = Stage("tempered", steps, None, repeats, lr)
            self._go(stage, constant(lr), steps, course)
            if self.record.stopped or course.lost:
                break
            course.step, course.ended = 0, False
        self.log_density = self.target.log_prob

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
        self.set(parallel.shared(self.vector()))
        before, number = len(self.record.rows), len(self.record.stages)
        course = self._course(stage.lr)
        torch.manual_seed(self.seed(TRAIN) + number + 1)
        standing = self.settings.journal.standing()
        if standing is None:
            self.record.stages.append(stage.name)
        else:
            course.restore(standing)
        interrupted = False
        try:
            self._train(stage, course)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                self.settings.clock.interrupt()
            interrupted, course.average = True, Average()
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
        objective = self.settings.objective
        inner = particles_of(objective)
        size, left = max(1, self._at_once // inner), max(1, JUDGE_DRAWS // inner)
        bounds, log_w = [], []
        state = torch.get_rng_state()
        # The same noise for all restarts, whose bounds are compared.
        torch.manual_seed(stream(self.settings.seed, 0, JUDGE))
        with torch.no_grad():
            while left > 0:
                now = min(size, left)
                found = estimate(objective, self._in_parts, self.guide, now)
                bounds.append(found.bound.reshape(-1))
                log_w.append(found.log_w.reshape(-1))
                left -= now
        torch.set_rng_state(state)
        weights = torch.cat(log_w).cpu().double().numpy()
        known = isinstance(objective, Renyi) and np.isfinite(weights).all()
        values = torch.cat(bounds).double()
        return Judged(
            float(values.mean()),
            float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf,
            gap(weights).value if known else math.nan,
            psis(weights).khat if known and len(weights) >= MIN_DRAWS else math.nan,
        )

    @cached_property
    def _at_once(self) -> int:
        return piece(sampler(self.guide))

    def _in_parts(self, z: Tensor) -> Tensor:
        """The log density of many points, in parts that fit memory. (*S, D) -> (*S)."""
        parts = z.reshape(-1, z.shape[-1]).split(self.target.chunk())
        return torch.cat([self.log_density(part) for part in parts]).reshape(z.shape[:-1])

    def vector(self) -> Tensor:
        """All parameters in one vector, a copy."""
        return vector_of(self.trained) if self.fast.whole is None else self.fast.whole.clone()

    def set(self, vector: Tensor) -> None:
        """Give the parameters the values of a vector."""
        give(self.trained, vector)

    def _course(self, lr: float) -> Course:
        optimiser = Adam(self.trained)
        return Course(self.guide, self.trained, optimiser, self.vector(), self.record)

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
        with self._bar(steps, quiet) as bar, self._together():
            while course.step < steps and not (course.ended or self.record.stopped):
                i = course.step
                if self.fast.pending and not quiet and i % POLL == POLL - 1 and i > first:
                    self._accelerate(stage, steps, (time.perf_counter() - began) / (i - first))
                course.rate = rate(i) * 0.5**course.halvings
                row = self._step(stage, course)
                course.step += 1
                if quiet:
                    course.ended = course.guard.failed
                    if settings.clock.interrupted:
                        raise Interrupted
                    continue
                self.record.rows.append(row)
                bar.update()
                self._tell(bar, i)
                course.ended = end(row) or self._failing(stage, course)
                self._ask(row, steps, course.guard)
                settings.journal.offer(course.state)
                if settings.clock.interrupted:
                    settings.journal.keep(course.state)
                    raise Interrupted
        if course.guard.skipped and not quiet:
            self.record.log.append(
                f"{course.guard.skipped} of {course.step} steps skipped by the gradient guard"
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Have all parameters in one vector meanwhile, which takes one call of the optimiser."""
        try:
            flat = Flat(self.trained, gradients=False)
        except ValueError:  # several precisions or devices
            yield
            return
        self.fast.whole = flat.vector.detach()
        try:
            yield
        finally:
            self.fast.whole = None
            flat.release()

    def _failing(self, stage: Stage, course: Course) -> bool:
        """Go back where too many steps could not be taken; whether that was tried enough."""
        course.note()
        if not course.guard.failed:
            return False
        words = f"{course.guard.skipped} of {course.step} steps had no finite gradient"
        why = self._blamed(stage) if course.halvings == MOST_HALVINGS else ""
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

    def _blamed(self, stage: Stage) -> str:
        """What was not finite in the step before, which is evaluated again."""
        after, seen = random_state(), []
        set_random_state(self._before)
        batch = dict(zip(self.target.subsampled, self._rows(), strict=True)) or None

        def log_p(z: Tensor) -> Tensor:
            seen.append(z)
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        for part in self._parts(stage.repeats):
            bound = estimate(self.settings.objective, log_p, self.guide, part).bound.mean()
            if not bound.isfinite():
                break
        words = blamed(self.target, self.guide, bound, seen[-1], batch)
        set_random_state(after)
        return words

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
        # Rows that take no random numbers.
        rows = [
            torch.arange(batch, device=self.target.device)
            for _, batch in self.target.subsampled.values()
        ]
        self.fast.consider(min(steps * seconds, self.settings.clock.left), rows)

    def _tell(self, bar: tqdm[Any], i: int) -> None:
        if i % 20 == 0:
            recent = [r.bound for r in self.record.rows[-50:] if math.isfinite(r.bound)]
            bar.set_postfix_str(f"bound {np.mean(recent):.3f}" if recent else "")

    def _ask(self, row: Row, steps: int, guard: Guard) -> None:
        """Tell the callback of a step, and stop if it says so."""
        if self.settings.callback is None:
            return
        step = len(self.record.rows)
        most = self.settings.steps or max(steps, step)
        told = Step(step, most, *row[:3], guard.skipped, self.restart)
        try:
            answer = bool(self.settings.callback(told))
        except KeyboardInterrupt:
            self.settings.clock.interrupt()
            answer = False
        if parallel.agreed(answer):
            self.record.log.append(f"stopped by the callback after {step} steps")
            self.record.stopped = True

    def _step(self, stage: Stage, course: Course) -> Row:
        self._before = random_state()
        bound, flat = self._gradient(stage.repeats)
        value = bound.item()
        admitted, norm = course.guard.admits(value, flat)
        if admitted:
            course.optimiser.step(flat, course.rate, self.fast.whole)
        draws = stage.repeats * particles_of(self.settings.objective)
        return Row(value, norm, course.rate, not admitted, draws, len(self.record.stages) - 1)

    def _gradient(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Bound and the gradient of minus it; of the draws of all processes, where they are many.

        Each skips the random numbers of the others.
        """
        objective = self.settings.objective
        for process in range(parallel.size()):
            rows = self._rows()
            if process == parallel.rank():
                bound, flat = self._whole(repeats, rows)
            elif isinstance(objective, Renyi):
                for part in self._parts(repeats):
                    self.guide.skip((objective.particles, part))
        return parallel.averaged(bound, flat)

    def _whole(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound and gradient of all draws, in one part if it fits memory."""
        plain = self.log_density == self.target.log_prob
        parts, total = self._parts(repeats), None
        for part in parts:
            compiled = plain and self.fast.takes(part)
            found = (self.fast.gradient if compiled else self.fast.eager)(part, rows)
            total = found if total is None else (total[0] + found[0], total[1] + found[1])
        assert total is not None
        return total if len(parts) == 1 else (total[0] / len(parts), total[1] / len(parts))

    def _parts(self, repeats: int) -> list[int]:
        """How many estimates to take after each other, of equal numbers."""
        return [repeats] if repeats <= self._fits else [self._unit] * (repeats // self._unit)

    @cached_property
    def _fits(self) -> int:
        """Estimates whose draws fit memory; other objectives bring draws of their own."""
        if not isinstance(self.settings.objective, Renyi):
            return ANY
        return max(1, self.target.at_once() // self.settings.objective.particles)

    @cached_property
    def _unit(self) -> int:
        """The largest number of estimates that fits and divides those of every stage."""
        all_of_them = self.settings.repeats
        return max(n for n in range(1, all_of_them + 1) if all_of_them % n == 0 and n <= self._fits)

    def _bound(self, repeats: int, rows: Sequence[Tensor]) -> Tensor:
        batch = dict(zip(self.target.subsampled, rows, strict=True))

        def log_p(z: Tensor) -> Tensor:
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        return estimate(self.settings.objective, log_p, self.guide, repeats).bound.mean()

    def _rows(self) -> list[Tensor]:
        """Random rows of every subsampled plate."""
        return [
            torch.randperm(size, device=self.target.device)[:batch]
            for size, batch in self.target.subsampled.values()
        ]

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
        tried = ", ".join(f"{name} {judged.bound:.3f}" for name, judged in found.items())
        gained = found[best].bound - found["start"].bound
        draws = stage.repeats * particles_of(self.settings.objective)
        self.record.log.append(
            f"{stage.name}: {steps} steps of {draws} draws at {stage.lr:g} brought {gained:.3g}; "
            f"kept the {best} iterate, by the bound on {JUDGE_DRAWS} draws ({tried})"
            + _known(found[best])
        )
        return found[best]

    def _bar(self, steps: int, quiet: bool) -> tqdm[Any]:
        hidden = quiet or parallel.rank() or not self.settings.progress or not sys.stderr.isatty()
        name = self.record.stages[-1] if self.record.stages else ""
        words = f"{self.target.name} ({name})" if name else self.target.name
        return tqdm(total=steps, desc=words, unit="step", disable=bool(hidden), dynamic_ncols=True)


def _compiled(settings: Settings) -> Compile:
    """Several processes would compile the same on processors that they need."""
    if not isinstance(settings.objective, Renyi):
        return False
    return False if parallel.size() > 1 and settings.compile == "auto" else settings.compile


class Interrupted(Exception):
    """The fit was asked to stop; of the guide that was trained, the best so far is kept."""

    def __init__(self, judged: Judged | None = None) -> None:
        super().__init__("interrupted")
        self.judged = judged


def _known(judged: Judged) -> str:
    if math.isnan(judged.gap):
        return ""
    return f"; KL(q || p) about {judged.gap:.2g}, k-hat {judged.khat:.2f}"


def _to_power(target: Target, power: float, z: Tensor) -> Tensor:
    return power * target.log_prob(z)


def best_of(found: Mapping[str, Judged]) -> str:
    """The name of the best: by the bound and, where noise hides a difference, by the gap.

    Near the target the gap has far less noise than the bound. Alone it would favour a
    guide that has left a part of the target.
    """
    finite = {name: j for name, j in found.items() if math.isfinite(j.bound)}
    if not finite:
        return next(iter(found))
    top = max(finite.values(), key=lambda j: j.bound)
    close = {
        name: j.gap
        for name, j in finite.items()
        if j.bound >= top.bound - 4 * math.hypot(j.se, top.se) and math.isfinite(j.gap)
    }
    if close and max(close.values()) < NARROW:
        return min(close, key=lambda name: close[name])
    return max(finite, key=lambda name: finite[name].bound)


def particles_of(objective: Objective) -> int:
    """Draws inside one estimate that the guide makes."""
    return objective.particles if isinstance(objective, Renyi) else 1


def estimate(objective: Objective, log_p: LogDensity, guide: Guide, repeats: int) -> Estimate:
    """Evaluate any objective, with `repeats` independent estimates where it makes its own draws."""
    if isinstance(objective, ForwardKL):
        return objective(log_p, guide)
    return objective(log_p, guide, repeats=(repeats,))
