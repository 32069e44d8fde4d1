"""The state of a training: all values that its next step depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.training.adam import Adam
from flowvi.training.averaging import Average
from flowvi.training.flat import flatten_tensors
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import BoundLevel
from flowvi.training.plateau import Plateau
from flowvi.training.records import Record

GOOD_EVERY = 50
MOST_HALVINGS = 3
# Attributes that a checkpoint saves unchanged.
PLAIN = ("falling", "ended", "step", "steady", "began", "rate", "halvings")


@dataclass
class TrainState:
    """State and parameters of a training, for checkpoint, rollback and resume.

    Args:
        guide: The trained guide, or another module.
        trained: Parameters of the guide and the target, in a fixed order.
        give: Function that sets the parameters from a vector.
        optimiser: Their optimiser.
        start: Their initial values, in one vector.
        record: The record that steps are added to.

    Attributes:
        falling: Whether the decay has begun.
        ended: Whether the present part, constant or decay, has ended.
        step: Number of steps taken in the present part.
        steady: Number of constant steps taken before the decay.
        began: Time in seconds of the fit at which the decay began.
        rate: Step size of the last step.
        halvings: Number of times the step size was halved after a failure.
        plateau: Test for a plateau of the bound.
        guard: Guard of the gradients.
        level: Test for a collapse of the bound.
        average: Average of the last iterates.
    """

    guide: nn.Module
    trained: Sequence[Tensor]
    give: Callable[[Tensor], None]
    optimiser: Adam
    start: Tensor
    record: Record
    falling: bool = False
    ended: bool = False
    step: int = 0
    steady: int = 0
    began: float = 0.0
    rate: float = 0.0
    halvings: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    guard: Guard = field(default_factory=Guard)
    level: BoundLevel = field(default_factory=BoundLevel)
    average: Average = field(default_factory=Average)

    def __post_init__(self) -> None:
        self.marks = self.record.marks()
        self._good = self._here()

    def start_decay(self, now: float) -> None:
        """Switch to steps of falling size."""
        self.falling, self.ended = True, False
        self.steady, self.step, self.began, self.rate = self.step, 0, now, 0.0
        self.guard = Guard()

    @property
    def exhausted(self) -> bool:
        """Whether the step size cannot be halved further."""
        return self.halvings > MOST_HALVINGS

    def snapshot(self) -> None:
        """Save the present state for a rollback, at intervals, unless a recent step failed."""
        if self.step % GOOD_EVERY == 0 and not self.guard.failing and not self.level.low:
            self._good = self._here()

    def rollback(self) -> None:
        """Return to the last saved state, with half the step size."""
        vector, optimiser = self._good
        self._set(vector)
        self.optimiser.load_state_dict(optimiser)
        self.guard.forget()
        self.level.values.clear()
        self.halvings += 1

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in the form that `write_state` takes."""
        good, optimiser = self._good
        return {
            "guide": cpu_state_dict(self.guide),
            "parameters": self.vector(),
            "optimiser": self.optimiser.state_dict(),
            "good": [good, optimiser],
            "start": self.start,
            "record": self.record.since(self.marks),
            "plain": {name: getattr(self, name) for name in PLAIN},
            "plateau": [self.plateau.values, self.plateau.in_a_row],
            "guard": [list(self.guard.norms), list(self.guard.failures), self.guard.skipped],
            "level": self.level.state_dict(),
            "average": [self.average.mean, self.average.count],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        load_tensors(self.guide, state["guide"], "The checkpoint")
        self._set(state["parameters"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.start = state["start"].to(self.start)
        good, optimiser = state["good"]
        self._good = (good.to(self.start), optimiser)
        self.record.extend(state["record"])
        for name in PLAIN:
            setattr(self, name, state["plain"][name])
        self.plateau.values, self.plateau.in_a_row = state["plateau"]
        norms, failures, self.guard.skipped = state["guard"]
        self.guard.norms.extend(norms)
        self.guard.failures.extend(failures)
        if "level" in state:  # states of earlier versions have none
            self.level.load_state_dict(state["level"])
        mean, self.average.count = state["average"]
        self.average.mean = None if mean is None else mean.to(self.start)

    def vector(self) -> Tensor:
        """Copy of all parameters as one vector."""
        return flatten_tensors(self.trained)

    def _set(self, vector: Tensor) -> None:
        self.give(vector.to(self.start))

    def _here(self) -> tuple[Tensor, dict[str, Any]]:
        return self.vector(), self.optimiser.state_dict()
