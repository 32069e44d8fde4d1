"""Store parameters in one vector, and optimise them in one precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn


class Finest:
    """Parameters in the finest precision among them, for the optimiser.

    A parameter of the finest precision is used directly. A coarser one has a copy in the
    finest precision, which the optimiser changes; the parameter is set to the rounded copy.
    Small steps thus accumulate, and the parameter keeps its own precision.

    Args:
        parameters: Parameters of any precision.

    Attributes:
        tensors: One tensor for each parameter, in the same order, all of one precision.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        finest = reduce(torch.promote_types, {p.dtype for p in parameters}, torch.bfloat16)
        self.tensors = [p if p.dtype == finest else p.detach().to(finest) for p in parameters]
        pairs = zip(parameters, self.tensors, strict=True)
        self._led = [(p, leader) for p, leader in pairs if p is not leader]

    @torch.no_grad()
    def follow(self) -> None:
        """Set the coarser parameters to their rounded copies."""
        if self._led:
            parameters, leaders = zip(*self._led, strict=True)
            torch._foreach_copy_(list(parameters), list(leaders))

    def gather(self) -> None:
        """Move the gradients of the coarser parameters to their copies."""
        for p, leader in self._led:
            if p.grad is not None and leader.grad is not None:
                leader.grad.copy_(p.grad)
            p.grad = None


class Flat:
    """Parameters as views of one vector, and their gradients likewise.

    The optimiser then needs one call for all parameters.

    Args:
        parameters: Parameters of one precision.
        gradients: Whether their `grad` is a view of one vector too.

    Raises:
        ValueError: The precisions or devices differ, or the list is empty.
    """

    def __init__(self, parameters: Sequence[Tensor], gradients: bool = True) -> None:
        self.parameters = parameters
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(
                "Guide and model need parameters of one precision and device; got "
                f"{', '.join(sorted(f'{d} on {v}' for d, v in kinds)) or 'none at all'}."
            )
        vector = flatten_tensors(parameters)
        self.vector = nn.Parameter(vector)
        if gradients:
            self.vector.grad = torch.zeros_like(vector)
        start = 0
        for p in parameters:
            part = slice(start, start + p.numel())
            p.data = self.vector.data[part].view_as(p)
            if gradients:
                p.grad = self.gradient[part].view_as(p)
            start += p.numel()

    @property
    def gradient(self) -> Tensor:
        """The gradients of all parameters, (P)."""
        assert self.vector.grad is not None
        return self.vector.grad

    def zero(self) -> None:
        """Set the gradients to zero."""
        self.gradient.zero_()

    def copy(self) -> Tensor:
        """Copy of all parameters, (P)."""
        return self.vector.detach().clone()

    def set(self, values: Tensor) -> None:
        """Set all parameters from a vector, (P)."""
        with torch.no_grad():
            self.vector.copy_(values)

    def release(self) -> None:
        """Give every parameter its own memory again."""
        for p in self.parameters:
            p.data = p.data.clone()
            if self.vector.grad is not None:
                p.grad = None


def flatten_tensors(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate a copy of all parameters, (P)."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def assign_tensors(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Set parameters from a vector in place, without a change of their memory."""
    parts = vector.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))
