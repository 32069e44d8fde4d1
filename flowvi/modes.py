"""More starts where the first have shown several modes, until hardly any could be new."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.coverage import SHARE
from flowvi.gaussians import Gaussian, distinct, near, refine, score
from flowvi.init import JUDGE_DRAWS, LARGE, TRY_ROUNDS, ascend, laplace
from flowvi.symmetry import images, symmetries
from flowvi.target import Target

# Starts after the first.
FEWEST, MOST = 8, 40
# Of more modes nothing is made.
ENOUGH = 13
# Chance that the next start leads to a mode that none has led to, below which it is enough.
UNSEEN = 0.05


def further_modes(
    target: Target,
    known: Sequence[Gaussian],
    places: Tensor,
    seed: int,
    say: Callable[[str], None],
    over: Callable[[], bool] = lambda: False,
) -> list[Gaussian]:
    r"""Normals at modes that the first starts have not led to.

    Nothing is done where they led to one mode alone. Otherwise ascents go on from
    other places, draws from the prior where there are any, until

    .. math:: n_1 / n < 0.05

    of n ascents have ended in a mode that none other has: the Good-Turing estimate of the
    chance that the next one ends in a mode not seen yet.

    Args:
        target: The log density.
        known: The best Gaussian and what became of other starts.
        places: Points to start from, (N, D).
        seed: Of the draws.
        say: Takes a sentence about what was found.
        over: Asked now and then whether to make do with what there is.

    References:
        Good (1953), "The population frequencies of species and the estimation of
        population parameters", Biometrika 40.
    """
    best = max(g.elbo for g in known)
    # Small ones may be many: what counts together counts.
    modes = [g for g in distinct(known, len(known)) if g.elbo > best + math.log(SHARE)]
    if target.dim > LARGE:
        return []
    found = symmetries(target, places)
    for symmetry in found:
        say(f"the density stays the same: {symmetry.words}")
    mirrored = [z for g in modes for z in images(target, found, g.loc)][:MOST]
    if len(modes) < 2 and not mirrored:
        return []
    generator = torch.Generator(device=target.device).manual_seed(seed)
    shape = (JUDGE_DRAWS, target.dim)
    judge = torch.randn(shape, generator=generator, dtype=target.dtype, device=target.device)
    first, hits = len(modes), [0] * len(modes)
    for i, start in enumerate([*mirrored, *places[:MOST]]):
        others = max(i - len(mirrored), 0)
        if i >= len(mirrored) and len(modes) < 2:
            break
        if over() or len(modes) >= ENOUGH or (others >= FEWEST and hits.count(1) < UNSEEN * others):
            break
        end = ascend(target, start)[-1]
        where = _first(near(replace(g, loc=end), g) for g in modes)
        if where is None:
            new = score(target, laplace(target, end, f"Laplace at further mode {i}"), judge)
            new = refine(target, new, generator, judge, False, TRY_ROUNDS)
            where = _first(near(new, g) for g in modes)
        if where is None:
            where = len(modes)
            modes.append(new)
            hits.append(0)
        hits[where] += 1
    ascents = sum(hits)
    others = len(modes) - first
    say(f"{first} candidates for modes at first; {ascents} more starts led to {others} others")
    return modes[first:]


def _first(found: Iterable[bool]) -> int | None:
    return next((i for i, yes in enumerate(found) if yes), None)
