r"""An affine coupling, its score and its gradient, written out: what most steps of most fits are.

The layer moves b as a network of a says, and a stays. With the network's hidden units h and m
before their SiLU, written :math:`\sigma`,

.. math::
    h = W_1 a + b_1 + c, \quad m = W_2 \sigma(h) + b_2, \quad
    (\mu, r) = W_3 \sigma(m) + b_3, \quad s = 3 \tanh(r / 3), \quad y = b \, e^s + \mu,

and :math:`\log|\det| = \sum s`. Autograd takes the network apart twice for a path gradient,
once for the score and once on the way back. Here both share the derivatives
:math:`\sigma'(h)`, :math:`\sigma'(m)` and :math:`s'(r)`: fewer operations to run, to record and to
compile. The values are those of `Coupling.forward`, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from flowvi.flows.elementwise import BOUND
from flowvi.flows.nets import Perceptron


def push_affine(
    net: Perceptron,
    halves: tuple[Tensor, Tensor],
    scores: tuple[Tensor, Tensor],
    context: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Move b as a network of a says, and carry the score along.

    Args:
        net: From a, (..., A), and a context to shifts and raw log-scales of b, (..., 2 B).
        halves: a and b, (..., A) and (..., B).
        scores: Gradient of a log density at both.
        context: What the network is conditioned on.

    Returns:
        y (..., B), the log determinant (...), and the scores at a and y, which are constants.
    """
    layers = (net.first, net.middle, net.last)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    y, ladj, *pulled = _Push.apply(*halves, *scores, net.lifted(context), *parameters)
    return y, ladj, (pulled[0], pulled[1])


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        a, b, score_a, score_b, lifted, w1, b1, w2, b2, w3, b3 = given
        h = linear(a, w1, b1)
        u, du = _silu(h if lifted is None else h + lifted)
        v, dv = _silu(linear(u, w2, b2))
        shift, raw = linear(v, w3, b3).chunk(2, dim=-1)
        t = torch.tanh(raw * (1 / BOUND))
        s = BOUND * t
        ds, scale = torch.addcmul(t.new_ones(()), t, t, value=-1), s.exp()
        scaled = b * scale
        # The gradient of log|det| + score_y . y by a, with y's score a constant.
        score_y = score_b / scale
        g = torch.cat([score_y, torch.addcmul(ds, score_y * scaled, ds)], dim=-1)
        g = (g @ w3).mul_(dv) @ w2
        score_a = score_a - g.mul_(du) @ w1
        ctx.lifted = None if lifted is None else lifted.shape
        ctx.save_for_backward(a, u, du, v, dv, ds, scale, scaled, w1, w2, w3)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(score_a, score_y)
        return torch.addcmul(shift, b, scale), s.sum(-1), score_a, score_y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_y: Tensor | None, by_ladj: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        a, u, du, v, dv, ds, scale, scaled, w1, w2, w3 = ctx.saved_tensors
        by_y = torch.zeros_like(scale) if by_y is None else by_y
        by_s = by_y * scaled
        if by_ladj is not None:
            by_s = by_s + by_ladj.unsqueeze(-1)
        out = torch.cat([by_y, by_s * ds], dim=-1)
        m = (out @ w3).mul_(dv)
        h = (m @ w2).mul_(du)
        by_lifted = None if ctx.lifted is None else h.sum_to_size(ctx.lifted)
        by_layers = [*_by_linear(h, a), *_by_linear(m, u), *_by_linear(out, v)]
        return h @ w1, by_y * scale, None, None, by_lifted, *by_layers


def _by_linear(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias of a linear map, of that by its output, at an input x."""
    gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return gradient.t() @ x, gradient.sum(0)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative."""
    return torch.ops.aten.silu(x), torch.ops.aten.silu_backward(x.new_ones(()), x)
