"""The engine: fit a guide to a target."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch

from flowvi._version import __version__
from flowvi.diagnostics import Check
from flowvi.fitting.arguments import (
    PARTICLES,
    check,
    minibatch_of,
    objective_of,
    refuse,
    repeats_of,
)
from flowvi.fitting.candidate import Kept
from flowvi.fitting.escalation import joined
from flowvi.fitting.executors import Task, begun, elsewhere, go
from flowvi.fitting.fit_rows import fit_rows
from flowvi.fitting.identity import guide_words, latents, log_density
from flowvi.fitting.restart import Run, checked
from flowvi.fitting.result import Fit, RowFit
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative
from flowvi.guides.registry import guide_names
from flowvi.initialization.preflight import check_size
from flowvi.objectives.registry import Objective, describe
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime import distributed, memory
from flowvi.runtime.arguments import given, known, path, positive, spelt, wanted, whole
from flowvi.runtime.checkpoint_folder import opened, said
from flowvi.runtime.clock import Clock, Interrupted, droppable, interruptible
from flowvi.runtime.rng import own_randomness, stream
from flowvi.targets import LocalTarget, Target
from flowvi.targets.precision import spelled
from flowvi.training.compiling import Compile, asked
from flowvi.training.epochs import Epoch
from flowvi.training.evaluation import particles_of
from flowvi.training.minibatch import Minibatch
from flowvi.training.records import CHECK, Record, Row, Step
from flowvi.training.resume import Journal
from flowvi.training.settings import Settings
from flowvi.training.threads import best_threads

# Folder of the best guide so far in that of a checkpoint.
BEST = "fit"
AUTO = "auto"
# Names of guides that have to know the shapes of sites.
RECIPES: dict[str, Callable[[], Multiplicative]] = {"multiplicative": Multiplicative}


@overload
def fit(
    target: Target,
    guide: str | Guide | Blocks | Multiplicative = ...,
    objective: Objective | WakeSleep | str | None = ...,
    *,
    steps: int | None = ...,
    lr: float | None = ...,
    particles: int | None = ...,
    restarts: int = ...,
    seed: int = ...,
    budget: float | None = ...,
    escalate: bool = ...,
    compile: Compile = ...,
    progress: bool = ...,
    callback: Callable[[Step], object] | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    executor: Executor | None = ...,
    max_memory: memory.MaxMemory = ...,
) -> Fit: ...


@overload
def fit(
    target: LocalTarget,
    guide: str | Guide = ...,
    objective: Objective | WakeSleep | str | None = ...,
    *,
    lr: float | None = ...,
    seed: int = ...,
    budget: float | None = ...,
    progress: bool = ...,
    callback: Callable[[Epoch], object] | None = ...,
    epochs: int | None = ...,
    batch_size: int | None = ...,
    validation: Any = ...,
    minibatch: Minibatch | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    max_memory: memory.MaxMemory = ...,
) -> RowFit: ...


@spelt
def fit(
    target: Target | LocalTarget,
    guide: str | Guide | Blocks | Multiplicative = "auto",
    objective: Objective | WakeSleep | str | None = None,
    *,
    steps: int | None = None,
    lr: float | None = None,
    particles: int | None = None,
    restarts: int = 1,
    seed: int = 0,
    budget: float | None = None,
    escalate: bool = True,
    compile: Compile = "auto",
    progress: bool = True,
    callback: Callable[[Any], object] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    minibatch: Minibatch | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    max_memory: memory.MaxMemory = None,
) -> Fit | RowFit:
    """Fit a guide to a target, starting at the best Gaussian that can be found.

    A full-rank Gaussian is fitted first, from several start points; the flow
    starts at the identity on top of it and is trained by Adam with path
    gradients, in stages of steps that are constant until a plateau and then
    fall. The draws a step grow from stage to stage. Of the average of a
    stage's last iterates, the last one and its start, that with the best bound
    on fresh draws is kept: the result is no worse than the Gaussian. Stages end
    when next to nothing is left to gain, or the last one gained too little.

    The result is then checked as `diagnose` does. While it is not to be
    trusted, other guides are tried (`flowvi.fitting.escalation`), and at last NUTS in
    the guide's space. The global random number generators are left as they
    were. Without a budget and with compile=False, a seed gives the same bits on
    one machine; a compiled step agrees with the eager one to rounding.

    In the processes of a `torch.distributed` group, as `torchrun` starts them, each
    makes the same choices and takes draws of its own: P processes take the steps
    of one with P times the draws, and all return the same guide.

    A target with latents for each row (`local=`) is fitted on minibatches instead: epochs,
    batch_size, validation and minibatch are for it, and what comes back is a `RowFit`.

    Ctrl-C ends the present step; the best so far is returned, and `meta["interrupted"]` says
    so. The second one stops at once.

    Args:
        target: From `from_pyro` or `from_density`. Its own parameters are trained too.
        guide: "auto", a name in `GUIDES` or `FLOWS`, a guide, `Blocks`, or `Multiplicative`.
        objective: From `elbo()`, `iwelbo(K)`, `renyi(alpha, K)`, or one of their names;
            the ELBO by default.
        steps: Number of steps, in one stage; as many as it takes by default.
        lr: Largest step size of Adam, in units of the Gaussian's width; by
            default the best of three in short trials.
        particles: Draws a step, at first; 64 by default. An objective with K particles is
            averaged over particles / K repeats.
        restarts: Independent fits; each becomes a chain of the draws.
        seed: Of everything random in the fit.
        budget: Seconds that the fit may take; as many as it needs without.
        escalate: Whether to go on with other guides, and at last with Markov chains, while
            the result is not to be trusted; with guide="auto" and steps not given.
        compile: Whether the gradient of a step is compiled by a C++ compiler. "auto": in a
            process beside a long fit, which switches over when that is done, or at once where
            an earlier fit left it in FLOWVI_CACHE (~/.cache/flowvi). The variable FLOWVI_COMPILE,
            on or off, decides what "auto" does. Steps on a GPU are not compiled.
        progress: Show a bar, if the error stream is a terminal.
        callback: Called with a `Step` after each, or for rows with an `Epoch`; a true answer
            stops the fit.
        epochs: For rows: times that each is visited; 40 by default.
        batch_size: For rows: how many a step takes; 100 by default.
        validation: For rows: other rows, or the share of them to hold out, to judge epochs by.
        minibatch: For rows: all other settings, such as the warm-up of the prior's weight.
        checkpoint: Folder where all that a fit needs to go on is kept as it comes, and the
            best so far in its folder `fit`, for `flowvi.load`.
        resume: Go on with what an earlier fit of the same arguments left there; begin where
            there is nothing. The result has the bits of a fit that was not cut off.
        executor: Runs the restarts, such as a `ProcessPoolExecutor`, or Dask's for a cluster; one
            after the other without, and with the same result. Each may take the budget.
        max_memory: What evaluations may take, in bytes or as in "2GB"; FLOWVI_MAX_MEMORY, or
            1 GB, by default. A step whose draws take more is made in parts.

    Raises:
        CheckpointError: The folder is in use, or cannot be gone on with.
        ValueError: An argument is out of its range, or the objective is no
            bound for this target.
    """
    wanted("target", target, (Target, LocalTarget), "what from_pyro or from_density returned")
    kinds = (str, Guide, Blocks, Multiplicative)
    wanted("guide", guide, kinds, "a name, a guide such as MeanField(D), or Blocks")
    steps, particles, epochs, batch_size = (
        given(whole, name, value)
        for name, value in (
            ("steps", steps),
            ("particles", particles),
            ("epochs", epochs),
            ("batch_size", batch_size),
        )
    )
    restarts, seed = whole("restarts", restarts), whole("seed", seed, 0)
    lr = given(positive, "lr", lr)
    budget = given(positive, "budget", budget, "number of seconds")
    given(wanted, "executor", executor, Executor, "a ProcessPoolExecutor")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a step; got {callback!r}.")
    if resume and checkpoint is None:
        raise ValueError("resume=True goes on with a checkpoint: name its folder, checkpoint=.")
    if isinstance(guide, str) and guide in RECIPES:
        guide = RECIPES[guide]()
    if isinstance(guide, Blocks | Multiplicative):
        if isinstance(target, LocalTarget):
            raise ValueError(
                f"{type(guide).__name__} is for latents that all rows share; give rows a name or "
                "guide."
            )
        guide = guide.build(target)
    if isinstance(target, LocalTarget):
        others: dict[str, Any] = {
            "steps": steps,
            "particles": particles,
            "restarts": restarts - 1 or None,
            "executor": executor,
        }
        refuse("has latents for each row", others)
        rows: Any = objective
        with memory.limited(max_memory):
            return fit_rows(
                target,
                guide,
                rows,
                settings=minibatch_of(minibatch, epochs=epochs, batch_size=batch_size, lr=lr),
                validation=validation,
                seed=seed,
                budget=budget,
                progress=progress,
                callback=callback,
                checkpoint=checkpoint,
                resume=resume,
            )
    for_rows = {"epochs": epochs, "batch_size": batch_size, "validation": validation}
    refuse("has no latents for each row (local=)", {**for_rows, "minibatch": minibatch})
    objective = objective_of(objective, particles)
    check(target, objective, restarts)
    if isinstance(guide, str):
        known("guide", guide, [AUTO, *sorted({*guide_names(), *RECIPES})])
        check_size(target.dim, guide)
    if isinstance(guide, Guide) and guide.dim != target.dim:
        raise ValueError(f"The guide has D = {guide.dim} but {target.name} has D = {target.dim}.")
    clock, folder = Clock(budget), given(path, "checkpoint", checkpoint)
    journal = Journal(clock, target.density)
    settings = Settings(
        objective,
        steps,
        lr,
        repeats_of(objective, particles),
        seed,
        progress,
        callback,
        # Someone who counts the steps does not want them doubled; and the model's own
        # parameters belong to the guide that they were trained with.
        escalate and guide == "auto" and steps is None and not list(target.parameters()),
        clock,
        asked(compile),
        journal,
        memory.limit() if max_memory is None else memory.parse(max_memory),
    )
    runs: list[Run] = []

    def save() -> None:
        ready = [run for run in runs if run.record.stages]
        if folder is not None and ready:
            _result(target, ready, settings, [run.kept for run in ready]).save(folder / BEST)

    journal.kept = save
    about = _about(target, guide, settings, restarts)
    if executor is not None:
        ask = partial(Task, guide=guide, about=about, folder=folder, resume=resume)
        runs += elsewhere(target, settings, restarts, ask, executor)
    with (
        own_randomness(),
        memory.limited(settings.max_memory),
        best_threads(target, particles or PARTICLES),
        opened(folder, about, resume) as journal.shelf,
        interruptible(clock),
    ):
        target.density.begin()
        if executor is None:
            journal.parameters(target, Record())
        for restart in range(len(runs), restarts):
            runs.append(begun(target, settings, restart, guide))
            go(runs[-1])
            if runs[-1].interrupted:
                break
        union = None
        if settings.escalate and len(runs) > 1:
            with suppress(Interrupted), droppable():
                union = joined(runs)
        kept = [union] if union else [run.kept for run in runs]
        result = _result(target, runs, settings, kept)
        result.meta["check"] = _check_of(target, kept, settings)
        if result.chains is not None:
            # Fewer of their draws are judged by all of them.
            found = max(kept, key=lambda k: k.bound).diagnosis
            result.chains.meta["check"] = (
                found and Check(found.verdict, None, found.draws)._asdict()
            )
        if folder is not None and not distributed.rank():
            with said(folder):
                result.save(folder / BEST)
    for failure in result.meta["failures"]:
        warnings.warn(failure, stacklevel=3)
    return result


def _about(target: Target, guide: str | Guide, settings: Settings, restarts: int) -> dict[str, Any]:
    """What has to be the same for a fit to go on."""
    return {
        "model": target.name,
        "site": latents(target),
        "log density": log_density(target),
        "guide": guide_words(guide),
        "objective": describe(settings.objective),
        "steps": settings.steps,
        "lr": settings.lr,
        "repeats": settings.repeats,
        "restarts": restarts,
        "seed": settings.seed,
        "escalate": settings.escalate,
    }


def _result(target: Target, runs: list[Run], settings: Settings, kept: list[Kept]) -> Fit:
    rows = [row for run in runs for row in run.record.rows]
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    history = {n: np.array(c) for n, c in zip(Row._fields, columns, strict=True)}
    history["restart"] = np.repeat([r.restart for r in runs], [len(r.record.rows) for r in runs])
    many = len(runs) > 1
    log = [f"restart {r.restart}: {line}" if many else line for r in runs for line in r.record.log]
    meta = {
        "model": target.name,
        "guide": max(kept, key=lambda k: k.bound).name,
        "specs": [{"name": k.name, "sizes": k.sizes} for k in kept],
        "objective": describe(settings.objective),
        "precision": spelled(target.dtype),
        "steps": len(rows),
        "stages": [run.record.stages for run in runs],
        "particles": settings.repeats * particles_of(settings.objective),
        "lr": [k.lr for k in kept],
        "seed": settings.seed,
        "restarts": len(runs),
        "seconds": settings.clock.own_seconds,
        "budget": settings.clock.budget,
        "interrupted": any(run.interrupted for run in runs),
        "skipped": int(history["skipped"].sum()),
        "failures": [failure for run in runs for failure in run.record.failures],
        "missed": _missed(kept),
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
    chains = max(kept, key=lambda k: k.bound).chains
    if chains is not None:
        chains = replace(chains, meta={**meta, **chains.meta})
    guides, bounds = [k.guide for k in kept], [k.bound for k in kept]
    best = runs[int(np.argmax(bounds)) if len(kept) == len(runs) else 0].best
    return Fit(target, guides, bounds, history, log, meta, chains, best)


def _check_of(target: Target, kept: list[Kept], settings: Settings) -> dict[str, Any] | None:
    """What the last check of the guides found, for the verdict on draws that are made later."""
    if len(kept) == 1:
        found = None if kept[0].chains else kept[0].diagnosis
    elif settings.clock.over() or settings.clock.interrupted:
        found = None
    else:
        seed = stream(settings.seed, 0, CHECK)
        found = checked(target, [k.guide for k in kept], seed, settings.clock.over)
    return None if found is None else Check(found.verdict, found.khat, found.draws)._asdict()


def _missed(kept: list[Kept]) -> list[str]:
    """What no restart covers; with several, each may cover what another leaves out."""
    return kept[0].words if all(k.missed for k in kept) else []
