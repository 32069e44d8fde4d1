"""Helpers of the flow, guide and objective tests."""

import math

import torch
from torch.distributions import MultivariateNormal

from flowvi.flows import FLOWS
from flowvi.guides import GUIDES

ALPHAS = [1.0, 0.5, 0.0]
NAMES = [n for n in [*GUIDES, *FLOWS] if n != "permutation"]


def perturbed(module, std=0.3):
    """Move a module off its identity initialisation, so that tests bite."""
    with torch.no_grad():
        for p in module.parameters():
            inputs = p.shape[1] if p.dim() == 2 else 1
            p.add_(std * inputs**-0.5 * torch.randn_like(p))
    return module


def gradients(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def correlated():
    return MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))


def half_line(z):
    """A density on z_0 > 0 whose logarithm has no gradient elsewhere."""
    return torch.where(z[..., 0] > 0, z[..., 0].log() - z.square().sum(-1), -math.inf)
