"""Evaluate a guide on fresh draws, and select the best of several guides."""

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

# Below this value a gap has a smaller error than a bound.
NARROW = 0.1


def evaluate(
    objective: Objective, log_p: LogDensity, guide: Guide, seed: int, draws: int, at_once: int
) -> Evaluation:
    """Estimate bound and gap from fresh draws, without a change to the global random state.

    Args:
        objective: The objective that defines the bound.
        log_p: The log density, (*S, D) -> (*S).
        guide: The guide.
        seed: Seed of the draws.
        draws: Number of draws.
        at_once: Number of draws that the guide makes in one call.
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
        # A density becomes infinite by rounding at draws far from the mode.
        bound if math.isfinite(bound) else -math.inf,
        float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf,
        gap(weights).value if known else math.nan,
        psis(weights).khat if known and len(weights) >= MIN_DRAWS else math.nan,
    )


def best_of(found: Mapping[str, Evaluation]) -> str:
    """Return the name of the best guide: by the bound, and by the gap where bounds are too noisy.

    Near the target the gap has far less noise than the bound. Alone it would favour a
    guide that misses a part of the target.
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
    """Number of the guide's draws inside one estimate."""
    return objective.particles if isinstance(objective, Renyi) else 1


def estimate(objective: Objective, log_p: LogDensity, guide: Guide, repeats: int) -> Estimate:
    """Evaluate an objective; `repeats` independent estimates if it samples from the guide."""
    if isinstance(objective, ForwardKL):
        return objective(log_p, guide)
    return objective(log_p, guide, repeats=(repeats,))
