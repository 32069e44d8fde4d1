"""Restarts of a fit that an executor runs, in processes of this machine or of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowvi.diagnostics import Diagnosis
from flowvi.draws.storage import put_up, taken_down
from flowvi.fitting.candidate import Kept
from flowvi.fitting.escalation import escalate
from flowvi.fitting.restart import Run
from flowvi.guides.guide import Guide
from flowvi.guides.registry import make_guide
from flowvi.initialization.gaussian import Gaussian
from flowvi.runtime import memory
from flowvi.runtime.checkpoint_folder import opened
from flowvi.runtime.clock import Clock
from flowvi.runtime.rng import own_randomness
from flowvi.runtime.tensors import fill, tensors_of
from flowvi.targets import Target
from flowvi.targets.precision import default_dtype
from flowvi.training.evaluation import particles_of
from flowvi.training.records import Judged, Record
from flowvi.training.resume import Journal
from flowvi.training.settings import Settings
from flowvi.training.threads import best_threads

# Settings that the user gave, and that can be sent.
ASKED = ("objective", "steps", "lr", "repeats", "seed", "escalate", "compile", "max_memory")


class Task(NamedTuple):
    """All that a restart needs, without anything that cannot be sent.

    Attributes:
        make: Makes the target: the same one wherever it is called.
        restart: Number of the restart.
        guide: Name of a guide, or one.
        asked: Of the settings, what the user gave.
        dtype: Precision that new tensors have by default.
        about: What the fit is of, for its checkpoint.
        folder: Where the fit keeps what it needs to go on, if it does.
        resume: Whether to go on with what is there.
        own: The model's own parameters where the fit begins, as arrays by name.
    """

    make: Callable[[], Target]
    restart: int
    asked: Mapping[str, Any]
    dtype: torch.dtype
    guide: str | Guide
    about: Mapping[str, Any]
    folder: Path | None
    resume: bool
    own: Mapping[str, np.ndarray]


def go(run: Run) -> None:
    """One restart from its beginning to its end, whatever others ran before in this process."""
    run.target.density.begin()
    run.go()
    if run.settings.escalate:
        escalate(run)
    run.interrupted = run.interrupted or run.settings.clock.interrupted


def begun(target: Target, settings: Settings, restart: int, guide: str | Guide) -> Run:
    """A restart that is about to begin."""
    if isinstance(guide, str):
        return Run(target, settings, restart, guide, None)
    return Run(target, settings, restart, "", copy.deepcopy(guide))


def elsewhere(
    target: Target,
    settings: Settings,
    restarts: int,
    ask: Callable[..., Task],
    executor: Executor,
) -> list[Run]:
    """Run restarts by an executor, each on a target of its own, and take up what came of them.

    Args:
        target: The log density.
        settings: Of the fit.
        restarts: Number of restarts.
        ask: Makes a task of what makes the target, the number of the restart, settings, a
            precision, and own=, the model's own parameters.
        executor: Runs them.

    Raises:
        ValueError: The model or an argument cannot be sent to another process.
    """
    if settings.callback is not None:
        raise ValueError("callback is called in this process: leave it out, or the executor.")
    if target.made is None:
        raise ValueError(f"{target.name} cannot be made again elsewhere: leave out the executor.")
    asked = {name: getattr(settings, name) for name in ASKED} | {"budget": settings.clock.budget}
    dtype = torch.get_default_dtype()
    own = _arrays(own_of(target))
    tasks = [ask(target.made, restart, asked, dtype, own=own) for restart in range(restarts)]
    futures = [executor.submit(told, task) for task in tasks]
    try:
        answers = [future.result() for future in futures]
    except Exception as error:
        if "pickle" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(
            f"{target.name} cannot be sent to another process ({error}). Define model and data at "
            "the top level of a module, or use an executor that sends functions, such as Dask's."
        ) from error
    finally:
        for future in futures:
            future.cancel()
    with own_randomness():
        return [_heard(target, settings, t, a) for t, a in zip(tasks, answers, strict=True)]


def told(task: Task) -> dict[str, Any]:
    """Run a restart; what came of it, as arrays, numbers and words."""
    # In another thread of this process, nobody else may draw random numbers meanwhile.
    limit = memory.limited(task.asked["max_memory"])
    with own_randomness(), default_dtype(task.dtype), limit:
        return _arrays(_told(task, task.make()))


def _told(task: Task, target: Target) -> dict[str, Any]:
    clock = Clock(task.asked["budget"])
    settings = Settings(
        **{name: value for name, value in task.asked.items() if name != "budget"},
        progress=False,
        callback=None,
        clock=clock,
        journal=Journal(clock, target.density),
    )
    target.give_own(_tensors(task.own))
    folder = None if task.folder is None else task.folder / f"restart-{task.restart}"
    with (
        best_threads(target, settings.repeats * particles_of(settings.objective)),
        opened(folder, task.about, task.resume) as settings.journal.shelf,
    ):
        settings.journal.parameters(target, Record())
        run = begun(target, settings, task.restart, task.guide)
        go(run)
    kept = run.kept
    return {
        "kept": {
            "name": kept.name,
            "sizes": kept.sizes,
            "lr": kept.lr,
            "judged": Judged(*kept.judged),
            "beyond": kept.beyond,
        },
        "guide": tensors_of(kept.guide),
        "own": own_of(target),
        "missed": [g.state() for g in kept.missed],
        "chains": None if kept.chains is None else taken_down(kept.chains),
        "best": run.best.state(),
        "others": [g.state() for g in run.others],
        "record": run.record.since((0, 0, 0, 0)),
        "interrupted": run.interrupted,
        "diagnosis": kept.diagnosis,
    }


def _heard(target: Target, settings: Settings, task: Task, answer: dict[str, Any]) -> Run:
    """The restart, as if it had been run here."""
    found = _tensors(answer)
    diagnosis: Diagnosis | None = found["diagnosis"]
    run = begun(target, settings, task.restart, task.guide)
    run.record = Record()
    run.record.extend(found["record"])
    run.best, run.interrupted = _gaussian(target, found["best"]), found["interrupted"]
    run.others = [_gaussian(target, state) for state in found["others"]]
    facts = found["kept"]
    own = run.given
    guide = make_guide(facts["name"], target.dim, **facts["sizes"]) if own is None else own
    guide = run.placed(guide)
    fill(guide, found["guide"], "The restart")
    # The guide belongs to the parameters that it was trained with.
    target.give_own(found["own"])
    run.kept = Kept(
        guide,
        **{**facts, "judged": Judged(*facts["judged"])},
        missed=[_gaussian(target, state) for state in found["missed"]],
        diagnosis=diagnosis,
        chains=None if found["chains"] is None else put_up(target, found["chains"]),
    )
    return run


def own_of(target: Target) -> dict[str, Tensor]:
    """The model's own parameters by name, as copies."""
    return {name: p.detach().clone() for name, p in target.own_parameters().items()}


def _gaussian(target: Target, state: Mapping[str, Any]) -> Gaussian:
    moved: dict[str, Any] = {
        n: v.to(target.device) if isinstance(v, Tensor) else v for n, v in state.items()
    }
    return Gaussian(**moved)


def _arrays(tree: Any) -> Any:
    return tree_map(lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x, tree)


def _tensors(tree: Any) -> Any:
    return tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree)
