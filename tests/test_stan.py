"""A program of Stan, compiled by PyStan, is fitted as the page says."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowvi

stan = pytest.importorskip("stan", reason="PyStan, which compiles programs of Stan, is not there")
REPOSITORY = Path(__file__).parents[1]
# What PyStan does inside is not the test's affair.
pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use web.AppKey", "ignore::DeprecationWarning"
)

SCHOOLS = """
data { int<lower=0> J; array[J] real y; array[J] real<lower=0> sigma; }
parameters { real mu; real<lower=0> tau; vector[J] trans; }
transformed parameters { vector[J] theta = mu + tau * trans; }
model {
  target += normal_lpdf(mu | 0, 5);
  target += cauchy_lpdf(tau | 0, 5) - cauchy_lccdf(0 | 0, 5);
  target += std_normal_lpdf(trans);
  target += normal_lpdf(y | theta, sigma);
}
"""
DATA = {
    "J": 8,
    "y": [28, 8, -3, 7, -1, 1, 18, 12],
    "sigma": [15, 10, 16, 11, 9, 11, 10, 18],
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the blocks of the page define, but for the calls at their ends."""
    blocks = re.findall(
        r"```py(?:thon)?\n(.*?)```", (REPOSITORY / "docs/stan.md").read_text(), re.S
    )
    names: dict[str, Any] = {}
    for block in blocks:
        if "class " in block:
            exec(block, names)
    return names


@pytest.fixture(scope="module")
def posterior() -> Any:
    return stan.build(SCHOOLS, data=DATA, random_seed=1)


def test_eight_schools_in_stan_have_their_evidence_and_means(page, posterior):
    known = runpy.run_path(str(REPOSITORY / "models/eight_schools.py"))["reference"]()

    draws = flowvi.fit(page["target_of"](posterior, 10), progress=False, budget=120.0).draw(4000)

    found = flowvi.diagnose(draws)
    assert found.verdict != "do not trust"
    assert abs(found.log_evidence - known["log_evidence"]) < 4 * found.log_evidence_se + 0.005
    kept = flowvi.resample(draws)
    values = page["constrained"](posterior, kept)
    for name in ("mu", "tau"):
        error = known["sd"][name] / np.sqrt(found.ess)
        assert abs(values[name].mean() - known["mean"][name]) < 4 * error
