"""Latent fields and chains: exact evidence, the split of the density, and moves of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path as Path_

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import flowvi
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.targets.structure import MarginalTarget, structure
from flowvi.targets.structure.annealed import Path
from flowvi.targets.structure.field import Field
from flowvi.training import schedule
from flowvi.training.schedule import Schedule

CELLS, TIMES = 64, 60
SHARED, OWN, LEVEL = 1.0, 0.8, -0.5
count = torch.tensor([0, 0, 1, 0, 4, 0, 2, 0] * (CELLS // 8), dtype=torch.float64)
PERSISTENCE, STEP = 0.9, 0.5
torch.manual_seed(3)
returns = torch.randn(TIMES, dtype=torch.float64) * torch.randn(TIMES).double().exp().sqrt()
Model = Callable[[], None]


def field() -> None:
    """Poisson counts of a field whose latents have the same correlation with each other."""
    eye = torch.eye(CELLS, dtype=torch.float64)
    factor = torch.linalg.cholesky(OWN**2 * eye + SHARED**2)
    mean = torch.full((CELLS,), LEVEL, dtype=torch.float64)
    u = pyro.sample("u", dist.MultivariateNormal(mean, scale_tril=factor))
    with pyro.plate("cell", CELLS):
        pyro.sample("count", dist.Poisson(u.exp()), obs=count)


def chain() -> None:
    """Stochastic volatility with known scales."""
    sd = torch.full((TIMES,), STEP, dtype=torch.float64)
    h = pyro.sample("h", dist.Normal(torch.zeros(TIMES, dtype=torch.float64), 50.0).mask(False))
    before = torch.cat([h.new_zeros(1), h[:-1]])
    pyro.factor("walk", dist.Normal(PERSISTENCE * before, sd).log_prob(h).sum())
    with pyro.plate("time", TIMES):
        pyro.sample("returns", dist.Normal(0.0, (0.5 * h).exp()), obs=returns)


def field_truth() -> tuple[float, float, float]:
    """Log evidence, mean and sd of u[4], by quadrature over what all latents share."""
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(120))
    log_weight = weights.log() - 0.5 * math.log(2 * math.pi)
    u = LEVEL + SHARED * nodes[:, None] + OWN * nodes

    def cell(y: float) -> Tensor:
        return log_weight + y * u - u.exp() - math.lgamma(y + 1)

    kinds, many = count.unique(return_counts=True)
    given = sum(n * cell(float(y)).logsumexp(-1) for y, n in zip(kinds, many, strict=True))
    evidence = (log_weight + given).logsumexp(0)
    posterior = (log_weight + given - evidence).exp()
    of_cell = torch.softmax(cell(float(count[4])), -1)
    mean = (posterior * (of_cell * u).sum(-1)).sum()
    square = (posterior * (of_cell * u**2).sum(-1)).sum()
    return float(evidence), float(mean), float((square - mean**2).sqrt())


def chain_truth() -> tuple[float, float, float]:
    """Log evidence, mean and sd of the last h, by a filter on a grid."""
    h = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    step = math.log(float(h[1] - h[0]))
    move = dist.Normal(PERSISTENCE * h[:, None], STEP).log_prob(h) + step
    now = dist.Normal(torch.zeros(()).double(), STEP).log_prob(h) + step
    for y in returns:
        now = now + dist.Normal(0.0, (0.5 * h).exp()).log_prob(y)
        last, now = now, torch.logsumexp(now[:, None] + move, 0)
    evidence = last.logsumexp(0)
    p = (last - evidence).exp()
    mean = (p * h).sum()
    return float(evidence), float(mean), float(((p * h**2).sum() - mean**2).sqrt())


CASES = {"field": (field, field_truth, "u", 4), "chain": (chain, chain_truth, "h", TIMES - 1)}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws of a check."""
    few = Schedule(evaluation_draws=300, check_draws=300, again=1)
    monkeypatch.setattr(schedule, "structured", lambda dim, shared, one=False: few)


@pytest.mark.parametrize("name", CASES)
def test_the_default_fit_has_the_exact_evidence(name: str) -> None:
    model, truth, site, place = CASES[name]
    evidence, mean, sd = truth()
    fit = flowvi.fit(flowvi.from_pyro(model), progress=False)
    assert isinstance(fit, StructuredFit)
    assert fit.marginal.dim == 0
    draws = fit.draw(1000, seed=2)
    weight = np.exp(draws.log_weights.ravel() - evidence)
    error = weight.std() / math.sqrt(weight.size)
    assert abs(weight.mean() - 1) < 4 * error, (weight.mean(), error)
    assert error < 0.03
    u = draws.values[site][0, :, place]
    share = weight / weight.sum()
    found = (share * u).sum()
    assert abs(found - mean) < 4 * sd / math.sqrt(1000 / 1.5), (found, mean)
    spread = math.sqrt((share * (u - found) ** 2).sum())
    assert abs(spread / sd - 1) < 4 / math.sqrt(2 * 1000 / 1.5) + 0.02, (spread, sd)
    assert flowvi.diagnose(draws).verdict != "do not trust"


