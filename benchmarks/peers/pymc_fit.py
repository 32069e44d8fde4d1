"""PyMC's ADVI with its defaults: one draw a step, windowed Adagrad of step 1e-3.

PyTensor keeps its compiled code on disk; the table counts a fit's seconds with
the code at hand, as `side_by_side.py` runs each posterior once before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pymc as pm
from torch import Tensor

from .budget import DRAWS, Budget, Fitted
from .pymc_models import MODELS
from .pymc_series import MODELS as SERIES

# More than PyMC takes in a second; memory for all losses is taken at once.
FASTEST = 20_000
LAST = 1000


def fit(
    kind: str, name: str, args: tuple[Tensor, ...], wanted: set[str], budget: Budget, seed: int
) -> Fitted:
    """Train `advi` or `fullrank_advi` until the budget is spent."""

    def stop(approximation: Any, losses: Any, step: int) -> None:
        if budget.over():
            raise StopIteration

    with pm.Model():
        (MODELS | SERIES)[name](*(tensor.numpy() for tensor in args))
        approximation = pm.fit(
            n=FASTEST * math.ceil(budget.seconds + 1),
            method=kind,
            callbacks=[stop],
            progressbar=False,
            random_seed=seed,
        )
        trace = approximation.sample(DRAWS, random_seed=seed, return_inferencedata=False)
    values = {name: np.asarray(trace[name]) for name in trace.varnames}
    losses = approximation.hist
    return Fitted(values, -float(np.mean(losses[-LAST:])), len(losses))
