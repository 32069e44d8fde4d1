"""Fit latents that all rows share: run the restarts in sequence or by an executor."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import torch

from flowvi._version import __version__
from flowvi.diagnostics import Check
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.check import diagnose_fresh_draws
from flowvi.fitting.escalation import joined
from flowvi.fitting.executors import Plan, run_in_executor, run_restart
from flowvi.fitting.identity import PROBES, guide_words, latents, log_density
from flowvi.fitting.request import PARTICLES, Request
from flowvi.fitting.restart import Restart
from flowvi.fitting.result import Fit, NestedFit
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.guides.guide import Guide
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.structured import StructuredGuide
from flowvi.initialization.symmetry import sentences
from flowvi.objectives.nested import NestedTarget
from flowvi.objectives.registry import describe
from flowvi.runtime import distributed, memory
from flowvi.runtime.checkpoint_folder import open_checkpoint, warn_if_unwritable
from flowvi.runtime.clock import Clock, Interrupted, abort_on_interrupt, interruptible
from flowvi.runtime.progress import current
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import Target
from flowvi.targets.precision import dtype_name
from flowvi.targets.structure import MarginalTarget
from flowvi.training.checkpointer import Checkpointer
from flowvi.training.evaluation import particles_of
from flowvi.training.records import CHECK, Record, Row
from flowvi.training.schedule import Schedule
from flowvi.training.settings import Session, Settings
from flowvi.training.threads import best_threads

# Subfolder of a checkpoint with the best guide so far.
BEST = "fit"


def fit_shared(request: Request) -> Fit:
    """Run the restarts of a fit, and combine their guides; see `flowvi.fit`."""
    target, settings = request.target, request.settings()
    clock, folder = Clock(request.budget), request.folder
    checkpointer = Checkpointer(clock, target)
    session = Session(clock, checkpointer, request.callback)
    current().ending = clock.interrupted_here
    guide = cast(str | Guide, request.guide)
    about = _fit_identity(target, guide, settings, request.restarts)
    plan = Plan(guide, request.fresh, settings, about, folder, request.resume)
    restarts: list[Restart] = []

    def save() -> None:
        ready = [r for r in restarts if r.record.stages]
        if folder is not None and ready:
            result = _result(target, ready, settings, clock, [r.candidate for r in ready])
            result.save(folder / BEST)

    checkpointer.saved = save
    if request.executor is not None:
        restarts += run_in_executor(plan, target, session, request.restarts, request.executor)
    with (
        isolated_rng(),
        memory.memory_limit(settings.max_memory),
        best_threads(target, request.particles or PARTICLES),
        open_checkpoint(folder, about, request.resume) as checkpointer.shelf,
        interruptible(clock),
    ):
        target.begin()
        if request.executor is None:
            checkpointer.own_state(target, Record())
        for number in range(len(restarts), request.restarts):
            restarts.append(plan.restart(target, session, number))
            run_restart(restarts[-1])
            if restarts[-1].interrupted:
                break
        result = _combine_restarts(target, restarts, settings, clock)
        if folder is not None and not distributed.rank():
            with warn_if_unwritable(folder):
                result.save(folder / BEST)
    for failure in result.meta["failures"]:
        warnings.warn(failure, stacklevel=4)
    return result


def _fit_identity(
    target: Target, guide: str | Guide, settings: Settings, restarts: int
) -> dict[str, Any]:
    """The identity of a fit; only a fit with the same identity can resume its checkpoint."""
    about = {
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
    if settings.start is not None:
        about["start"] = [settings.start.name, *settings.start.loc.double().tolist()[:PROBES]]
    if isinstance(target, NestedTarget):
        about["rows"] = target.facts()
    if settings.schedule != Schedule():
        about["schedule"] = {k: v for k, v in asdict(settings.schedule).items() if k != "chains"}
    return about


def _combine_restarts(
    target: Target, restarts: list[Restart], settings: Settings, clock: Clock
) -> Fit:
    """The result of all restarts, with the findings of their last check."""
    union = None
    if settings.escalate and len(restarts) > 1:
        with suppress(Interrupted), abort_on_interrupt():
            union = joined(restarts)
    candidates = [union] if union else [r.candidate for r in restarts]
    result = _result(target, restarts, settings, clock, candidates)
    result.meta["copies"] = _copies(target, result.guides[0])
    result.meta["check"] = _check_findings(target, candidates, settings, clock)
    if result.chains is not None:
        # The verdict on all draws of the chains also applies to a part of these draws.
        found = max(candidates, key=lambda c: c.bound).diagnosis
        result.chains.meta["check"] = found and Check(found.verdict, None, found.draws)._asdict()
    return result


def _copies(target: Target, guide: Guide) -> list[str]:
    """What the symmetries of the density mean for a guide that covers several modes."""
    return sentences(target, guide) if isinstance(guide, MixtureGuide) else []


def _result(
    target: Target,
    restarts: list[Restart],
    settings: Settings,
    clock: Clock,
    candidates: list[Candidate],
) -> Fit:
    rows = [row for r in restarts for row in r.record.rows]
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    history = {n: np.array(c) for n, c in zip(Row._fields, columns, strict=True)}
    lengths = [len(r.record.rows) for r in restarts]
    history["restart"] = np.repeat([r.number for r in restarts], lengths)
    many = len(restarts) > 1
    log = [
        f"restart {r.number}: {line}" if many else line for r in restarts for line in r.record.log
    ]
    failures = [failure for r in restarts for failure in r.record.failures]
    best = max(candidates, key=lambda c: c.bound)
    meta: dict[str, Any] = {
        "model": target.name,
        "guide": best.name,
        "specs": [{"name": c.name, "sizes": c.sizes} for c in candidates],
        "objective": describe(settings.objective),
        "precision": dtype_name(target.dtype),
        "steps": len(rows),
        "stages": [r.record.stages for r in restarts],
        "particles": settings.repeats * particles_of(settings.objective),
        "lr": [c.lr for c in candidates],
        "seed": settings.seed,
        "restarts": len(restarts),
        "seconds": clock.local_seconds,
        "budget": clock.budget,
        "interrupted": any(r.interrupted for r in restarts),
        "skipped": int(history["skipped"].sum()),
        "failures": failures,
        "missed": _missed(candidates),
        "reasons": [best.opinion] if best.opinion and not best.drifts else [],
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
    if best.bridge is not None and len(candidates) == 1:
        meta["bridge"] = list(best.bridge)
    guides, bounds = [c.guide for c in candidates], [c.bound for c in candidates]
    chosen = int(np.argmax(bounds)) if len(candidates) == len(restarts) else 0
    start = restarts[chosen].best
    if isinstance(target, NestedTarget):
        meta |= {
            **target.facts(),
            "specs": [*meta["specs"], target.spec()],
            "outer": particles_of(settings.objective) if target.weighted else 1,
            # The only known fact about draws of such a fit is the failure of its training.
            "missed": failures,
        }
        return NestedFit(target, guides, bounds, history, log, meta, None, start)
    if isinstance(target, MarginalTarget):
        meta |= {"shared": target.dim, "structure": str(target.structure)}
        # Draws of all latents are judged with what the check said of the units.
        wrapped: list[Guide] = [StructuredGuide(target, g) for g in guides]
        return StructuredFit(
            target.whole, wrapped, bounds, history, log, meta, None, start, marginal=target
        )
    chains = best.chains
    if chains is not None:
        chains = replace(chains, meta={**meta, **chains.meta})
    return Fit(target, guides, bounds, history, log, meta, chains, start)


def _check_findings(
    target: Target, candidates: list[Candidate], settings: Settings, clock: Clock
) -> dict[str, Any] | None:
    """Findings of the last check of the guides, for the verdict on later draws."""
    if len(candidates) == 1:
        found = None if candidates[0].chains else candidates[0].diagnosis
    elif clock.out_of_time():
        found = None
    else:
        seed, guides = derive_seed(settings.seed, 0, CHECK), [c.guide for c in candidates]
        found = diagnose_fresh_draws(target, guides, seed, clock.out_of_time, settings.schedule)
    if found is None:
        return None
    # Weights that are all alike have no tail, and JSON has no infinity.
    khat = found.khat if math.isfinite(found.khat) else None
    return Check(found.verdict, khat, found.draws)._asdict()


def _missed(candidates: list[Candidate]) -> list[str]:
    """What every restart is known to miss, and chains that drift away from the best one."""
    found = candidates[0].reasons if all(c.reasons for c in candidates) else []
    best = max(candidates, key=lambda c: c.bound)
    return [*found, best.opinion] if best.drifts else found
