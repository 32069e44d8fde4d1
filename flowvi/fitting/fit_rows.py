"""Fit guides to models with one latent vector a row, and what comes of it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.fitting.result import RowFit
from flowvi.guides.amortized import PerRow
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import amortised
from flowvi.objectives.registry import OBJECTIVES, describe_rows
from flowvi.objectives.renyi_bound import Renyi, elbo
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime import distributed
from flowvi.runtime.arguments import given, known, path
from flowvi.runtime.checkpoint_folder import Shelf, opened
from flowvi.runtime.clock import Clock
from flowvi.runtime.rng import own_randomness, stream
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.precision import spelled
from flowvi.training.epochs import Epoch, RowTrainer
from flowvi.training.minibatch import Minibatch, check_objective

SPLIT, BUILD = 2, 3


def fit_rows(
    target: LocalTarget,
    guide: str | Guide = "auto",
    objective: Renyi | WakeSleep | str | None = None,
    *,
    settings: Minibatch,
    validation: Any = None,
    seed: int = 0,
    budget: float | None = None,
    progress: bool = True,
    callback: Callable[[Epoch], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> RowFit:
    """Fit a guide to the local latents of a target, and the model's parameters with it.

    `flowvi.fit` calls this for targets with `local=`.

    Args:
        target: From `from_pyro` or `from_density` with `local=`.
        guide: A guide for rows, such as `Amortised(encoder, guide)`; or the name of a guide or
            flow, which a perceptron over the row then conditions; "auto" is one with couplings.
        objective: The ELBO by default.
        settings: How to go through the rows.
        validation: Rows to judge epochs by, or the share of the target's rows that are held
            out for it; the epoch with the best bound is then kept.
        seed: Of everything random.
        budget: Seconds that the fit may take.
        progress: Show a bar, if the error stream is a terminal.
        callback: Called with an `Epoch` after each; a true answer stops the fit.
        checkpoint: Folder in which the state after the last two epochs is kept.
        resume: Go on with what an earlier fit of the same arguments left there.
    """
    wanted = _objective(objective)
    check_objective(target, wanted, settings)
    clock = Clock(budget)
    facts = {k: v for k, v in dataclasses.asdict(settings).items() if k != "transform"}
    with own_randomness(stream(seed, BUILD)):
        name, built = _guide(target, guide)
        rows, held = _split(target, validation, seed)
        if isinstance(built, PerRow) and held is not None:
            raise ValueError(
                "validation needs a guide for rows that were not trained on; PerRow has none. "
                "Leave validation out, or use Amortised."
            )
        trainer = RowTrainer(
            target, built, wanted, settings, rows, held, seed, clock, progress, callback
        )
        about = {
            "model": target.name,
            "rows": len(rows),
            "guide": name,
            "parameters": trainer.flat.vector.numel(),
            "objective": describe_rows(wanted),
            "settings": facts,
            "seed": seed,
        }
        with opened(given(path, "checkpoint", checkpoint), about, resume) as shelf:
            _go_on(trainer, shelf)
            state = trainer.run()
    log = _log(trainer, held)
    columns = list(zip(*state.epochs, strict=True)) or [()] * len(Epoch._fields)
    history = {n: np.array(c) for n, c in zip(Epoch._fields, columns, strict=True)}
    meta = {
        "model": target.name,
        "guide": name,
        "specs": [{"name": name, "own": not isinstance(guide, str)}],
        "objective": describe_rows(wanted),
        "precision": spelled(target.dtype),
        **facts,
        "epochs": len(state.epochs),
        "rows": len(rows),
        "validation": 0 if held is None else len(held.places),
        "seed": seed,
        "seconds": clock.seconds,
        "interrupted": state.interrupted,
        "skipped": trainer.guard.skipped,
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
    return RowFit(target, built, history, log, meta)


def _go_on(trainer: RowTrainer, shelf: Shelf | None) -> None:
    """Begin where an earlier fit was cut off, and keep the state after each epoch."""
    if shelf is None:
        return
    states = (shelf.read(entry) for entry in shelf.states)
    saved = next((state for state in states if state is not None), None)
    if saved is not None:
        trainer.restore(saved)
    if distributed.rank() == 0:
        trainer.save = lambda: shelf.put_state("epoch", 1, trainer.snapshot())


def _guide(target: LocalTarget, guide: str | Guide) -> tuple[str, Guide]:
    if isinstance(guide, str):
        name = guide
        if guide == "auto":
            name = "realnvp" if target.dim > 1 else "spline"
        return name, amortised(target, name)
    if guide.dim != target.dim:
        raise ValueError(
            f"The guide has D = {guide.dim} but each row of {target.name} has D = {target.dim}."
        )
    if isinstance(guide, PerRow) and guide.vectors.num_embeddings != target.rows:
        raise ValueError(
            f"The guide has parameters for {guide.vectors.num_embeddings} rows but {target.name} "
            f"has {target.rows}."
        )
    own = {id(p) for p in target.parameters()}
    # What guide and model share, as with a prior made of the guide, stays shared.
    shared = any(id(p) in own for p in guide.parameters())
    new = guide if shared else copy.deepcopy(guide)
    new = new.to(dtype=target.dtype, device=target.device)
    inner = getattr(new, "guide", new)
    return type(inner).__name__, new


def _split(target: LocalTarget, validation: Any, seed: int) -> tuple[Tensor, Batch | None]:
    """Places of the rows to train on, and the rows to validate on."""
    everything = torch.arange(target.rows)
    if validation is None:
        return everything, None
    if not isinstance(validation, float | int):
        return everything, target.as_batch(validation)
    if not 0.0 < validation < 1.0:
        raise ValueError(
            f"validation must be rows, or the share of them to hold out; got {validation}."
        )
    held = round(validation * target.rows)
    if not 0 < held < target.rows:
        raise ValueError(
            f"validation must be rows, or the share of them to hold out; got {validation}."
        )
    generator = torch.Generator().manual_seed(stream(seed, SPLIT))
    order = torch.randperm(target.rows, generator=generator)
    return order[held:].sort().values, target.batch(order[:held].sort().values)


def _log(trainer: RowTrainer, held: Batch | None) -> list[str]:
    state, settings = trainer.state, trainer.settings
    log = [
        f"{len(trainer.rows)} rows in batches of {settings.batch_size}, {len(state.epochs)} epochs"
    ]
    if trainer.guard.skipped:
        log.append(f"{trainer.guard.skipped} steps skipped by the gradient guard")
    if held is not None and state.epochs:
        best = int(np.argmax([e.validation for e in state.epochs])) + 1
        log.append(
            f"kept epoch {best}, by the bound {state.best_bound:.4f} on {len(held.places)} rows"
        )
    if state.interrupted:
        log.append(f"interrupted after {len(state.epochs)} epochs")
    return log


def _objective(objective: Renyi | WakeSleep | str | None) -> Any:
    if not isinstance(objective, str):
        return elbo(1) if objective is None else objective
    choices = [name for name in OBJECTIVES if name != "forward_kl"]
    return OBJECTIVES[known("objective for rows", objective, choices)]()
