"""Moments of weighted draws, to which guides of shared latents are fitted."""

from __future__ import annotations

import math

import torch

from flowvi.fitting.reweighted import WeightedDraws, _moments, _plain_moments


def weighted(count: int, mean: torch.Tensor, scale: torch.Tensor, seed: int) -> WeightedDraws:
    """Draws of a standard normal with weights for a normal (mean, scale)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    target = torch.distributions.MultivariateNormal(mean, scale_tril=scale)
    log_w = target.log_prob(theta) + 0.5 * theta.square().sum(-1)
    return WeightedDraws(theta, torch.softmax(log_w, 0))


def test_weighted_draws_give_the_moments_of_their_target() -> None:
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    scale = torch.tensor([[0.8, 0.0], [0.4, 0.7]], dtype=torch.float64)
    drawn = weighted(40_000, mean, scale, seed=1)
    loc, factor = _moments(drawn)
    error = 1 / math.sqrt(drawn.effective)
    assert ((loc - mean).abs() < 5 * error).all()
    exact = scale @ scale.mT
    assert ((factor @ factor.mT - exact).abs() < 5 * math.sqrt(2) * error).all()


def test_correlations_that_are_noise_are_shrunk() -> None:
    dim = 30
    width = torch.linspace(0.9, 1.1, dim, dtype=torch.float64)
    mean = torch.zeros(dim, dtype=torch.float64)
    drawn = weighted(600, mean, width.diag(), seed=2)
    _, factor = _moments(drawn)
    shift = drawn.theta - (drawn.weight[:, None] * drawn.theta).sum(0)
    raw = torch.linalg.cholesky((drawn.weight[:, None] * shift).mT @ shift)
    _, before = _plain_moments(drawn)
    target = torch.distributions.MultivariateNormal(mean, scale_tril=width.diag())

    def divergence(after: torch.Tensor) -> float:
        """KL from the target of the normal that the map of `moments` makes of a standard one."""
        turn = torch.linalg.solve_triangular(before, after, upper=False, left=False)
        guide = torch.distributions.MultivariateNormal(mean, turn @ turn.mT)
        return float(torch.distributions.kl_divergence(target, guide))

    assert divergence(factor) < 0.5 * divergence(raw)
