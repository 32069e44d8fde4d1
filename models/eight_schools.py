"""Eight schools: partial pooling of eight coaching effects, non-centred.

Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational Statistics 6.
Priors of posteriordb's eight_schools_noncentered.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SCHOOLS = ["A", "B", "C", "D", "E", "F", "G", "H"]


def data() -> tuple[Tensor, Tensor]:
    """Estimated effects and their standard errors, each (8,)."""
    effect = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    error = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    return effect, error


def model(effect: Tensor, error: Tensor) -> None:
    zero = effect.new_zeros(())  # priors take their precision from the data
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("school", len(effect)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(zero, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, error), obs=effect)


coords = {"school": SCHOOLS}


def reference() -> dict[str, Any]:
    """Evidence and moments, by quadrature over tau with all else integrated in closed form."""
    theta_mean = [6.211884, 4.940178, 3.927004, 4.757098, 3.615477, 4.042613, 6.296724, 4.854253]
    theta_sd = [5.593126, 4.674268, 5.262615, 4.780297, 4.657453, 4.826866, 5.077849, 5.290801]
    return {
        "log_evidence": -31.311347,
        "mean": {"mu": 4.396821, "tau": 3.597705, "theta": theta_mean},
        "sd": {"mu": 3.317704, "tau": 3.219958, "theta": theta_sd},
    }
