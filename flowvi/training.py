"""One restart of a fit: a start, training, and the choice of what to keep."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowvi.coverage import left_out, sentence
from flowvi.draws import stream
from flowvi.guides import GUIDES, Guide, MixtureGuide, make_guide, mixture
from flowvi.init import Gaussian, best_gaussian, distinct
from flowvi.objectives import Estimate, ForwardKL, LogDensity, Renyi
from flowvi.overlap import overlap
from flowvi.schedule import Average, Guard, decayed
from flowvi.target import Target

RATES = (3e-3, 1e-3, 3e-4)
TRIAL_STEPS = 60
JUDGE_DRAWS = 2000
LAST_PART = 0.2
# What is random in a restart; each has a stream of its own.
BUILD, TRIAL, TRAIN, JUDGE, COVER = range(5)
# A mixture of more components than this would take too long to train.
MOST_COMPONENTS = 3

Objective = Renyi | ForwardKL


class Step(NamedTuple):
    """What a callback is told after every step.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps in all.
        bound: Estimate of the bound at this step.
        grad_norm: Norm of its gradient.
        lr: Step size.
        skipped: Steps skipped so far.
        restart: Number of the restart, from 0.
    """

    step: int
    steps: int
    bound: float
    grad_norm: float
    lr: float
    skipped: int
    restart: int


@dataclass(frozen=True)
class Settings:
    """What the user asked of a fit, for all its restarts.

    Args:
        objective: What to maximise.
        steps: Number of steps.
        lr: Largest step size; searched if there is none.
        repeats: Estimates of the objective a step.
        seed: Of everything random.
        progress: Whether to show a bar.
        callback: Told of every step; a true answer stops.
        escalate: Whether to go on with a mixture where one flow leaves modes out.
    """

    objective: Objective
    steps: int
    lr: float | None
    repeats: int
    seed: int
    progress: bool
    callback: Callable[[Step], object] | None
    escalate: bool


class Run:
    """One restart."""

    def __init__(
        self, target: Target, settings: Settings, restart: int, name: str, guide: Guide | None
    ) -> None:
        self.target, self.settings, self.restart = target, settings, restart
        self.name, self.given = name, guide
        self.log: list[str] = []
        self.rows: list[tuple[float, float, float, bool]] = []
        self.interrupted = False
        self.lr = settings.lr or 0.0
        self.bound = -math.inf
        self.guide: Guide
        self.sizes: dict[str, int] = {}
        self.missed: list[str] = []

    def go(self) -> None:
        """Start, train, choose and check; an interrupt keeps the best so far."""
        best, others = best_gaussian(
            self.target, self.seed(BUILD), self.name == "meanfield", self.log.append
        )
        torch.manual_seed(self.seed(BUILD))
        self.guide = self._build(best, others)
        self._optimise()
        found = self._left_out(others)
        if found and self.settings.escalate and not self.interrupted:
            found = self._escalate(best, others, found)
        self.missed = [sentence(found, self.bound)] if found else []

    def seed(self, place: int) -> int:
        """The seed of one of the places where this restart is random."""
        return stream(self.settings.seed, 1 + self.restart, place)

    def _left_out(self, others: list[Gaussian]) -> list[Gaussian]:
        return left_out(self.target, self.guide, self.bound, others, self.seed(COVER))

    def _escalate(
        self, best: Gaussian, others: list[Gaussian], found: list[Gaussian]
    ) -> list[Gaussian]:
        """Try a mixture with a component for each mode; keep it if its bound is better."""
        kept = self.guide, self.bound, self.name, self.lr
        starts = [best, *found][:MOST_COMPONENTS]
        self.log.append(f"{len(found)} other modes left out: trying a mixture of {len(starts)}")
        self.name, self.sizes = "mixture", {"components": len(starts)}
        self.guide = self._placed(mixture(self.target.dim, components=len(starts)))
        cast(MixtureGuide, self.guide).start_many([(g.loc, g.scale_tril) for g in starts])
        self._optimise()
        if self.bound > kept[1]:
            return self._left_out(others)
        self.log.append("the mixture is no better: back to one flow")
        (self.guide, self.bound, self.name, self.lr), self.sizes = kept, {}
        return found

    def _build(self, best: Gaussian, others: list[Gaussian]) -> Guide:
        """The guide, started at the best Gaussian, or at several if it has components."""
        guide = self.given
        if guide is None:
            self.name = "realnvp" if self.name == "auto" else self.name
            guide = make_guide(self.name, self.target.dim)
            if self.name not in GUIDES:
                self.log.append(f"guide: {self.name} on a full-rank base")
        else:
            self.name = type(guide).__name__
        guide = self._placed(guide)
        guide.start(best.loc, best.scale_tril)
        if isinstance(guide, MixtureGuide):
            starts = distinct([best, *others], len(guide.components))
            whole = itertools.islice(itertools.cycle(starts), len(guide.components))
            guide.start_many([(g.loc, g.scale_tril) for g in whole])
            self.log.append(f"components started at {len(starts)} different places")
        return guide

    def _placed(self, guide: Guide) -> Guide:
        return guide.to(dtype=self.target.dtype, device=self.target.device)

    def _optimise(self) -> None:
        self.trained = [p for p in self.guide.parameters() if p.requires_grad]
        self.trained += [p for p in self.target.parameters() if p.requires_grad]
        if not self.trained:
            self.bound = self._judge()
            return
        start = self._vector()
        try:
            self.lr = self.settings.lr or self._search(start)
            average = self._train(start)
            last = self._vector()
        except KeyboardInterrupt:
            self.interrupted = True
            last, average = self._vector(), None
            self.log.append(f"interrupted after {len(self.rows)} steps")
        self._choose({"start": start, "last": last, "average": average})
        if isinstance(self.guide, MixtureGuide):
            self.log += overlap(self.guide).complaints

    def _search(self, start: Tensor) -> float:
        """Try step sizes briefly from the same start, on the same noise, and judge them."""
        if self.settings.steps < 5 * TRIAL_STEPS:
            return RATES[1]
        found = {}
        for lr in RATES:
            self._set(start)
            torch.manual_seed(self.seed(TRIAL))
            self._steps(lr, TRIAL_STEPS, _constant(lr), quiet=True)
            found[lr] = self._judge()
        self._set(start)
        finite = {lr: bound for lr, bound in found.items() if math.isfinite(bound)}
        lr = max(finite, key=lambda lr: finite[lr]) if finite else RATES[-1]
        tried = ", ".join(f"{lr:g}: {bound:.3f}" for lr, bound in found.items())
        self.log.append(f"step size {lr:g}, by the bound after {TRIAL_STEPS} steps ({tried})")
        return lr

    def _train(self, start: Tensor) -> Tensor | None:
        steps = self.settings.steps
        average = Average()
        tail = steps - max(1, int(LAST_PART * steps))

        def after(i: int) -> None:
            if i >= tail:
                average.add(self._vector())

        torch.manual_seed(self.seed(TRAIN))
        self._steps(self.lr, steps, lambda i: decayed(i, steps, self.lr), after=after)
        return average.mean

    def _steps(
        self,
        lr: float,
        steps: int,
        rate: Callable[[int], float],
        quiet: bool = False,
        after: Callable[[int], None] = lambda i: None,
    ) -> None:
        optimiser = torch.optim.Adam(self.trained, lr=lr, fused=True)
        guard = Guard()
        with self._bar(steps, quiet) as bar:
            for i in range(steps):
                optimiser.param_groups[0]["lr"] = rate(i)
                row = self._step(optimiser, guard, rate(i))
                after(i)
                if quiet:
                    continue
                self.rows.append(row)
                bar.update()
                if i % 20 == 0:
                    recent = [r[0] for r in self.rows[-50:] if math.isfinite(r[0])]
                    bar.set_postfix_str(f"bound {np.mean(recent):.3f}" if recent else "")
                if self.settings.callback is not None:
                    told = Step(i + 1, steps, *row[:3], guard.skipped, self.restart)
                    if self.settings.callback(told):
                        self.log.append(f"stopped by the callback after {i + 1} steps")
                        return
        if guard.skipped and not quiet:
            self.log.append(f"{guard.skipped} of {steps} steps skipped by the gradient guard")

    def _step(
        self, optimiser: torch.optim.Optimizer, guard: Guard, lr: float
    ) -> tuple[float, float, float, bool]:
        bound = self._bound(self.settings.repeats)
        gradients = torch.autograd.grad(-bound, self.trained, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(self.trained, gradients, strict=True)
            ]
        )
        value = bound.item()
        admitted, norm = guard.admits(value, flat)
        if admitted:
            start = 0
            for p in self.trained:
                p.grad = flat[start : start + p.numel()].view_as(p)
                start += p.numel()
            optimiser.step()
        return value, norm, lr, not admitted

    def _bound(self, repeats: int) -> Tensor:
        batch = self._batch()
        objective = self.settings.objective
        estimate = _estimate(
            objective, lambda z: self.target.log_prob(z, batch), self.guide, repeats
        )
        return estimate.bound.mean()

    def _batch(self) -> Mapping[str, Tensor] | None:
        if not self.target.subsampled:
            return None
        return {
            name: torch.randperm(size, device=self.target.device)[:batch]
            for name, (size, batch) in self.target.subsampled.items()
        }

    def _judge(self) -> float:
        """The bound on fresh draws, the same noise for all that are judged."""
        objective = self.settings.objective
        chunk = max(1, self.target.chunk() // particles_of(objective))
        left = max(1, JUDGE_DRAWS // particles_of(objective))
        total, count = 0.0, left
        state = torch.get_rng_state()
        # The same noise for all restarts, whose bounds are compared.
        torch.manual_seed(stream(self.settings.seed, 0, JUDGE))
        with torch.no_grad():
            while left > 0:
                now = min(chunk, left)
                values = _estimate(objective, self.target.log_prob, self.guide, now).bound
                total, left = total + now * float(values.mean()), left - now
        torch.set_rng_state(state)
        return total / count

    def _choose(self, vectors: Mapping[str, Tensor | None]) -> None:
        found = {}
        for name, vector in vectors.items():
            if vector is not None:
                self._set(vector)
                found[name] = self._judge()
        finite = {name: b if math.isfinite(b) else -math.inf for name, b in found.items()}
        best = max(finite, key=lambda name: finite[name])
        chosen = vectors[best]
        assert chosen is not None
        self._set(chosen)
        self.bound = found[best]
        tried = ", ".join(f"{name} {bound:.3f}" for name, bound in found.items())
        self.log.append(f"kept the {best} iterate, by the bound on {JUDGE_DRAWS} draws ({tried})")

    def _vector(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.trained).detach().clone()

    def _set(self, vector: Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(vector.clone(), self.trained)

    def _bar(self, steps: int, quiet: bool) -> tqdm[Any]:
        hidden = quiet or not self.settings.progress or not sys.stderr.isatty()
        return tqdm(
            total=steps, desc=self.target.name, unit="step", disable=hidden, dynamic_ncols=True
        )


def particles_of(objective: Objective) -> int:
    """Draws inside one estimate that the guide makes."""
    return objective.particles if isinstance(objective, Renyi) else 1


def _estimate(objective: Objective, log_p: LogDensity, guide: Guide, repeats: int) -> Estimate:
    if isinstance(objective, ForwardKL):
        return objective(log_p, guide)
    return objective(log_p, guide, repeats=(repeats,))


def _constant(lr: float) -> Callable[[int], float]:
    return lambda step: lr
