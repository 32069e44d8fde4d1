"""A fit that has found one point of positive density ends in a result."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from quick import quick

import flowvi
from flowvi.initialization import candidates
from flowvi.initialization.gaussian import GaussianApproximation, with_elbo
from flowvi.initialization.preflight import preflight


def tables():
    """A variance with a prior so wide that its density overflows among the prior's draws."""
    sigma = pyro.sample("sigma", dist.InverseGamma(torch.tensor(0.001), torch.tensor(0.001)))
    with pyro.plate("table", 4):
        mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        seen = torch.tensor([3.0, 4.0, 6.0, 5.0])
        pyro.sample("r", dist.Binomial(30, logits=mu + b * sigma.sqrt()), obs=seen)


def corner():
    """Density on a part of the plane alone, with hard edges."""
    x = pyro.sample("x", dist.Normal(0.0, 1000.0))
    y = pyro.sample("y", dist.Normal(0.0, 1000.0))
    inside = (x > -1) & (x < 1.5) & (y > x)
    pyro.factor("f", torch.where(inside, -0.5 * (x**2 + y**2), -torch.inf))


def rates():
    """Rates that overflow at most draws from the prior."""
    a = pyro.sample("a", dist.Normal(0.0, 100.0))
    b = pyro.sample("b", dist.Normal(0.0, 100.0))
    x = torch.linspace(-10, 10, 20)
    pyro.sample("y", dist.Poisson((a + b * x).exp()).to_event(1), obs=torch.arange(20.0) % 3)


def correlations():
    """A matrix that has a factor near zero only."""
    r = pyro.sample("r", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    whole = torch.eye(3) + r[0] * torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    whole = whole + r[1] * torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]])
    factor, info = torch.linalg.cholesky_ex(whole)
    value = -4 * factor.diagonal().log().sum() - 2 * whole.square().sum()
    pyro.factor("f", torch.where(info > 0, -torch.inf, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [tables, corner, rates, correlations])
def test_one_finite_point_is_enough_for_a_result(monkeypatch, dtype, model):
    quick(monkeypatch, check_draws=500, evaluation_draws=500)
    monkeypatch.setattr(candidates, "REFINE_ROUNDS", 5)
    torch.set_default_dtype(dtype)
    target = flowvi.from_pyro(model)

    fit = flowvi.fit(target, "fullrank", steps=2, escalate=False, progress=False)

    draws = fit.draw(500)
    assert np.isfinite(draws.log_p).mean() > 0.9
    assert fit.bounds[0] < math.inf
    assert math.isfinite(flowvi.diagnose(draws).log_evidence)


def comb(v):
    """Density on narrow teeth alone."""
    x = v["x"]
    return torch.where((60 * x).cos() > 0, -0.5 * x.square(), -torch.inf)


def test_a_normal_is_narrowed_until_its_draws_have_a_density():
    target = flowvi.from_density(comb, {"x": flowvi.Site()})

    found = candidates.best_gaussian(target, 0, False, lambda words: None)

    assert math.isfinite(found.best.elbo) and found.best.widths.max() < math.pi / 60


def test_a_start_without_density_is_replaced_by_a_place_with_one():
    """The prior's median of a centre is not where the density is."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.factor("f", torch.where(x.square().sum() > 16.0, 0.0, -torch.inf))

    target = flowvi.from_pyro(model)
    seen = preflight(target, 1)
    generator = torch.Generator().manual_seed(0)

    starts = candidates._finite_starts(target, target.starts(generator), seen.median, seen.places)

    assert target.log_prob(seen.median[None]).isinf().all()
    assert target.log_prob(starts).isfinite().all()


def test_a_density_that_is_infinite_by_rounding_is_no_bound():
    target = flowvi.from_density(
        lambda v: torch.where(v["x"] > 2.0, torch.inf, -0.5 * v["x"].square()),
        {"x": flowvi.Site()},
    )
    eps = torch.linspace(-3, 3, 7, dtype=target.dtype)[:, None]
    g = GaussianApproximation(
        torch.zeros(1, dtype=target.dtype), torch.eye(1, dtype=target.dtype), "wide"
    )

    assert with_elbo(target, g, eps).elbo == -math.inf
    assert math.isfinite(with_elbo(target, g, eps / 2).elbo)
