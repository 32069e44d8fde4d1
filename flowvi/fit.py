"""The engine: fit a guide to a target."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowvi._version import __version__
from flowvi.coverage import missed
from flowvi.draws import Draws, draw
from flowvi.guides import Guide, make_guide
from flowvi.init import Gaussian, best_gaussian
from flowvi.objectives import OBJECTIVES, Estimate, ForwardKL, LogDensity, Renyi, elbo
from flowvi.schedule import Average, Guard, decayed
from flowvi.target import Target

STEPS = 2000
PARTICLES = 64
RATES = (3e-3, 1e-3, 3e-4)
TRIAL_STEPS = 60
JUDGE_DRAWS = 2000
LAST_PART = 0.2
SINGLE_THREAD_BELOW = 2_000_000


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


@dataclass
class Fit:
    """The result of a fit.

    Attributes:
        target: What was approximated.
        guides: One guide for each restart.
        bounds: The bound of each guide on common fresh draws.
        history: Per step of all restarts: bound, grad_norm, lr, skipped, restart.
        log: What was chosen, and why.
        meta: JSON-able facts: guide, objective, steps, particles, lr, seed, seconds ...
    """

    target: Target
    guides: list[Guide]
    bounds: list[float]
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def guide(self) -> Guide:
        """The guide with the best bound."""
        return self.guides[int(np.argmax(self.bounds))]

    def draw(self, n: int = 4000, seed: int = 0) -> Draws:
        """Draw from every restart's guide and evaluate the target there.

        Args:
            n: Draws from each guide.
            seed: Seed of the draws; the caller's generators are left alone.
        """
        return draw(self.target, self.guides, n, seed, self.meta)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit to a folder, without pickle; `flowvi.load` reads it back."""
        from flowvi.checkpoint import save_fit

        return save_fit(self, folder)

    def __str__(self) -> str:
        words = "{name}: {guide} guide, {objective}, {steps} steps, {seconds:.1f} s"
        head = words.format(name=self.target.name, **self.meta)
        return "\n".join([head, *(f"  {line}" for line in self.log)])


def fit(
    target: Target,
    guide: str | Guide = "auto",
    objective: Objective | str | None = None,
    *,
    steps: int | None = None,
    lr: float | None = None,
    particles: int | None = None,
    restarts: int = 1,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[Step], object] | None = None,
) -> Fit:
    """Fit a guide to a target, starting at the best Gaussian that can be found.

    A full-rank Gaussian is fitted first, from several start points; the flow
    starts at the identity on top of it and is trained by Adam with path
    gradients and a decaying step. Of the average of the last iterates, the
    last one and the start, that with the best bound on fresh draws is kept:
    the result is no worse than the Gaussian. The global random number
    generators are left as they were, and a seed gives the same bits on one machine.

    Args:
        target: From `from_pyro` or `from_density`. Its own parameters are trained too.
        guide: "auto", a name in `GUIDES` or `FLOWS`, or a guide.
        objective: From `elbo()`, `iwelbo(K)`, `renyi(alpha, K)`, or one of their names;
            the ELBO by default.
        steps: Number of steps; 2000 by default.
        lr: Largest step size of Adam, in units of the Gaussian's width; by
            default the best of three in short trials.
        particles: Draws a step, 64 by default. An objective with K particles is
            averaged over particles / K repeats.
        restarts: Independent fits; each becomes a chain of the draws.
        seed: Of everything random in the fit.
        progress: Show a bar, if the error stream is a terminal.
        callback: Called with a `Step` after each; a true answer stops the fit.

    Raises:
        ValueError: An argument is out of its range, or the objective is no
            bound for this target.
    """
    objective = _objective(objective, particles)
    _check(target, objective, steps, lr, particles, restarts, seed)
    if isinstance(guide, Guide) and guide.dim != target.dim:
        raise ValueError(f"The guide has D = {guide.dim} but {target.name} has D = {target.dim}.")
    began = time.perf_counter()
    settings = _Settings(
        objective, steps or STEPS, lr, _repeats(objective, particles), seed, progress, callback
    )
    runs: list[_Run] = []
    with _own_randomness(target), _threads(target, particles or PARTICLES):
        for restart in range(restarts):
            torch.manual_seed(seed + restart)
            name = guide if isinstance(guide, str) else ""
            chosen = copy.deepcopy(guide) if isinstance(guide, Guide) else None
            run = _Run(target, settings, restart, name, chosen)
            runs.append(run)
            run.go()
            if run.interrupted:
                break
    return _result(target, runs, settings, time.perf_counter() - began)


@dataclass(frozen=True)
class _Settings:
    objective: Objective
    steps: int
    lr: float | None
    repeats: int
    seed: int
    progress: bool
    callback: Callable[[Step], object] | None


