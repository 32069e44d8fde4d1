"""Bounds and their gradients. `OBJECTIVES` maps a name to a builder."""

from flowvi.objectives.estimate import Estimate, Gradient
from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.registry import OBJECTIVES
from flowvi.objectives.renyi_bound import Renyi, elbo, iwelbo, renyi
from flowvi.objectives.reweighted import WakeSleep, wake_sleep

__all__ = [
    "OBJECTIVES",
    "Estimate",
    "ForwardKL",
    "Gradient",
    "Renyi",
    "WakeSleep",
    "elbo",
    "iwelbo",
    "renyi",
    "wake_sleep",
]
