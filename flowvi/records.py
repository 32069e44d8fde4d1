"""What is asked of a training, and what it leaves behind for its reader."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from flowvi.compiling import Compile
from flowvi.objectives import ForwardKL, Renyi
from flowvi.stopping import Clock

# What is random in a restart; each has a stream of its own.
BUILD, TRIAL, TRAIN, JUDGE, COVER, CHECK, ANNEAL, CHAINS, LOOK, WIDE = range(10)

Objective = Renyi | ForwardKL


class Step(NamedTuple):
    """What a callback is told after every step.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps in all, or the most that there can be.
        bound: Estimate of the bound at this step.
        grad_norm: Norm of its gradient.
        lr: Step size.
        skipped: Steps skipped so far.
        restart: Number of the restart, from 0.
    """

    step: int
    steps: int
    bound: float
    grad_norm: float
    lr: float
    skipped: int
    restart: int


@dataclass(frozen=True)
class Settings:
    """What the user asked of a fit, for all its restarts.

    Args:
        objective: What to maximise.
        steps: Number of steps; as many as it takes without.
        lr: Largest step size; searched if there is none.
        repeats: Estimates of the objective a step, at the start.
        seed: Of everything random.
        progress: Whether to show a bar.
        callback: Told of every step; a true answer stops.
        escalate: Whether to go on while the result is not to be trusted.
        clock: The time that is left.
        compile: Whether to compile the step.
    """

    objective: Objective
    steps: int | None
    lr: float | None
    repeats: int
    seed: int
    progress: bool
    callback: Callable[[Step], object] | None
    escalate: bool
    clock: Clock
    compile: Compile = "auto"


class Row(NamedTuple):
    """One step in the history of a fit."""

    bound: float
    grad_norm: float
    lr: float
    skipped: bool
    draws: int
    stage: int


class Judged(NamedTuple):
    """A guide on fresh draws.

    Attributes:
        bound: Its bound.
        se: Standard error of the bound.
        gap: How far the bound is below the log evidence; NaN where that is not known.
        khat: Pareto shape of the weights; likewise.
    """

    bound: float
    se: float = math.inf
    gap: float = math.nan
    khat: float = math.nan


@dataclass(frozen=True)
class Stage:
    """A stretch of training: steps of constant size, then of falling size.

    Args:
        name: What to call it.
        steady: Most steps of constant size; a plateau ends them sooner.
        decay: Steps of falling size; half as many as the steady ones took, without.
        repeats: Estimates of the objective a step.
        lr: Largest step size.
        share: Share of the time budget at which it has to end.
    """

    name: str
    steady: int
    decay: int | None
    repeats: int
    lr: float
    share: float = 1.0


@dataclass
class Record:
    """What a restart leaves behind for its reader."""

    rows: list[Row] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    stopped: bool = False