class _Run:
    """One restart."""

    def __init__(
        self, target: Target, settings: _Settings, restart: int, name: str, guide: Guide | None
    ) -> None:
        self.target, self.settings, self.restart = target, settings, restart
        self.name, self.given = name, guide
        self.log: list[str] = []
        self.rows: list[tuple[float, float, float, bool]] = []
        self.interrupted = False
        self.lr = settings.lr or 0.0
        self.bound = -math.inf
        self.guide: Guide
        self.missed: list[str] = []

    def go(self) -> None:
        """Start, train and choose; an interrupt keeps the best so far."""
        gaussian, others = best_gaussian(
            self.target, self.settings.seed + self.restart, self.name == "meanfield", self.log.append
        )
        self.guide = self._start(gaussian)
        self._optimise()
        self.missed = missed(
            self.target, self.guide, self.bound, others, self.settings.seed + self.restart
        )

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

    def _start(self, gaussian: Gaussian) -> Guide:
        guide = self.given
        if guide is None:
            name = "realnvp" if self.name == "auto" else self.name
            guide = make_guide(name, self.target.dim)
            self.name = name
            if name not in ("meanfield", "fullrank"):
                self.log.append(f"guide: {name} on a full-rank base")
        else:
            self.name = type(guide).__name__
        guide = guide.to(dtype=self.target.dtype, device=self.target.device)
        guide.start(gaussian.loc, gaussian.scale_tril)
        return guide

    def _search(self, start: Tensor) -> float:
        """Try step sizes briefly from the same start, on the same noise, and judge them."""
        if self.settings.steps < 5 * TRIAL_STEPS:
            return RATES[1]
        found = {}
        for lr in RATES:
            self._set(start)
            torch.manual_seed(self.settings.seed + self.restart)
            self._steps(lr, TRIAL_STEPS, lambda i: lr, quiet=True)
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

        torch.manual_seed(self.settings.seed + self.restart + 1)
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
        chunk = max(1, self.target.chunk() // _particles(objective))
        left = max(1, JUDGE_DRAWS // _particles(objective))
        total, count = 0.0, left
        state = torch.get_rng_state()
        torch.manual_seed(self.settings.seed + 7919)
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


def _result(target: Target, runs: list[_Run], settings: _Settings, seconds: float) -> Fit:
    columns = list(zip(*(row for run in runs for row in run.rows), strict=True))
    names = ("bound", "grad_norm", "lr", "skipped")
    history = {n: np.array(c) for n, c in zip(names, columns or [()] * 4, strict=True)}
    history["restart"] = np.repeat([r.restart for r in runs], [len(r.rows) for r in runs])
    many = len(runs) > 1
    log = [f"restart {r.restart}: {line}" if many else line for r in runs for line in r.log]
    meta = {
        "model": target.name,
        "guide": runs[0].name,
        "objective": describe(settings.objective),
        "steps": settings.steps,
        "particles": settings.repeats * _particles(settings.objective),
        "lr": [r.lr for r in runs],
        "seed": settings.seed,
        "restarts": len(runs),
        "seconds": seconds,
        "interrupted": any(r.interrupted for r in runs),
        "skipped": int(history["skipped"].sum()),
        "missed": _missed(runs),
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
    return Fit(target, [r.guide for r in runs], [r.bound for r in runs], history, log, meta)


def _missed(runs: list[_Run]) -> list[str]:
    """What no restart covers; with several, each may cover what another leaves out."""
    return runs[0].missed if all(run.missed for run in runs) else []


def describe(objective: Objective) -> str:
    """An objective in the words of the literature."""
    if isinstance(objective, ForwardKL):
        return f"forward KL ({len(objective.z)} draws)"
    if objective.alpha == 1.0:
        kind = "total" if objective.gradient == "total" else "STL"
        return f"ELBO ({kind})"
    name = "IW-ELBO" if objective.alpha == 0.0 else f"Renyi bound (alpha = {objective.alpha:g})"
    return f"{name} (K = {objective.particles}, {objective.gradient})"


def _objective(objective: Objective | str | None, particles: int | None) -> Objective:
    if objective is None:
        return elbo(particles or PARTICLES)
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            choices = ", ".join(OBJECTIVES)
            raise ValueError(f"No objective named '{objective}'; choose from {choices}.")
        if objective == "forward_kl":
            raise ValueError(
                "forward_kl needs draws to fit to: pass objective=OBJECTIVES['forward_kl'](z)."
            )
        return OBJECTIVES[objective]()
    return objective


def _repeats(objective: Objective, particles: int | None) -> int:
    return max(1, (particles or PARTICLES) // _particles(objective))


def _particles(objective: Objective) -> int:
    """Draws inside one estimate that the guide makes."""
    return objective.particles if isinstance(objective, Renyi) else 1


def _estimate(
    objective: Objective, log_p: LogDensity, guide: Guide, repeats: int
) -> Estimate:
    if isinstance(objective, ForwardKL):
        return objective(log_p, guide)
    return objective(log_p, guide, repeats=(repeats,))


def _check(
    target: Target,
    objective: Objective,
    steps: int | None,
    lr: float | None,
    particles: int | None,
    restarts: int,
    seed: int,
) -> None:
    for name, value in (("steps", steps), ("particles", particles), ("restarts", restarts)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value}.")
    if lr is not None and not (0 < lr < math.inf):
        raise ValueError(f"lr must be a positive number; got {lr}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0; got {seed}.")
    if not isinstance(objective, Renyi | ForwardKL):
        raise ValueError(
            f"objective must be one such as elbo() or iwelbo(16); got {type(objective).__name__}."
        )
    if target.subsampled and isinstance(objective, Renyi) and objective.alpha < 1:
        plate = next(iter(target.subsampled))
        raise ValueError(
            f"{describe(objective)} over global latents needs every row in each weight, but plate "
            f"'{plate}' is subsampled: it would not be a bound. Use the ELBO, or the full plate."
        )


@contextmanager
def _own_randomness(target: Target) -> Iterator[None]:
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _threads(target: Target, particles: int) -> Iterator[None]:
    """One thread where the arrays are too small to share, as many as before afterwards."""
    before = torch.get_num_threads()
    rows = sum(t.numel() for t in target.observed.values())
    if particles * (target.dim + rows) < SINGLE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
