"""Neal's funnel: nine normals whose common scale is a latent itself. No data; log evidence 0.

Neal (2003), "Slice sampling", Annals of Statistics 31, section 8.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch


def data() -> tuple[()]:
    """The model has no arguments."""
    return ()


def model() -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    with pyro.plate("axis", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def reference() -> dict[str, Any]:
    """Exact: a density with nothing observed integrates to one."""
    return {
        "log_evidence": 0.0,
        "mean": {"v": 0.0, "x": [0.0] * 9},
        "sd": {"v": 3.0, "x": [math.exp(9 / 4)] * 9},
    }
