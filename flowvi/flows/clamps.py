"""Smooth bounds on the scales of a layer."""

import math

import torch
from torch import Tensor

# An unbounded log-scale overflows in the first steps of a bad fit.
BOUND = 3.0


def tanh_clamp(s: Tensor) -> Tensor:
    r"""Bound a log-scale symmetrically, :math:`|c(s)| < 3`."""
    return BOUND * torch.tanh(s * (1 / BOUND))


def asymmetric_clamp(s: Tensor) -> Tensor:
    r"""Let a log-scale shrink by up to 2 and grow by no more than 0.1.

    .. math:: c(s) = \frac{2 a}{\pi} \arctan\frac{s}{a}, \qquad a = 2 \;(s < 0),\; 0.1 \;(s \ge 0)

    Many layers then cannot blow up a sample, however deep the flow.

    References:
        Andrade (2024), "Stable Training of Normalizing Flows for
        High-dimensional Variational Inference", arXiv:2402.16408.
    """
    a = torch.where(s < 0, 2.0, 0.1).to(s.dtype)
    return (2 / math.pi) * a * torch.atan(s / a)
