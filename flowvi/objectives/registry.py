"""Objectives by name, and their descriptions."""

from __future__ import annotations

from collections.abc import Callable

from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.renyi_bound import Renyi, elbo, iwelbo, renyi
from flowvi.objectives.reweighted import WakeSleep, wake_sleep

OBJECTIVES: dict[str, Callable[..., Renyi | ForwardKL | WakeSleep]] = {
    "elbo": elbo,
    "forward_kl": ForwardKL,
    "iwelbo": iwelbo,
    "renyi": renyi,
    "wake_sleep": wake_sleep,
}

Objective = Renyi | ForwardKL


def describe_rows(objective: Renyi | WakeSleep) -> str:
    """Describe an objective by its name in the literature."""
    if isinstance(objective, WakeSleep):
        return f"reweighted wake-sleep (K = {objective.particles})"
    kind = "total" if objective.gradient == "total" else "STL" if objective.alpha == 1 else "DReG"
    name = {1.0: "ELBO", 0.0: "IW-ELBO"}.get(objective.alpha, f"Renyi bound {objective.alpha:g}")
    return f"{name} (K = {objective.particles}, {kind})"


def weighs(objective: Objective) -> bool:
    """Whether the objective has importance weights of the log density inside."""
    return isinstance(objective, Renyi) and objective.alpha < 1


def describe(objective: Objective) -> str:
    """Describe an objective by its name in the literature."""
    if isinstance(objective, ForwardKL):
        return f"forward KL ({len(objective.z)} draws)"
    if objective.alpha == 1.0:
        kind = "total" if objective.gradient == "total" else "STL"
        return f"ELBO ({kind})"
    name = "IW-ELBO" if objective.alpha == 0.0 else f"Renyi bound (alpha = {objective.alpha:g})"
    return f"{name} (K = {objective.particles}, {objective.gradient})"
