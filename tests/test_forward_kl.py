"""The inclusive divergence is weighted maximum likelihood, and its value an upper bound."""

import math

import pytest
import torch
from families import NAMES, correlated, gradients, half_line, make_guide, perturbed
from torch.distributions import MultivariateNormal

from flowvi.guides import FullRank, MeanField
from flowvi.objectives import ForwardKL, Renyi


@pytest.fixture
def normal():
    return correlated()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_kl_is_weighted_maximum_likelihood(name, weighted, normal):
    guide = perturbed(make_guide(name, 2))
    z = normal.sample((50,))
    log_weight = torch.randn(50) if weighted else None
    weight = torch.softmax(log_weight, 0) if weighted else torch.full((50,), 1 / 50)

    bound, log_w = ForwardKL(z, log_weight)(normal.log_prob, guide)
    log_q = guide.log_prob(z)

    torch.testing.assert_close(log_w, normal.log_prob(z) - log_q)
    torch.testing.assert_close(bound, -(weight * log_w).sum())
    torch.testing.assert_close(gradients(bound, guide), gradients((weight * log_q).sum(), guide))


def test_forward_kl_bounds_the_evidence_from_above(normal):
    """E_p[log w] = log evidence + KL(p || q), within four standard errors."""
    guide = perturbed(MeanField(2))
    log_evidence = 0.7
    z = normal.sample((20_000,))

    bound, log_w = ForwardKL(z)(lambda z: normal.log_prob(z) + log_evidence, guide)
    loc, log_scale = guide.affine(torch.zeros(2))[0], guide.affine.params.value[2:]
    fitted = MultivariateNormal(loc, torch.diag((2 * log_scale).exp()))
    expected = log_evidence + torch.distributions.kl_divergence(normal, fitted)

    assert not ForwardKL.lower_bound and Renyi.lower_bound
    assert abs(-bound - expected) < 4 * log_w.std() / len(log_w) ** 0.5


def test_forward_kl_ignores_draws_without_weight(normal):
    guide = FullRank(2)
    log_weight = torch.tensor([0.0, -math.inf])

    bound, _ = ForwardKL(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), log_weight)(half_line, guide)

    assert bound.isfinite() and gradients(bound, guide).isfinite().all()


def test_forward_kl_takes_draws_for_every_row():
    guide = perturbed(make_guide("realnvp", 2, 3))
    z, context = torch.randn(9, 5, 2), torch.randn(5, 3)

    bound, log_w = ForwardKL(z)(lambda z: -z.square().sum(-1), guide, context)

    assert bound.shape == (5,) and log_w.shape == (9, 5)


def test_forward_kl_counts_its_weights():
    with pytest.raises(ValueError, match=r"one entry for each draw, shape \(9,\); got \(8,\)"):
        ForwardKL(torch.randn(9, 2), torch.randn(8))
