"""Fit guides to models with one latent vector a row, and what comes of it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi import memory, parallel
from flowvi._version import __version__
from flowvi.amortised import PerRow, amortised
from flowvi.arguments import given, known, path
from flowvi.draws import stream
from flowvi.guides import Guide
from flowvi.minibatch import Minibatch, check_objective
from flowvi.objectives import OBJECTIVES, Renyi, WakeSleep, elbo
from flowvi.randomness import own_randomness
from flowvi.row_draws import BOUNDS, DRAWING, RowBounds, RowDraws, row_bounds, row_draws
from flowvi.row_training import Epoch, RowTrainer
from flowvi.shelf import Shelf, opened
from flowvi.stopping import Clock
from flowvi.target import Batch, LocalTarget
from flowvi.target.precision import spelled

SPLIT, BUILD = 2, 3


@dataclass
class RowFit:
    """The result of a fit of local latents.

    Attributes:
        target: The log densities of rows; parameters of the model are trained.
        guide: A density for every row.
        history: Per epoch: bound, validation, divergence, lr, beta, skipped, seconds.
        log: What was chosen, and why.
        meta: JSON-able facts: guide, objective, epochs, batch_size, seed, seconds ...
    """

    target: LocalTarget
    guide: Guide
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    FOR_ROWS = (
        "fit.iw_bound() has the evidence of each row and compares models row by row (.minus), "
        "fit.draw() has draws with a k-hat for each row"
    )

    def iw_bound(
        self,
        data: Any = None,
        particles: int = 5000,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        progress: bool = False,
        max_memory: memory.MaxMemory = None,
    ) -> RowBounds:
        """Importance-weighted bounds of rows, in pieces that fit memory.

        Args:
            data: Rows, as the model was given them; those that it was fitted to without.
            particles: Number of draws K for each row.
            seed: Seed of the draws; the caller's generators are left alone.
            rows: Places of some of the rows that it was fitted to, in place of data.
            progress: Show a bar, if the error stream is a terminal.
            max_memory: As for `Fit.draw`.
        """
        batch = self._rows(data, rows)
        seed = stream(seed, BOUNDS)
        with memory.limited(max_memory):
            return row_bounds(self.target, self.guide, batch, particles, seed, progress)

    def draw(
        self,
        n: int = 1000,
        data: Any = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        max_memory: memory.MaxMemory = None,
    ) -> RowDraws:
        """Draw the latents of rows.

        Args:
            n: Draws for each row.
            data: Rows, as the model was given them; those that it was fitted to without.
            seed: Seed of the draws; the caller's generators are left alone.
            rows: Places of some of the rows that it was fitted to, in place of data.
            max_memory: As for `Fit.draw`.
        """
        batch = self._rows(data, rows)
        seed = stream(seed, DRAWING)
        with memory.limited(max_memory):
            return row_draws(self.target, self.guide, batch, n, seed, self.meta)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit to a folder, without pickle; `flowvi.load` reads it back."""
        from flowvi.checkpoint import save_rows

        return save_rows(self, folder)

    def __str__(self) -> str:
        words = "{name}: {guide} guide, {objective}, {epochs} epochs, {seconds:.1f} s, {precision}"
        facts = {"precision": spelled(self.target.dtype), **self.meta}
        head = words.format(name=self.target.name, **facts)
        return "\n".join([head, *(f"  {line}" for line in self.log)])

    def _rows(self, data: Any, rows: Sequence[int] | None) -> Batch:
        if data is not None and rows is not None:
            raise ValueError("Give data or rows, not both: rows are places in the fitted data.")
        return self.target.batch(rows) if data is None else self.target.as_batch(data)


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
            "objective": describe(wanted),
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
        "objective": describe(wanted),
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


def describe(objective: Renyi | WakeSleep) -> str:
    """An objective in the words of the literature."""
    if isinstance(objective, WakeSleep):
        return f"reweighted wake-sleep (K = {objective.particles})"
    kind = "total" if objective.gradient == "total" else "STL" if objective.alpha == 1 else "DReG"
    name = {1.0: "ELBO", 0.0: "IW-ELBO"}.get(objective.alpha, f"Renyi bound {objective.alpha:g}")
    return f"{name} (K = {objective.particles}, {kind})"


def _go_on(trainer: RowTrainer, shelf: Shelf | None) -> None:
    """Begin where an earlier fit was cut off, and keep the state after each epoch."""
    if shelf is None:
        return
    states = (shelf.read(entry) for entry in shelf.states)
    saved = next((state for state in states if state is not None), None)
    if saved is not None:
        trainer.restore(saved)
    if parallel.rank() == 0:
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
