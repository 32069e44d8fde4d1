"""Settings of a fit, and the state that a running fit shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.objectives.registry import Objective
from flowvi.runtime.clock import Clock
from flowvi.runtime.memory import MaxMemory
from flowvi.training.checkpointer import Checkpointer
from flowvi.training.compiling import Compile
from flowvi.training.schedule import DEFAULT, Schedule


@dataclass(frozen=True)
class Settings:
    """The user's settings for all restarts, which can be pickled.

    Args:
        objective: The objective to maximise.
        steps: Number of steps; None trains until convergence.
        lr: Largest step size; None searches for one.
        repeats: Initial number of estimates of the objective in a step.
        seed: Seed of all random numbers.
        escalate: Whether to try further guides while the result is not trusted.
        compile: Whether to compile the step.
        max_memory: Memory limit of an evaluation, in bytes.
        schedule: Numbers of steps, step sizes and thresholds.
        start: The normal at which the user wants the search to begin.
    """

    objective: Objective
    steps: int | None = None
    lr: float | None = None
    repeats: int = 64
    seed: int = 0
    escalate: bool = False
    compile: Compile = "auto"
    max_memory: MaxMemory = None
    schedule: Schedule = DEFAULT
    start: GaussianApproximation | None = None


@dataclass(frozen=True)
class Session:
    """State of a running fit in this process.

    Args:
        clock: Remaining time, and whether an interrupt was requested.
        checkpointer: Saves the state of the fit.
        callback: Function called after every step or epoch; a true answer stops the fit.
    """

    clock: Clock = field(default_factory=Clock)
    checkpointer: Checkpointer = field(default_factory=lambda: Checkpointer(Clock()))
    callback: Callable[[Any], object] | None = None
