"""What the user asked of a fit, for all its restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flowvi.objectives.registry import Objective
from flowvi.runtime.clock import Clock
from flowvi.runtime.memory import MaxMemory
from flowvi.training.compiling import Compile
from flowvi.training.records import Step
from flowvi.training.resume import Journal


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
        journal: Where what came of its pieces is kept.
        max_memory: What an evaluation may take, in bytes.
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
    journal: Journal = field(default_factory=lambda: Journal(Clock()))
    max_memory: MaxMemory = None
