"""Abstract base class: the bound of a step and its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock
from flowvi.targets import Target
from flowvi.training.flat import Finest, assign_tensors, flatten_tensors


class Gradient(ABC):
    """Estimates the bound from fresh draws, and the gradient of minus the bound.

    A subclass is called with the arguments of its kind of step. It returns the bound () and
    the gradient of all parameters in one vector (P).

    Args:
        target: The log density.
        guide: The guide, or another module that is trained.
        clock: Clock of the fit; processes exchange its time in every step.

    Attributes:
        trained: Parameters of the guide and the target, in the order of the gradient and in
            the finest precision among them; see `follow`.
        answer: Answer of this process's callback to the last step, sent to other processes.
        stopped: Whether the first process's callback asked to stop, as of the last step.
    """

    def __init__(self, target: Target, guide: nn.Module, clock: Clock) -> None:
        self.target, self.guide, self.clock = target, guide, clock
        self._finest = Finest(trained(guide, target))
        self.trained: Sequence[Tensor] = self._finest.tensors
        self.answer = self.stopped = False

    @property
    @abstractmethod
    def whole(self) -> Tensor | None:
        """The memory of all parameters, (P), if it is one vector."""

    @abstractmethod
    def explain_nonfinite(self) -> str:
        """Describe in a sentence which value of the last step was not finite."""

    def in_double(self) -> None:
        """Compute in the precision of the guide from now on."""
        return

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold all parameters in one vector within the context, where that is possible."""
        yield

    def follow(self) -> None:
        """Set parameters of a coarser precision to the rounded values of `trained`."""
        self._finest.follow()

    def vector(self) -> Tensor:
        """Copy of all parameters as one vector."""
        return flatten_tensors(self.trained) if self.whole is None else self.whole.clone()

    def set(self, vector: Tensor) -> None:
        """Set all parameters from one vector."""
        assign_tensors(self.trained, vector)
        self.follow()

    def averaged(
        self, bound: Tensor, gradient: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Average over the processes, and receive the first one's time and callback answer."""
        told = *self.clock.status(), self.answer
        bound, gradient, heard = distributed.all_reduce_mean(bound, gradient, told, dtype)
        if distributed.size() > 1:
            self.clock.receive(*heard[:2])
            self.stopped = bool(heard[2])
        return bound, gradient

    def agrees(self) -> bool:
        """Whether to stop: the first process's callback answer, received one step later."""
        return self.answer if distributed.size() == 1 else self.stopped


def trained(*modules: nn.Module) -> list[Tensor]:
    """Trainable parameters of modules, each once."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


Say = Callable[[str], None]
