"""The bound of a step and its gradient, whatever the step is over. Abstract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowvi.guides.guide import Guide
from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock
from flowvi.targets import Target
from flowvi.training.flat import Finest, assign_tensors, flatten_tensors


class Gradient(ABC):
    """Bounds on fresh draws, and the gradient of minus the bound.

    A gradient of one kind of step is called with what that step is over, and returns the bound
    () and the gradient of all parameters in one vector (P).

    Args:
        target: The log density.
        guide: The guide.
        clock: Of the fit; processes tell each other its time in a step.

    Attributes:
        trained: Parameters of the guide and the target's own, in the order of the gradient and
            in the finest precision among them; see `follow`.
        answer: The answer of this process's callback to the last step, for the others to hear.
        stopped: Whether that of the first process was to stop, as the last step told.
    """

    def __init__(self, target: Target, guide: Guide, clock: Clock) -> None:
        self.target, self.guide, self.clock = target, guide, clock
        self._finest = Finest(trained(guide, target))
        self.trained: Sequence[Tensor] = self._finest.tensors
        self.answer = self.stopped = False

    @property
    @abstractmethod
    def whole(self) -> Tensor | None:
        """The memory of all parameters, where it is one vector, (P)."""

    @abstractmethod
    def explain_nonfinite(self) -> str:
        """What was not finite in the step before, in a sentence."""

    def in_double(self) -> None:
        """Compute everything in the precision of the guide from now on."""
        return

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all parameters in one vector meanwhile, where that is possible."""
        yield

    def follow(self) -> None:
        """Give parameters of a coarser precision the values of `trained`, which stand for them."""
        self._finest.follow()

    def vector(self) -> Tensor:
        """All parameters in one vector, a copy."""
        return flatten_tensors(self.trained) if self.whole is None else self.whole.clone()

    def set(self, vector: Tensor) -> None:
        """Give the parameters the values of a vector."""
        assign_tensors(self.trained, vector)
        self.follow()

    def averaged(
        self, bound: Tensor, gradient: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means over the processes, which hear from the first how things are."""
        told = *self.clock.status(), self.answer
        bound, gradient, heard = distributed.all_reduce_mean(bound, gradient, told, dtype)
        if distributed.size() > 1:
            self.clock.receive(*heard[:2])
            self.stopped = bool(heard[2])
        return bound, gradient

    def agrees(self) -> bool:
        """Whether the callback has said to stop; of several processes the first one's, later."""
        return self.answer if distributed.size() == 1 else self.stopped


def trained(*modules: nn.Module) -> list[Tensor]:
    """Parameters that are trained; each once, where modules share them."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


Say = Callable[[str], None]
