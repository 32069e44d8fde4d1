"""Run restarts of a fit by an executor, in processes of this machine or of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowvi.diagnostics import Diagnosis
from flowvi.draws.storage import from_state, to_state
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.escalation import escalate
from flowvi.fitting.first_guide import first_guide
from flowvi.fitting.restart import Restart
from flowvi.guides.guide import Guide
from flowvi.guides.registry import make_guide
from flowvi.runtime import memory
from flowvi.runtime.checkpoint_folder import open_checkpoint
from flowvi.runtime.clock import Clock
from flowvi.runtime.rng import isolated_rng
from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.targets import Target
from flowvi.targets.precision import default_dtype
from flowvi.training.checkpointer import Checkpointer
from flowvi.training.evaluation import particles_of
from flowvi.training.records import Evaluation, Record
from flowvi.training.settings import Session, Settings
from flowvi.training.threads import best_threads


@dataclass(frozen=True)
class Plan:
    """Arguments that all restarts of a fit share.

    Args:
        guide: Name of a guide, or a guide.
        fresh: Whether a given guide is initialised at the start that is found.
        settings: The user's settings.
        about: Identity of the fit, for its checkpoint.
        folder: Checkpoint folder, if there is one.
        resume: Whether to resume from the state in that folder.
    """

    guide: str | Guide
    fresh: bool
    settings: Settings
    about: Mapping[str, Any]
    folder: Path | None
    resume: bool

    def restart(self, target: Target, session: Session, number: int) -> Restart:
        """Create a restart for a target."""
        given = self.guide
        name, own = (given, None) if isinstance(given, str) else ("", copy.deepcopy(given))
        return Restart(target, self.settings, session, number, name, own, self.fresh)


@dataclass(frozen=True)
class Task:
    """Arguments of a restart in another process: a plan, and a function that makes its target.

    Args:
        make: Function that makes the target, the same one in every process.
        plan: The plan.
        number: Number of the restart.
        budget: Time limit in seconds.
        dtype: Default precision of new tensors.
        own: Initial values of the target's own state, as arrays by name.
    """

    make: Callable[[], Target]
    plan: Plan
    number: int
    budget: float | None
    dtype: torch.dtype
    own: Mapping[str, np.ndarray]


def run_restart(restart: Restart) -> None:
    """Run one restart, independent of other restarts in this process."""
    restart.target.begin()
    restart.run(first_guide)
    if restart.settings.escalate:
        escalate(restart)
    restart.interrupted = restart.interrupted or restart.session.clock.interrupted


def run_in_executor(
    plan: Plan, target: Target, session: Session, number: int, executor: Executor
) -> list[Restart]:
    """Run restarts by an executor, each on a target of its own, and collect their results.

    Args:
        plan: Arguments that the restarts share.
        target: The log density.
        session: State of the running fit.
        number: Number of restarts.
        executor: Runs the restarts.

    Raises:
        ValueError: The model or an argument cannot be sent to another process.
    """
    if session.callback is not None:
        raise ValueError("callback is called in this process: leave it out, or the executor.")
    if target.made is None:
        raise ValueError(f"{target.name} cannot be made again elsewhere: leave out the executor.")
    own, dtype = _arrays(own_state_of(target)), torch.get_default_dtype()
    tasks = [Task(target.made, plan, i, session.clock.budget, dtype, own) for i in range(number)]
    futures = [executor.submit(run_in_worker, task) for task in tasks]
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
    with isolated_rng():
        return [from_message(plan, target, session, i, answer) for i, answer in enumerate(answers)]


def run_in_worker(task: Task) -> dict[str, Any]:
    """Run a restart, and return its result as arrays, numbers and strings."""
    # With a thread executor, other threads must not draw random numbers meanwhile.
    limit = memory.memory_limit(task.plan.settings.max_memory)
    with isolated_rng(), default_dtype(task.dtype), limit:
        target = task.make()
        target.set_own_state(_tensors(task.own))
        return _arrays(to_message(_run(target, task)))


def _run(target: Target, task: Task) -> Restart:
    clock, plan = Clock(task.budget), task.plan
    settings = plan.settings
    session = Session(clock, Checkpointer(clock, target))
    folder = None if plan.folder is None else plan.folder / f"restart-{task.number}"
    with (
        best_threads(target, settings.repeats * particles_of(settings.objective)),
        open_checkpoint(folder, plan.about, plan.resume) as session.checkpointer.shelf,
    ):
        session.checkpointer.own_state(target, Record())
        restart = plan.restart(target, session, task.number)
        run_restart(restart)
    return restart


def to_message(restart: Restart) -> dict[str, Any]:
    """The result of a restart, in a form that can be pickled."""
    found = restart.candidate
    return {
        "candidate": {
            "name": found.name,
            "sizes": found.sizes,
            "lr": found.lr,
            "evaluation": list(found.evaluation),
            "missed_mass": found.missed_mass,
            "opinion": found.opinion,
            "drifts": found.drifts,
            "bridge": found.bridge,
        },
        "guide": cpu_state_dict(found.guide),
        "own": own_state_of(restart.target),
        "missed": [g.state() for g in found.missed],
        "chains": None if found.chains is None else to_state(found.chains),
        "best": restart.best.state(),
        "others": [g.state() for g in restart.other_starts],
        "record": restart.record.since((0, 0, 0, 0)),
        "interrupted": restart.interrupted,
        "diagnosis": found.diagnosis,
    }


def from_message(
    plan: Plan, target: Target, session: Session, number: int, message: dict[str, Any]
) -> Restart:
    """The restart, as if it had run in this process."""
    found = _tensors(message)
    diagnosis: Diagnosis | None = found["diagnosis"]
    restart = plan.restart(target, session, number)
    restart.record.extend(found["record"])
    restart.best, restart.interrupted = restart.gaussian(found["best"]), found["interrupted"]
    restart.other_starts = [restart.gaussian(state) for state in found["others"]]
    facts, own = found["candidate"], restart.given
    guide = make_guide(facts["name"], target.dim, **facts["sizes"]) if own is None else own
    guide = restart.to_target(guide)
    load_tensors(guide, found["guide"], "The restart")
    # The guide was trained together with these parameters.
    target.set_own_state(found["own"])
    restart.candidate = Candidate(
        guide,
        **{**facts, "evaluation": Evaluation(*facts["evaluation"])},
        missed=[restart.gaussian(state) for state in found["missed"]],
        diagnosis=diagnosis,
        chains=None if found["chains"] is None else from_state(target, found["chains"]),
    )
    return restart


def own_state_of(target: Target) -> dict[str, Tensor]:
    """Copies of all values of a target that training changes, by name."""
    return {name: held.detach().clone() for name, held in target.own_state().items()}


def _arrays(tree: Any) -> Any:
    def array(x: Any) -> Any:
        return x.detach().cpu().numpy() if isinstance(x, Tensor) else x

    return tree_map(array, tree)


def _tensors(tree: Any) -> Any:
    return tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree)
