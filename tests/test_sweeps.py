"""Newton steps with the expected Hessian reach a normal at once, and the best normal otherwise."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import flowvi
from flowvi.initialization import candidates
from flowvi.initialization.gaussian import GaussianApproximation, with_elbo
from flowvi.initialization.newton import averaged_step, newton_step, refine_by_newton
from models import irt_2pl

DIM = 12


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def normal():
    root = torch.randn(DIM, DIM)
    return MultivariateNormal(torch.randn(DIM), precision_matrix=root @ root.mT + torch.eye(DIM))


def target_of(log_prob) -> flowvi.Target:
    return flowvi.from_density(lambda v: log_prob(v["x"]), {"x": flowvi.Site((DIM,))})


def test_one_sweep_reaches_a_normal(normal, generator):
    start = GaussianApproximation(normal.mean + 0.1, 0.9 * normal.scale_tril, "near")

    found = newton_step(target_of(normal.log_prob), start, generator)

    covariance = found.scale_tril @ found.scale_tril.mT
    torch.testing.assert_close(covariance, normal.covariance_matrix, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loc, normal.mean, rtol=1e-4, atol=1e-4)


def test_an_averaged_step_stays_at_a_normal(normal, generator):
    at = GaussianApproximation(normal.mean, normal.scale_tril, "there")

    found = averaged_step(target_of(normal.log_prob), at, generator, 0.5)

    torch.testing.assert_close(found.loc, normal.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scale_tril, normal.scale_tril, rtol=1e-4, atol=1e-6)


def test_the_best_normal_of_a_skewed_density_is_found(generator):
    """-sum e^x + x: the mean-field optimum is exact, m + s^2 / 2 = 0 and s = 1."""
    target = target_of(lambda x: (x - x.exp()).sum())
    judge = torch.randn(2000, DIM, generator=generator)
    start = GaussianApproximation(torch.zeros(DIM), 0.3 * torch.eye(DIM), "narrow")

    found = refine_by_newton(target, start, generator, judge, 30)

    # E[x - e^x] at the optimum is -3/2, and the entropy of a standard normal 1.4189.
    best = DIM * (-1.5 + 1.4189)
    exact = found.loc - (found.loc + found.widths.square() / 2).exp() + found.widths.log() + 1.4189
    assert best - 0.15 < exact.sum() <= best + 1e-3
    assert found.elbo > with_elbo(target, start, judge).elbo


@pytest.mark.slow
def test_where_newton_goes_too_far_small_steps_follow(monkeypatch):
    """An item response model, whose start of many dimensions once ended 200 nats short."""
    generator = torch.Generator().manual_seed(3)
    theta, b = torch.randn(20, generator=generator), torch.randn(6, generator=generator)
    a = (0.5 * torch.randn(6, generator=generator)).exp()
    right = torch.rand(20, 6, generator=generator) < torch.sigmoid(a * (theta[:, None] - b))
    target = flowvi.from_pyro(irt_2pl.model, right.double())
    found = {}
    for large in (300, 10):
        monkeypatch.setattr(candidates, "LARGE", large)
        found[large] = candidates.best_gaussian(target, 1, False, lambda words: None).best

    assert found[10].overshot and not found[300].overshot
    assert found[10].elbo > found[300].elbo - 0.5


def test_a_start_of_many_dimensions_begins_without_correlations_where_these_are_worth_nothing():
    """Of 310 Cauchy-like variables at some distance from a mode, a matrix from there misleads."""
    dim = 310

    def log_prob(v):
        return -1.5 * (1 + (v["x"] * torch.linspace(0.1, 10.0, dim)).square() / 2).log().sum()

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((dim,))})
    judge = torch.randn(400, dim, generator=torch.Generator().manual_seed(0))
    narrow = with_elbo(
        target, GaussianApproximation(torch.ones(dim), 0.1 * torch.eye(dim), "narrow"), judge
    )

    found = candidates._try_diagonal(
        target, narrow, torch.Generator().manual_seed(0), judge, lambda: False
    )

    assert found.elbo > narrow.elbo + 100
    assert found.scale_tril.shape == (dim, dim)
    assert with_elbo(target, found, judge).elbo == pytest.approx(found.elbo)


def test_a_gaussian_without_a_matrix_settles_as_one(generator):
    """As the search's, where a guide without correlations is compared with them."""
    dim = 310
    scales = torch.linspace(0.1, 10.0, dim)
    target = flowvi.from_density(
        lambda v: -0.5 * (v["x"] / scales).square().sum(), {"x": flowvi.Site((dim,))}
    )
    judge = torch.randn(400, dim, generator=generator)
    start = with_elbo(target, GaussianApproximation(torch.zeros(dim), 1.5 * scales, "flat"), judge)

    found = candidates.refine_fully(target, start, generator, judge, lambda: False, 30)

    assert found.scale_tril.shape == (dim,)
    exact = 0.5 * dim * math.log(2 * math.pi) + float(scales.log().sum())
    assert found.elbo == pytest.approx(exact, abs=1e-3)
