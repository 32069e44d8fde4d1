"""Fit from a normal that is known to be near, in place of a search for a start."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flowvi.draws.draws import Draws
from flowvi.fitting.fit_structured import fit_global
from flowvi.fitting.request import Request
from flowvi.fitting.result import Fit
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.runtime.clock import Clock
from flowvi.runtime.progress import showing
from flowvi.targets import GlobalTarget

# Effective draws for each latent from which the weighted moments are taken.
ENOUGH = 5
# Share of the plain variances that is added to the weighted ones.
RIDGE = 0.05
DEFAULTS: dict[str, Any] = {
    "guide": "auto",
    "objective": None,
    "steps": None,
    "lr": None,
    "particles": None,
    "restarts": 1,
    "seed": 0,
    "budget": None,
    "escalate": True,
    "compile": "auto",
    "progress": True,
    "callback": None,
    "epochs": None,
    "batch_size": None,
    "validation": None,
    "minibatch": None,
    "schedule": None,
    "checkpoint": None,
    "resume": False,
    "executor": None,
    "max_memory": None,
}


def fit_near(target: GlobalTarget, start: GaussianApproximation, **settings: Any) -> Fit:
    """Fit a target from a normal near its posterior; see `flowvi.fit` for the settings."""
    request = Request(target=target, **{**DEFAULTS, **settings}, near=start)
    with showing(target.name, request.progress, Clock(request.budget)):
        return fit_global(request)


def near(draws: Draws) -> GaussianApproximation:
    """A normal with the moments of draws: of weighted ones, where enough are effective."""
    z = draws.z.reshape(-1, draws.z.shape[-1])
    log_w = draws.log_weights.reshape(-1)
    plain = np.full(len(z), 1 / len(z))
    weights = plain
    if np.isfinite(log_w).any():
        w = np.exp(log_w - log_w.max())
        # Truncation: no draw weighs more than sqrt(S) average ones.
        w = np.minimum(w, w.mean() * np.sqrt(len(w)))
        w /= w.sum()
        if 1 / (w**2).sum() > ENOUGH * z.shape[1]:
            weights = w
    loc = weights @ z
    covariance = (weights[:, None] * (z - loc)).T @ (z - loc)
    covariance += np.diag(RIDGE * z.var(0) + 1e-12)
    scale = np.linalg.cholesky(covariance)
    return GaussianApproximation(torch.as_tensor(loc), torch.as_tensor(scale), "draws of a guide")
