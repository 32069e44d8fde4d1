"""The state of a training: all that its next step depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowvi.guides.guide import Guide
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
# What a checkpoint has of a state as it is.
PLAIN = ("falling", "ended", "step", "steady", "began", "rate", "halvings")


@dataclass
class TrainState:
    """Where a training is, and the parameters with it: for checkpoint, rollback and resume.

    Args:
        guide: What is trained.
        trained: Its parameters and the target's own, in one order.
        give: Gives them the values of a vector.
        optimiser: Of them.
        start: Their values at the beginning, in one vector.
        record: To which the steps are added.

    Attributes:
        falling: Whether the steps have begun to fall.
        ended: Whether the steps of constant, or of falling, size have come to their end.
        step: How many of these were taken.
        steady: Steps of constant size that were taken before they fell.
        began: When they began to fall, in seconds of the fit.
        rate: Size of the last step.
        halvings: How many times the step was halved after it failed.
        plateau: Whether the bound still rises.
        guard: What is known of the gradients.
        level: Whether the bound has collapsed.
        average: Of the last iterates.
    """

    guide: Guide
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
        """Go over to steps of falling size."""
        self.falling, self.ended = True, False
        self.steady, self.step, self.began, self.rate = self.step, 0, now, 0.0
        self.guard = Guard()

    @property
    def exhausted(self) -> bool:
        """Whether no smaller step is left to try."""
        return self.halvings > MOST_HALVINGS

    def snapshot(self) -> None:
        """Take the present state for a good one now and then, where no step has just failed."""
        if self.step % GOOD_EVERY == 0 and not self.guard.failing and not self.level.low:
            self._good = self._here()

    def rollback(self) -> None:
        """Return to the last good state, with half the step."""
        vector, optimiser = self._good
        self._set(vector)
        self.optimiser.load_state_dict(optimiser)
        self.guard.forget()
        self.level.values.clear()
        self.halvings += 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `write_state` takes it."""
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
        """Be where a state was taken."""
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
        """All parameters in one vector, a copy."""
        return flatten_tensors(self.trained)

    def _set(self, vector: Tensor) -> None:
        self.give(vector.to(self.start))

    def _here(self) -> tuple[Tensor, dict[str, Any]]:
        return self.vector(), self.optimiser.state_dict()
