"""Fit a guide to a target."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, overload

from flowvi.draws.draws import Draws
from flowvi.fitting.fit_rows import fit_rows
from flowvi.fitting.fit_structured import fit_global
from flowvi.fitting.request import Request
from flowvi.fitting.result import Fit, RowFit
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative, Prefixes
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.objectives.registry import Objective
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime import memory
from flowvi.runtime.arguments import suggest_spelling
from flowvi.runtime.clock import Clock
from flowvi.runtime.progress import showing
from flowvi.targets import LocalTarget, Target
from flowvi.training.compiling import Compile
from flowvi.training.epochs import Epoch
from flowvi.training.minibatch import Minibatch
from flowvi.training.records import Step
from flowvi.training.schedule import Schedule


# A target of rows is a `Target` too: the first signature that fits counts.
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
    start: RowFit | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    max_memory: memory.MaxMemory = ...,
) -> RowFit: ...


@overload
def fit(
    target: Target,
    guide: str | Guide | Blocks | Multiplicative | Prefixes = ...,
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
    start: Mapping[str, Any] | Fit | Draws | GaussianApproximation | None = ...,
    max_memory: memory.MaxMemory = ...,
) -> Fit: ...


@suggest_spelling
def fit(
    target: Target,
    guide: str | Guide | Blocks | Multiplicative | Prefixes = "auto",
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
    start: Mapping[str, Any] | Fit | RowFit | Draws | GaussianApproximation | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    max_memory: memory.MaxMemory = None,
) -> Fit | RowFit:
    """Fit a guide to a target, starting at the best Gaussian approximation found.

    A full-rank Gaussian is fitted first, from several start points. The flow starts at
    the identity on top of it. Adam trains it with path gradients, in stages: steps of
    constant size until a plateau, then steps of falling size. The draws a step double
    from stage to stage. Each stage keeps the guide with the best bound on fresh draws:
    the average of its last iterates, the last iterate, or its start. The result is
    therefore no worse than the Gaussian. Training ends when the gap is small, or when a
    stage has reduced it too little.

    The result is then checked as in `diagnose`. While it is not trusted, other guides are
    tried (`flowvi.fitting.escalation`), and finally NUTS in the guide's space. The global
    random number generators are not changed. Without a budget and with compile=False, a
    seed gives the same bits on one machine; a compiled step agrees with the eager one to
    rounding.

    In a `torch.distributed` group, as `torchrun` starts one, all P processes make the same
    choices, each takes draws of its own, and all return the same guide. Their steps are
    those of one process with P times the draws.

    A target with latents for each row (`local=`) is fitted on minibatches instead, and the
    result is a `RowFit`. The arguments epochs, batch_size, validation and minibatch are for such
    targets. `nested` fits models that also have latents shared by all rows.

    Ctrl-C ends the fit after the present step. The best guide so far is returned, and
    `meta["interrupted"]` is true. A second Ctrl-C stops at once.

    Args:
        target: From `from_pyro` or `from_density`. Its own parameters are trained too.
        guide: "auto", "structured", a name in `GUIDES` or `FLOWS`, a guide, `Blocks`,
            `Multiplicative`, or `Prefixes`.
        objective: Result of `elbo()`, `iwelbo(K)` or `renyi(alpha, K)`, or one of their names;
            the ELBO by default.
        steps: Number of steps. By default the fit decides.
        lr: Largest step size of Adam, in units of the Gaussian's width; by
            default the best of three in short trials.
        particles: Initial number of draws a step; 64 by default. An objective with K particles is
            averaged over particles / K repeats.
        restarts: Independent fits; each becomes a chain of the draws.
        seed: Seed of all random numbers of the fit.
        budget: Time limit in seconds; none by default.
        escalate: Whether to try other guides, and finally Markov chains, while the result is
            not trusted; only with guide="auto" and without steps.
        compile: Whether a C++ compiler compiles the gradient of a step. "auto": a long fit
            compiles in another process and switches when that is done, or at once to a step
            that an earlier fit left in FLOWVI_CACHE (~/.cache/flowvi). The variable
            FLOWVI_COMPILE, on or off, overrides "auto". Steps on a GPU are not compiled.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.
        callback: Function called with a `Step` after each step, or for rows with an `Epoch`
            after each epoch; a true answer stops the fit.
        epochs: For rows: number of passes over the rows; 40 by default.
        batch_size: For rows: number of rows of a step; 100 by default.
        validation: For rows: other rows, or the share of rows to hold out; selects the best epoch.
        minibatch: For rows: all other settings, such as the warm-up of the prior's weight.
        schedule: Numbers of steps, step sizes and thresholds: a
            `flowvi.training.schedule.Schedule`.
        start: Where to begin, in place of a search over many places: values by latent site (others
            begin at zero of their unconstrained scale), an earlier fit of the same latents, whose
            normal, or for rows whose guide, is trained on, its draws, whose weighted moments count
            (if they are far from this posterior, a search follows), or a normal in unconstrained
            coordinates, such as ``fit.start``. Other modes are then left to the checks. Parameters
            of the model take the values of the earlier fit.
        checkpoint: Folder for the state of the fit; its folder `fit` holds the best guide so far,
            for `flowvi.load`.
        resume: Whether to resume an earlier fit with the same arguments from the checkpoint; start
            anew if there is none. The result has the bits of an uninterrupted fit.
        executor: Runs the restarts in parallel, with the same result, such as a
            `ProcessPoolExecutor`, or Dask's for a cluster. Each restart may take the budget.
        max_memory: Memory limit of an evaluation, in bytes or as in "2GB"; FLOWVI_MAX_MEMORY, or
            1 GB, by default. A step whose draws take more is computed in parts.

    Raises:
        CheckpointError: The folder is in use, or its state does not fit the arguments.
        ValueError: An argument is out of its range, or the objective is no
            bound for this target.
    """
    request = Request(**locals())
    with showing(target.name, progress, Clock(budget)):
        return fit_rows(request) if isinstance(target, LocalTarget) else fit_global(request)
