"""Children's test scores on the mother's schooling, IQ and their interaction.

Gelman and Hill (2007), "Data Analysis Using Regression and Multilevel/Hierarchical Models",
section 3.3; posteriordb's kidiq-kidscore_interaction.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Design matrix (1, mom_hs, mom_iq, mom_hs * mom_iq), (434, 4), and scores, (434,)."""
    raw = json.loads(Path(path).read_text())
    hs, iq, score = (
        torch.tensor(raw[name], dtype=torch.float64) for name in ("mom_hs", "mom_iq", "kid_score")
    )
    return torch.stack([torch.ones_like(hs), hs, iq, hs * iq], dim=-1), score


def model(design: Tensor, score: Tensor) -> None:
    with pyro.plate("coefficient", design.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfCauchy(score.new_tensor(2.5)))
    with pyro.plate("child", len(score)):
        pyro.sample("kid_score", dist.Normal(design @ beta, sigma), obs=score)


coords = {"coefficient": ["intercept", "mom_hs", "mom_iq", "mom_hs:mom_iq"]}
