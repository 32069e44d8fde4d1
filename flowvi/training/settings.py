"""What the user asked of a fit, and what a running fit has at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flowvi.objectives.registry import Objective
from flowvi.runtime.clock import Clock
from flowvi.runtime.memory import MaxMemory
from flowvi.training.checkpointer import Checkpointer
from flowvi.training.compiling import Compile
from flowvi.training.schedule import DEFAULT, Schedule


@dataclass(frozen=True)
class Settings:
    """What the user asked of a fit, for all its restarts: numbers and words, which can be sent.

    Args:
        objective: What to maximise.
        steps: Number of steps; as many as it takes without.
        lr: Largest step size; searched if there is none.
        repeats: Estimates of the objective a step, at the start.
        seed: Of everything random.
        escalate: Whether to go on while the result is not to be trusted.
        compile: Whether to compile the step.
        max_memory: What an evaluation may take, in bytes.
        schedule: How long to train, and with what steps.
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


@dataclass(frozen=True)
class Session:
    """What a running fit has at hand in this process.

    Args:
        clock: The time that is left, and whether the fit was asked to stop.
        checkpointer: Where the state of the fit is kept.
        progress: Whether to show a bar.
        callback: Told of every step or epoch; a true answer stops.
    """

    clock: Clock = field(default_factory=Clock)
    checkpointer: Checkpointer = field(default_factory=lambda: Checkpointer(Clock()))
    progress: bool = False
    callback: Callable[[Any], object] | None = None
