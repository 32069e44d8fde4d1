"""Gradients inside a graph that is differentiated itself."""

from __future__ import annotations

import torch
from torch import Tensor


def in_graph(x: Tensor) -> Tensor:
    """The same values, with a graph to go back through."""
    return x if x.requires_grad else x.detach().requires_grad_()


def gradient(value: Tensor, x: Tensor, retain: bool = False) -> Tensor:
    """Gradient of the sum of a value, zero where it does not depend on x."""
    return gradients(value, (x,), retain)[0]


def gradients(value: Tensor, leaves: tuple[Tensor, ...], retain: bool = False) -> list[Tensor]:
    """Gradients of the sum of a value, zero where it does not depend on a leaf."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(value.sum(), leaves, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
