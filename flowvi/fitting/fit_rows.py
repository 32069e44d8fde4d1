"""Fit guides to models with one latent vector for each row."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.fitting.first_guide import AUTO
from flowvi.fitting.given_start import rows_of_fit
from flowvi.fitting.request import Request, check_prefixes
from flowvi.fitting.result import RowFit
from flowvi.guides.amortized import PerRow
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import amortised
from flowvi.objectives.registry import OBJECTIVES, describe_rows
from flowvi.objectives.renyi_bound import elbo
from flowvi.runtime import distributed, memory
from flowvi.runtime.arguments import check_choice
from flowvi.runtime.checkpoint_folder import open_checkpoint, warn_if_unwritable
from flowvi.runtime.clock import Clock, interruptible
from flowvi.runtime.progress import current
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.precision import dtype_name
from flowvi.training.checkpointer import Checkpointer
from flowvi.training.epochs import Epoch, Epochs
from flowvi.training.minibatch import check_objective
from flowvi.training.records import Record
from flowvi.training.settings import Session

SPLIT, BUILD = 2, 3
# Subfolder of a checkpoint with the best epoch so far.
BEST = "fit"


def fit_rows(request: Request) -> RowFit:
    """Fit a guide to the latents of rows, and the model's parameters with it; see `flowvi.fit`."""
    target, settings, seed = cast(LocalTarget, request.target), request.rows, request.seed
    objective = _objective(request.objective)
    check_objective(target, objective, settings)
    clock = Clock(request.budget)
    checkpointer = Checkpointer(clock, target)
    session = Session(clock, checkpointer, request.callback)
    current().ending = clock.interrupted_here
    facts = {k: v for k, v in dataclasses.asdict(settings).items() if k != "transform"}
    guide, record = cast(str | Guide, request.guide), Record()
    earlier = rows_of_fit(target, request.start)
    if earlier is not None:
        guide = _continued(earlier, guide)
    with (
        memory.memory_limit(request.max_memory),
        isolated_rng(derive_seed(seed, BUILD)),
        interruptible(clock),
    ):
        target.begin()
        name, built = _guide(target, guide)
        check_prefixes(built, objective)
        rows, held = _split(target, request.validation, seed)
        if isinstance(built, PerRow) and held is not None:
            raise ValueError(
                "validation needs a guide for rows that were not trained on; PerRow has none. "
                "Leave validation out, or use Amortised."
            )
        epochs = Epochs(target, built, objective, settings, rows, held, seed, session, record)
        about = {
            "model": target.name,
            "rows": len(rows),
            "guide": name,
            "parameters": epochs.gradient.flat.vector.numel(),
            "objective": describe_rows(objective),
            "settings": facts,
            "seed": seed,
        }
        specs = [{"name": name, "own": not isinstance(guide, str)}]
        if earlier is not None:
            about["start"] = f"{earlier.target.name}, {earlier.meta['seed']}"
            specs, name = earlier.meta["specs"], earlier.meta["guide"]
            record.log.append("start: the guide and the parameters of an earlier fit")
        facts = {**facts, "specs": specs, "seed": seed, "guide": name}
        folder = request.folder

        def save() -> None:
            if folder is not None:
                with epochs.at_best():
                    _result(epochs, built, facts, clock).save(folder / BEST)

        checkpointer.saved = save
        with open_checkpoint(folder, about, request.resume) as checkpointer.shelf:
            epochs.run()
            if folder is not None and not distributed.rank():
                with warn_if_unwritable(folder):
                    save()
    result = _result(epochs, built, facts, clock)
    for failure in record.failures:
        warnings.warn(failure, stacklevel=4)
    return result


def _result(epochs: Epochs, guide: Guide, facts: dict[str, Any], clock: Clock) -> RowFit:
    """The fit at its present state."""
    target, told, held = epochs.target, epochs.progress.epochs, epochs.validation
    columns = list(zip(*told, strict=True)) or [()] * len(Epoch._fields)
    history = {n: np.array(c) for n, c in zip(Epoch._fields, columns, strict=True)}
    meta = {
        "model": target.name,
        "objective": describe_rows(epochs.objective),
        "precision": dtype_name(target.dtype),
        **facts,
        "epochs": len(told),
        "rows": len(epochs.rows),
        "validation": 0 if held is None else len(held.places),
        "kept": _kept_epoch(epochs),
        "stopped": epochs.progress.stopped,
        "seconds": clock.local_seconds,
        "budget": clock.budget,
        "interrupted": epochs.interrupted,
        "skipped": epochs.skipped,
        "failures": list(epochs.record.failures),
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
    return RowFit(target, guide, history, [*_log_lines(epochs, held), *epochs.record.log], meta)


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
    # Parameters that guide and model share stay shared.
    shared = any(id(p) in own for p in guide.parameters())
    new = guide if shared else copy.deepcopy(guide)
    new = new.to(dtype=target.dtype, device=target.device)
    inner = getattr(new, "guide", new)
    return type(inner).__name__, new


def _continued(earlier: RowFit, guide: str | Guide) -> Guide:
    """The guide of an earlier fit, to train on."""
    if guide != AUTO:
        raise ValueError(
            "start brings the guide of the earlier fit: leave out guide, or leave out start and "
            "pass a guide of your own."
        )
    own = {id(p) for p in earlier.target.parameters()}
    if any(id(p) in own for p in earlier.guide.parameters()):
        raise ValueError(
            f"The guide of start shares parameters with its model {earlier.target.name}: build "
            "model and guide anew, load their state, and pass that guide."
        )
    return earlier.guide


def _split(target: LocalTarget, validation: Any, seed: int) -> tuple[Tensor, Batch | None]:
    """Split the rows: indices of the training rows, and the validation rows."""
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
    generator = torch.Generator().manual_seed(derive_seed(seed, SPLIT))
    order = torch.randperm(target.rows, generator=generator)
    return order[held:].sort().values, target.batch(order[:held].sort().values)


def _kept_epoch(epochs: Epochs) -> int:
    """Number of the epoch whose parameters are kept, from 1; 0 before the first."""
    found = [epoch.validation for epoch in epochs.progress.epochs]
    if epochs.validation is None or not np.isfinite(found).any():
        return len(found)
    return int(np.nanargmax(found)) + 1


def _log_lines(epochs: Epochs, held: Batch | None) -> list[str]:
    """Log lines of the training, with the epoch that is kept."""
    state, size = epochs.progress, epochs.settings.batch_size
    log = [f"{len(epochs.rows)} rows in batches of {size}, {len(state.epochs)} epochs"]
    if epochs.settings.patience is not None and state.stopped:
        log.append(f"stopped after {len(state.epochs)} epochs by {state.stopped}")
    if held is not None and state.epochs:
        log.append(
            f"kept epoch {_kept_epoch(epochs)}: the best bound, {state.best_bound:.4f}, on "
            f"{len(held.places)} held-out rows"
        )
    if epochs.interrupted:
        log.append(f"interrupted after {len(state.epochs)} epochs")
    return log


def _objective(objective: Any) -> Any:
    if not isinstance(objective, str):
        return elbo(1) if objective is None else objective
    choices = [name for name in OBJECTIVES if name != "forward_kl"]
    return OBJECTIVES[check_choice("objective for rows", objective, choices)]()
