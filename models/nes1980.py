"""Party identification in 1980, a regression with flat priors.

Gelman and Hill (2007), "Data Analysis Using Regression and Multilevel/Hierarchical Models",
section 4.7; posteriordb's nes1980-nes.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Design matrix, (701, 9), and party identification from 1 to 7, (701,)."""
    raw = json.loads(Path(path).read_text())
    columns = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in raw.items()
        if name != "N"
    }
    age = columns["age_discrete"]
    predictors = [
        torch.ones_like(age),
        columns["real_ideo"],
        columns["race_adj"],
        *((age == level).to(age) for level in (2, 3, 4)),
        columns["educ1"],
        columns["gender"],
        columns["income"],
    ]
    return torch.stack(predictors, dim=-1), columns["partyid7"]


def model(design: Tensor, partyid: Tensor) -> None:
    with pyro.plate("coefficient", design.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("respondent", len(partyid)):
        pyro.sample("partyid7", dist.Normal(design @ beta, sigma), obs=partyid)


coords = {
    "coefficient": [
        "intercept",
        "real_ideo",
        "race_adj",
        "age 2",
        "age 3",
        "age 4",
        "educ1",
        "gender",
        "income",
    ]
}
