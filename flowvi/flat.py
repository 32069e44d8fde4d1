"""Parameters in one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
        vector = vector_of(parameters)
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


def vector_of(parameters: Sequence[Tensor]) -> Tensor:
    """The values of parameters one after the other, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def give(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Give parameters the values of a vector; their memory stays where it is."""
    parts = vector.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))
