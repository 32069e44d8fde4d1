r"""Carry the score of a density through a bijection.

With y = f(x), J its Jacobian at x, and s the score :math:`\nabla \log q(x)`,

.. math:: \nabla \log q(y) = J^{-T} \big(s - \nabla_x \log|\det J|\big).

Path gradients need this score at the guide's own draws. Each function here
finds it in another way; none of them lets gradients reach parameters.

References:
    Vaitl, Nicoli, Nakajima and Kessel (2022), "Path-Gradient Estimators for
    Continuous Normalizing Flows", arXiv:2206.09016.
    Vaitl, Winkler, Richter and Kessel (2024), "Fast and unified path gradient
    estimators for normalizing flows", arXiv:2403.15881.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowvi.flows.autograd import gradient

if TYPE_CHECKING:
    from flowvi.flows.layer import Layer


def through_inverse(layer: Layer, y: Tensor, score: Tensor, context: Tensor | None) -> Tensor:
    """The score at y by differentiating the inverse; one inverse and its backward pass.

    Args:
        layer: The bijection.
        y: Its output, (..., D).
        score: Score at its input, (..., D).
        context: What the layer is conditioned on.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x, ladj = layer.inverse(y, _constant(context))
        (found,) = torch.autograd.grad((x * score).sum() + ladj.sum(), y)
    return found


def through_jacobian(layer: Layer, x: Tensor, score: Tensor, context: Tensor | None) -> Tensor:
    """The score at f(x) from the dense Jacobian; D backward passes in one batch, and a solve.

    Args:
        layer: The bijection; it needs no inverse.
        x: Its input, (..., D).
        score: Score at its input, (..., D).
        context: What the layer is conditioned on.
    """
    dim = x.shape[-1]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y, ladj = layer(x, _constant(context))
        unit = torch.eye(dim, dtype=y.dtype, device=y.device)
        units = unit.reshape(dim, *[1] * (y.dim() - 1), dim).expand(dim, *y.shape)
        (rows,) = torch.autograd.grad(y, x, units, retain_graph=True, is_grads_batched=True)
        rest = score - gradient(ladj, x)
    # rows[i] is the gradient of y_i, so J^T has it as its i-th column.
    transposed: Tensor = rows.movedim(0, -1)
    return torch.linalg.solve(transposed, rest)


def through_elementwise(x: Tensor, ladj: Tensor, score: Tensor) -> Tensor:
    """The score behind a map of single coordinates, from the graph of the forward pass.

    Args:
        x: Input, in the graph.
        ladj: Log slope of each coordinate, of the shape of x.
        score: Score at x.
    """
    return (score - gradient(ladj, x, retain=True)) * (-ladj.detach()).exp()


def _constant(context: Tensor | None) -> Tensor | None:
    return None if context is None else context.detach()
