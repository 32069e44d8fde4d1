"""Tests of how a density treats the rows of its data: their order, their number, their lags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets import GlobalTarget, ModelError
from flowvi.targets.pyro.from_pyro import replicable_runner
from flowvi.targets.recording.capture import agree

if TYPE_CHECKING:
    from flowvi.amortized.problem import Problem


def permutes(problem: Problem, with_latents: bool) -> bool:
    """Whether another order of the rows leaves the density unchanged.

    Args:
        problem: The model, captured.
        with_latents: Whether latents of the rows are reordered with them.
    """
    if not problem.plate or problem.size < 2:
        return False
    target = problem.target_of(problem.size)
    like = {name: problem.leaves[name] for name in problem.varying}
    z, data = target.joint(2, 1)
    order = torch.arange(problem.size).roll(1)
    for i in range(len(z)):
        held = {site: value[i] for site, value in data.items()}
        other = {n: t[order] if n in problem.by_row else t for n, t in (held | like).items()}
        point, moved_point = z[i], z[i]
        if with_latents:
            moved_point = _reordered(problem, target, z[i], order)
        one = target.observing(held, like).plain(point)
        two = target.observing({n: other[n] for n in held}, {n: other[n] for n in like}).plain(
            moved_point
        )
        if not agree((one,), (two,)):
            return False
    return True


def _reordered(problem: Problem, target: GlobalTarget, z: Tensor, order: Tensor) -> Tensor:
    values = {name: target.constrain(z)[name] for name in target.sites}
    for name in target.sites:
        for axis, dim in enumerate(target.dims[name]):
            if dim == problem.plate:
                values[name] = values[name].index_select(axis, order)
    return target.unconstrain(values)


def is_part(problem: Problem, least: int, most: int) -> bool:
    """Whether the first rows of a data set are one of so many rows."""
    large, small = problem.target_of(most), problem.target_of(least)
    likelihood = large._functions.likelihood
    if likelihood is None:
        return False
    leaves = {n: problem.leaves[n][torch.arange(most) % problem.size] for n in problem.varying}
    with isolated_rng(0):
        z, data = large.joint(1, 2, {n: t[None] for n, t in leaves.items()})
    held = {site: value[0] for site, value in data.items()}
    whole = large.observing(held, leaves)
    rest = sum(v.reshape(1, most, -1)[:, least:].sum() for v in whole.log_likelihood(z).values())
    part = small.observing(
        {n: t[:least] for n, t in held.items()}, {n: t[:least] for n, t in leaves.items()}
    )
    return agree((whole.log_prob(z) - rest,), (part.log_prob(z),))


def check_lags(problem: Problem) -> None:
    """Refuse a model whose observed arguments enter its density elsewhere as well."""
    others = {name: moved(problem.leaves[name]) for name in problem.data_leaves}
    if not others:
        return
    try:
        target = replicable_runner(problem.runner, others)
    except ModelError:
        return
    own = {name: problem.leaves[name] for name in others}
    for name, value in others.items():
        z = target._trial.points[:1]
        one = target.observing(problem.target.observed, own).plain(z)
        two = target.observing(problem.target.observed, own | {name: value}).plain(z)
        if not agree((one,), (two,)):
            raise ModelError(
                f"Argument '{name}' is observed, and enters the density elsewhere too, as a "
                "lagged value or a scale: data that the model simulates would not follow it. "
                "Write each value as a site that depends on the site before it."
            )


def moved(leaf: Tensor) -> Tensor:
    """Other values of an argument, of its shape and type."""
    if leaf.is_floating_point():
        return leaf.nan_to_num() * 1.25 + 0.125
    rolled = leaf.roll(1, 0) if leaf.dim() else leaf
    if not torch.equal(rolled, leaf):
        return rolled
    return ~leaf if leaf.dtype == torch.bool else leaf + 1