@pytest.mark.parametrize("name", CASES)
def test_a_short_path_is_unbiased_too(name: str) -> None:
    model, truth, _, _ = CASES[name]
    target = flowvi.from_pyro(model)
    marginal = MarginalTarget(target, structure(target))
    marginal.path = Path.even(6, 1.1)
    none = torch.zeros(4000, 0)
    generator = torch.Generator().manual_seed(0)
    log_p = torch.cat([found.log_p for found in marginal.corrected(none, generator)])
    weight = (log_p - truth()[0]).exp()
    error = float(weight.std()) / math.sqrt(len(weight))
    assert abs(float(weight.mean()) - 1) < 4 * error, (float(weight.mean()), error)
    assert error < 0.05


def test_points_have_the_density_that_is_reported() -> None:
    target = flowvi.from_pyro(field)
    marginal = MarginalTarget(target, structure(target))
    marginal.path = Path.even(4)
    (found,) = marginal.corrected(torch.zeros(5, 0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.log_joint, target.log_prob(found.z), rtol=1e-9, atol=1e-7)


def test_the_quadratic_part_and_the_single_terms_are_the_density() -> None:
    target = flowvi.from_pyro(field)
    laplace = MarginalTarget(target, structure(target)).laplace
    assert isinstance(laplace, Field)
    u, v = torch.randn(2, 3, CELLS, dtype=torch.float64)
    rest = laplace.terms.rest(u, u).at(v)
    local = laplace.terms.evaluate(u + v, u + v, second=True)
    torch.testing.assert_close(rest.value + local.value, target.log_prob(u + v))
    assert local.second is not None
    z = (u + v).requires_grad_()
    (slope,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    torch.testing.assert_close(rest.slope + local.first, slope)
    hessian = torch.autograd.functional.hessian(target.log_prob, (u + v)[0])
    torch.testing.assert_close(rest.precision[0] - torch.diag(local.second[0]), -hessian)


def test_terms_of_the_shared_latents_alone_are_no_single_terms() -> None:
    """They are evaluated once for each theta: with a matrix that depends on it, they are dear."""
    size = 20

    def model() -> None:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        place = torch.linspace(0.0, 1.0, size)
        square = (place[:, None] - place).square()
        covariance = torch.exp(-square / width) + 0.01 * torch.eye(size)
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(size), covariance))
        pyro.sample("y", dist.Poisson(u.exp()).to_event(1), obs=torch.ones(size))

    target = flowvi.from_pyro(model)
    laplace = MarginalTarget(target, structure(target)).laplace
    assert isinstance(laplace, Field)
    named = {
        which: " ".join(str(node.target) for node in graph.module.graph.nodes)
        for which, graph in (("local", laplace.terms._local), ("rest", laplace.terms._rest))
    }
    assert "cholesky" in named["rest"] and "cholesky" not in named["local"]


def test_a_rest_that_is_not_quadratic_is_told_apart() -> None:
    def model() -> None:
        with pyro.plate("weight", 20):
            w = pyro.sample("w", dist.Normal(torch.zeros(20, dtype=torch.float64), 1.0))
        x = torch.linspace(-1, 1, 600, dtype=torch.float64).view(30, 20).sin()
        with pyro.plate("row", 30):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=torch.arange(30).double() % 2)

    target = flowvi.from_pyro(model)
    marginal = MarginalTarget(target, structure(target))
    assert marginal.structure.kind == "field"
    assert not isinstance(marginal.laplace, Field)


def test_a_saved_field_has_the_same_draws(tmp_path: Path_) -> None:
    fit = flowvi.fit(flowvi.from_pyro(field), progress=False, escalate=False)
    assert isinstance(fit, StructuredFit)
    assert fit.marginal.path.steps > 1
    fit.save(tmp_path / "fit")
    again = flowvi.load(tmp_path / "fit", flowvi.from_pyro(field))
    one, two = fit.draw(20, seed=2), again.draw(20, seed=2)
    for name in ("z", "log_p", "log_q"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
