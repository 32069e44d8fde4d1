"""Parameters in one vector, and in one precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn


class Finest:
    """Parameters as an optimiser sees them: all in the finest precision among them.

    A parameter of that precision stands for itself. A coarser one is led by a tensor in the
    finest, which the optimiser changes, and follows it rounded: small steps add up, and
    the parameter keeps the precision that its owner gave it.

    Args:
        parameters: Of any precisions.

    Attributes:
        tensors: One for each of them, in their order, in one precision.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        finest = reduce(torch.promote_types, {p.dtype for p in parameters}, torch.bfloat16)
        self.tensors = [p if p.dtype == finest else p.detach().to(finest) for p in parameters]
        pairs = zip(parameters, self.tensors, strict=True)
        self._led = [(p, leader) for p, leader in pairs if p is not leader]

    @torch.no_grad()
    def follow(self) -> None:
        """Give the coarser parameters the values of what leads them."""
        if self._led:
            parameters, leaders = zip(*self._led, strict=True)
            torch._foreach_copy_(list(parameters), list(leaders))

    def gather(self) -> None:
        """Move the gradients of coarser parameters to what leads them."""
        for p, leader in self._led:
            if p.grad is not None and leader.grad is not None:
                leader.grad.copy_(p.grad)
            p.grad = None


class Flat:
    """Parameters as stretches of one vector, and their gradients likewise.

    One vector takes one call of the optimiser, whatever the number of parameters.

    Args:
        parameters: Of one precision.
        gradients: Whether their `grad` is to be a stretch of one vector too.

    Raises:
        ValueError: They are of several, or there are none.
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
        """Forget the gradients."""
        self.gradient.zero_()

    def copy(self) -> Tensor:
        """The values of all parameters."""
        return self.vector.detach().clone()

    def set(self, values: Tensor) -> None:
        """Give all parameters other values."""
        with torch.no_grad():
            self.vector.copy_(values)

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for p in self.parameters:
            p.data = p.data.clone()
            if self.vector.grad is not None:
                p.grad = None


def flatten_tensors(parameters: Sequence[Tensor]) -> Tensor:
    """The values of parameters one after the other, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def assign_tensors(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Give parameters the values of a vector; their memory stays where it is."""
    parts = vector.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))
