"""The engine: fit a guide to a target."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, overload

from flowvi.fitting.fit_rows import fit_rows
from flowvi.fitting.fit_shared import fit_shared
from flowvi.fitting.request import Request
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative
from flowvi.objectives.nested import NestedTarget
from flowvi.objectives.registry import Objective
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime import memory
from flowvi.runtime.arguments import suggest_spelling
from flowvi.targets import LocalTarget, Target
from flowvi.training.compiling import Compile
from flowvi.training.epochs import Epoch
from flowvi.training.minibatch import Minibatch
from flowvi.training.records import Step
from flowvi.training.schedule import Schedule


@overload
def fit(  # type: ignore[overload-overlap]
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


@overload
def fit(
    target: NestedTarget,
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
    schedule: Schedule | None = ...,
    max_memory: memory.MaxMemory = ...,
) -> NestedFit: ...


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
    schedule: Schedule | None = ...,
    max_memory: memory.MaxMemory = ...,
) -> Fit: ...


@suggest_spelling
def fit(
    target: Target,
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
    schedule: Schedule | None = None,
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
    batch_size, validation and minibatch are for it, and the result is a `RowFit`. Where rows share
    latents beside their own, `nested` fits both.

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
        schedule: How long to train and with what steps: a `flowvi.training.schedule.Schedule`.
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
    request = Request(**locals())
    return fit_rows(request) if isinstance(target, LocalTarget) else fit_shared(request)
