r"""Affine couplings with their scores and gradients written out, for speed.

A coupling maps b with parameters from a network of a. With the network's hidden units h and m
before their SiLU, written :math:`\sigma`,

.. math::
    h = W_1 a + b_1 + c, \quad m = W_2 \sigma(h) + b_2, \quad
    (\mu, r) = W_3 \sigma(m) + b_3, \quad s = 3 \tanh(r / 3), \quad y = b \, e^s + \mu,

and :math:`\log|\det| = \sum s`. Autograd takes the network apart twice for a path gradient,
once for the score and once on the way back. Here both share the derivatives
:math:`\sigma'(h)`, :math:`\sigma'(m)` and :math:`s'(r)`: fewer operations to run, to record and to
compile. Couplings and the orders between them are one operation for autograd, whose own work
on each would be a quarter of a step of 64 draws. The values are those of `Coupling.forward`, to
the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from flowvi.flows.clamps import BOUND
from flowvi.flows.nets import Perceptron


class Order(NamedTuple):
    """Coordinates in another order, and the one that puts them back, (D) each."""

    there: Tensor
    back: Tensor


class Halves(NamedTuple):
    """The sizes of the halves of a vector, and whether the first one moves."""

    sizes: list[int]
    swap: bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The half that stays, and the half that is mapped."""
        first, second = x.split(self.sizes, dim=-1)
        return (second, first) if self.swap else (first, second)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Both in their places again."""
        return torch.cat([b, a] if self.swap else [a, b], dim=-1)


class Move(NamedTuple):
    """An affine coupling: the halves, and how one moves."""

    halves: Halves
    net: Perceptron


class Series(NamedTuple):
    """Plans one after the other."""

    plans: tuple[Plan, ...]


Plan = Order | Move | Series


def push(
    plan: Plan, x: Tensor, score: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the layers of a plan to points and their score, as `Layer.push` does.

    Args:
        plan: Couplings and orders.
        x: Points, (..., D).
        score: Gradient of a log density there, (..., D).
        context: Context of the networks.
    """
    given: list[Tensor | None] = []
    for move in _leaves(plan):
        if isinstance(move, Move):
            net = move.net
            given.append(net.lifted(context))
            given += [p for f in (net.first, net.middle, net.last) for p in (f.weight, f.bias)]
    y, ladj, score = _Push.apply(plan, x, score, *given)
    return y, ladj, score


# Input tensors of each coupling: the term of the context, three weights and three biases.
EACH = 7
# Tensors of each coupling that the backward pass needs.
KEPT = 8


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, score: Tensor, *given: Any) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        y, ladj, score = _forward(plan, x, score, iter(given), kept)
        ctx.plan, ctx.joint_density = plan, [None if c is None else c.shape for c in given[::EACH]]
        weights = [given[i + j] for i in range(0, len(given), EACH) for j in (1, 3, 5)]
        ctx.save_for_backward(*kept, *weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(score)
        return y, x.new_zeros(x.shape[:-1]) if ladj is None else ladj, score

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_y: Tensor | None, by_ladj: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        count = len(ctx.joint_density)
        kept, weights = ctx.saved_tensors[: KEPT * count], ctx.saved_tensors[KEPT * count :]
        each: list[list[Tensor | None]] = []
        for plan in reversed(list(_leaves(ctx.plan))):
            if isinstance(plan, Order):
                by_y = None if by_y is None else by_y.index_select(-1, plan.back)
                continue
            i = count - 1 - len(each)
            here, w = kept[KEPT * i : KEPT * (i + 1)], weights[3 * i : 3 * (i + 1)]
            by_y, found = _backward(plan.halves, by_y, by_ladj, here, w, ctx.joint_density[i])
            each.append(found)
        return None, by_y, None, *(g for found in reversed(each) for g in found)


def _leaves(plan: Plan) -> Iterator[Order | Move]:
    if isinstance(plan, Series):
        for part in plan.plans:
            yield from _leaves(part)
    else:
        yield plan


def _forward(
    plan: Plan, x: Tensor, score: Tensor, given: Iterator[Any], kept: list[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Points, log determinants (None for zero) and scores behind a plan."""
    if isinstance(plan, Order):
        return x.index_select(-1, plan.there), None, score.index_select(-1, plan.there)
    if isinstance(plan, Series):
        ladjs = []
        for part in plan.plans:
            x, ladj, score = _forward(part, x, score, given, kept)
            if ladj is not None:
                ladjs.append(ladj)
        # Sum in the order of `Chain.forward`, for bitwise equal results.
        return x, reduce(torch.add, ladjs) if ladjs else None, score
    lifted, w1, b1, w2, b2, w3, b3 = (next(given) for _ in range(EACH))
    halves = plan.halves
    (a, b), (score_a, score_b) = halves.split(x), halves.split(score)
    h = linear(a, w1, b1)
    u, du = _silu(h if lifted is None else h + lifted)
    v, dv = _silu(linear(u, w2, b2))
    shift, raw = linear(v, w3, b3).chunk(2, dim=-1)
    t = torch.tanh(raw * (1 / BOUND))
    s = BOUND * t
    ds, scale = torch.addcmul(t.new_ones(()), t, t, value=-1), s.exp()
    scaled = b * scale
    # Gradient of log|det| + score_y . y with respect to a; score_y is constant.
    score_y = score_b / scale
    g = torch.cat([score_y, torch.addcmul(ds, score_y * scaled, ds)], dim=-1)
    g = (g @ w3).mul_(dv) @ w2
    score_a = score_a - g.mul_(du) @ w1
    kept += (a, u, du, v, dv, ds, scale, scaled)
    y = torch.addcmul(shift, b, scale)
    return halves.join(a, y), s.sum(-1), halves.join(score_a, score_y)


def _backward(
    halves: Halves,
    by_y: Tensor | None,
    by_ladj: Tensor | None,
    kept: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    lifted: torch.Size | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients with respect to the inputs, and to the seven tensors of the coupling."""
    (a, u, du, v, dv, ds, scale, scaled), (w1, w2, w3) = kept, weights
    zeros = torch.zeros_like
    by_a, by_b = (zeros(a), zeros(scale)) if by_y is None else halves.split(by_y)
    by_s = by_b * scaled
    if by_ladj is not None:
        by_s = by_s + by_ladj.unsqueeze(-1)
    out = torch.cat([by_b, by_s.mul_(ds)], dim=-1)
    m = (out @ w3).mul_(dv)
    h = (m @ w2).mul_(du)
    by_lifted = None if lifted is None else h.sum_to_size(lifted)
    by_layers = [*_by_linear(h, a), *_by_linear(m, u), *_by_linear(out, v)]
    return halves.join(by_a + h @ w1, by_b * scale), [by_lifted, *by_layers]


def _by_linear(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias of a linear map, of that by its output, at an input x."""
    gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return gradient.t() @ x, gradient.sum(0)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative."""
    return torch.ops.aten.silu(x), torch.ops.aten.silu_backward(x.new_ones(()), x)
