"""Evaluate a guide on fresh draws, and find the best of several."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from flowvi.diagnostics import MIN_DRAWS, gap, psis
from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.estimate import Estimate
from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.registry import Objective
from flowvi.objectives.renyi_bound import Renyi
from flowvi.training.records import Evaluation

# Gaps below this are known better than bounds.
NARROW = 0.1


def evaluate(
    objective: Objective, log_p: LogDensity, guide: Guide, seed: int, draws: int, at_once: int
) -> Evaluation:
    """Bound and gap on fresh draws; random numbers go on as if none had been taken.

    Args:
        objective: Whose bound it is.
        log_p: The log density, (*S, D) -> (*S).
        guide: The guide.
        seed: Of the draws.
        draws: How many.
        at_once: How many the guide makes at a time.
    """
    inner = particles_of(objective)
    size, left = max(1, at_once // inner), max(1, draws // inner)
    bounds, log_w = [], []
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    with torch.no_grad():
        while left > 0:
            now = min(size, left)
            found = estimate(objective, log_p, guide, now)
            bounds.append(found.bound.reshape(-1))
            log_w.append(found.log_w.reshape(-1))
            left -= now
    torch.set_rng_state(state)
    weights = torch.cat(log_w).cpu().double().numpy()
    known = isinstance(objective, Renyi) and np.isfinite(weights).all()
    values = torch.cat(bounds).double()
    bound = float(values.mean())
    return Evaluation(
        # Infinite densities are the rounding of draws far out.
        bound if math.isfinite(bound) else -math.inf,
        float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf,
        gap(weights).value if known else math.nan,
        psis(weights).khat if known and len(weights) >= MIN_DRAWS else math.nan,
    )


def best_of(found: Mapping[str, Evaluation]) -> str:
    """The name of the best: by the bound and, where noise hides a difference, by the gap.

    Near the target the gap has far less noise than the bound. Alone it would favour a
    guide that has left a part of the target.
    """
    finite = {name: j for name, j in found.items() if math.isfinite(j.bound)}
    if not finite:
        return next(iter(found))
    top = max(finite.values(), key=lambda j: j.bound)
    close = {
        name: j.gap
        for name, j in finite.items()
        if j.bound >= top.bound - 4 * math.hypot(j.se, top.se) and math.isfinite(j.gap)
    }
    if close and max(close.values()) < NARROW:
        return min(close, key=lambda name: close[name])
    return max(finite, key=lambda name: finite[name].bound)


def particles_of(objective: Objective) -> int:
    """Draws inside one estimate that the guide makes."""
    return objective.particles if isinstance(objective, Renyi) else 1


def estimate(objective: Objective, log_p: LogDensity, guide: Guide, repeats: int) -> Estimate:
    """Evaluate any objective, with `repeats` independent estimates where it makes its own draws."""
    if isinstance(objective, ForwardKL):
        return objective(log_p, guide)
    return objective(log_p, guide, repeats=(repeats,))
