"""The engine: fit a guide to a target."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowvi._version import __version__
from flowvi.draws import Draws, draw
from flowvi.guides import Guide
from flowvi.objectives import OBJECTIVES, ForwardKL, Renyi, elbo
from flowvi.target import Target
from flowvi.training import Objective, Run, Settings, Step, particles_of

STEPS = 2000
PARTICLES = 64
SINGLE_THREAD_BELOW = 2_000_000


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
    gradients and a decaying step. Where the search for a start found modes that the
    flow leaves out, a mixture with a flow for each is tried (with guide="auto" and
    the default number of steps). Of the average of the last iterates, the
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
    settings = Settings(
        objective,
        steps or STEPS,
        lr,
        _repeats(objective, particles),
        seed,
        progress,
        callback,
        # Someone who counts the steps does not want them doubled; and the model's own
        # parameters belong to the guide that they were trained with.
        escalate=guide == "auto" and steps is None and not list(target.parameters()),
    )
    runs: list[Run] = []
    with _own_randomness(target), _threads(target, particles or PARTICLES):
        for restart in range(restarts):
            name = guide if isinstance(guide, str) else ""
            chosen = copy.deepcopy(guide) if isinstance(guide, Guide) else None
            run = Run(target, settings, restart, name, chosen)
            runs.append(run)
            run.go()
            if run.interrupted:
                break
    return _result(target, runs, settings, time.perf_counter() - began)


def _result(target: Target, runs: list[Run], settings: Settings, seconds: float) -> Fit:
    columns = list(zip(*(row for run in runs for row in run.rows), strict=True))
    names = ("bound", "grad_norm", "lr", "skipped")
    history = {n: np.array(c) for n, c in zip(names, columns or [()] * 4, strict=True)}
    history["restart"] = np.repeat([r.restart for r in runs], [len(r.rows) for r in runs])
    many = len(runs) > 1
    log = [f"restart {r.restart}: {line}" if many else line for r in runs for line in r.log]
    meta = {
        "model": target.name,
        "guide": max(runs, key=lambda run: run.bound).name,
        "specs": [{"name": run.name, "sizes": run.sizes} for run in runs],
        "objective": describe(settings.objective),
        "steps": settings.steps,
        "particles": settings.repeats * particles_of(settings.objective),
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


def _missed(runs: list[Run]) -> list[str]:
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
    return max(1, (particles or PARTICLES) // particles_of(objective))


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
    if restarts > 1 and list(target.parameters()):
        raise ValueError(
            f"{target.name} has parameters of its own, which every restart would train anew: "
            f"restarts must be 1, got {restarts}. Capture the model once for each fit instead."
        )
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
