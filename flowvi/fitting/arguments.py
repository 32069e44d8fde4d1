"""What a user asks of a fit, checked and completed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.registry import OBJECTIVES, Objective, describe
from flowvi.objectives.renyi_bound import Renyi, elbo
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime.arguments import known, wanted
from flowvi.targets import Target
from flowvi.training.evaluation import particles_of
from flowvi.training.minibatch import Minibatch

PARTICLES = 64


def refuse(why: str, given: Mapping[str, Any]) -> None:
    """Refuse settings of the other kind of fit."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"The target {why}: {name} has no meaning for it; got {value}.")


def minibatch_of(minibatch: Minibatch | None, **beside: Any) -> Minibatch:
    """Settings with what was given beside them."""
    if minibatch is not None:
        wanted("minibatch", minibatch, Minibatch, "such as Minibatch(epochs=40)")
    return replace(minibatch or Minibatch(), **{k: v for k, v in beside.items() if v is not None})


def objective_of(objective: Objective | WakeSleep | str | None, particles: int | None) -> Objective:
    """The objective that is asked for, by name or as one."""
    if objective is None:
        return elbo(PARTICLES if particles is None else particles)
    if isinstance(objective, str):
        known("objective", objective, OBJECTIVES)
        if objective == "forward_kl":
            raise ValueError(
                "forward_kl needs draws to fit to: pass objective=OBJECTIVES['forward_kl'](z)."
            )
        objective = OBJECTIVES[objective]()
    if isinstance(objective, WakeSleep):
        raise ValueError(
            "wake_sleep is for latents of rows (local=); for others use elbo() or iwelbo(16)."
        )
    return objective


def repeats_of(objective: Objective, particles: int | None) -> int:
    """Estimates of the objective a step."""
    return max(1, (particles or PARTICLES) // particles_of(objective))


def check(
    target: Target,
    objective: Objective,
    restarts: int,
) -> None:
    """Refuse what a target of global latents cannot be fitted by."""
    if restarts > 1 and list(target.parameters()):
        raise ValueError(
            f"{target.name} has parameters of its own, which every restart would train anew: "
            f"restarts must be 1, got {restarts}. Capture the model once for each fit instead."
        )
    if not isinstance(objective, Renyi | ForwardKL):
        raise ValueError(
            f"objective must be one such as elbo() or iwelbo(16); got {type(objective).__name__}."
        )
    if target.subsampled and isinstance(objective, Renyi) and objective.alpha < 1:
        plate = next(iter(target.subsampled))
        raise ValueError(
            f"{describe(objective)} over global latents needs every row in each weight, but plate "
            f"'{plate}' is subsampled: it would not be a bound. Use the ELBO, or the full plate."
        )
