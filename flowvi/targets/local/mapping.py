"""A function of one row, applied to all rows and draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowvi.targets.recording.batched import Batched, silence_vmap_fallback


def mapped(
    function: Batched,
    z: Tensor,
    theta: Sequence[Tensor],
    own: Sequence[Tensor],
    rows: Sequence[Tensor],
) -> Any:
    """Evaluate a function of one row for samples S, values T of theta, and rows B.

    Args:
        function: Of z (D), theta (G), parameters, and one row's data.
        z: (S, T, B, D).
        theta: Nothing, or one tensor (T, G).
        own: Parameters, the same for all.
        rows: Data, each (B, *shape).

    Returns:
        A tree of (S, T, B, *shape).
    """
    point = function.point
    if function.how == "loop":
        return _looped(point, z, theta, own, rows)
    same = [None] * len(own)

    def call(z: Tensor, *inputs: Tensor) -> Any:
        return point(z, *inputs)

    by_row = torch.func.vmap(call, (0, *[None for _ in theta], *same, *[0 for _ in rows]))
    by_sample, by_theta = by_row, by_row
    rest = [None] * (len(theta) + len(own) + len(rows))
    # An axis of length one is not mapped: each level of vmap costs time at every operation.
    if len(z) > 1:
        by_sample = torch.func.vmap(by_row, (0, *rest))
    if z.shape[1] > 1:
        dims = (0 if len(z) == 1 else 1, *[0 for _ in theta], *rest[len(theta) :])
        by_theta = torch.func.vmap(by_sample, dims, out_dims=0 if len(z) == 1 else 1)
    else:
        by_theta = by_sample
    arguments = z if len(z) > 1 else z[0]
    shared = list(theta)
    if z.shape[1] == 1:
        arguments = arguments.squeeze(-3)
        shared = [t[0] for t in theta]
    with silence_vmap_fallback():
        out = by_theta(arguments, *shared, *own, *rows)
    lead = z.shape[:3]
    cut = arguments.dim() - 1

    def whole(t: Tensor) -> Tensor:
        return t.reshape(*lead, *t.shape[cut:])

    return tree_map(whole, out)


def _looped(
    point: Callable[..., Any],
    z: Tensor,
    theta: Sequence[Tensor],
    own: Sequence[Tensor],
    rows: Sequence[Tensor],
) -> Any:
    samples, thetas, count, _ = z.shape
    found = [
        point(z[s, t, b], *(x[t] for x in theta), *own, *(x[b] for x in rows))
        for s in range(samples)
        for t in range(thetas)
        for b in range(count)
    ]

    def whole(*leaves: Tensor) -> Tensor:
        return torch.stack(leaves).reshape(samples, thetas, count, *leaves[0].shape)

    return tree_map(whole, *found)
