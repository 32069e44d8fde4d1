"""Helpers of the flow, guide and objective tests."""

import math
from functools import partial

import torch
from torch.distributions import MultivariateNormal

from flowvi import flows, guides
from flowvi.flows.clamps import tanh_clamp

ALPHAS = [1.0, 0.5, 0.0]
FIXED = ["loft", "permutation"]  # Without parameters.
# Rows that are too slow at their usual size, or that need more than torch.
SIZES = {
    "ffjord": {"steps": 8, "hidden": 16},
    "mixture": {"components": 2, "component": "fullrank"},
}
# An image is no vector of any length: test_image.py runs the same properties.
FLOWS = {
    name: partial(build, **SIZES.get(name, {}))
    for name, build in flows.FLOWS.items()
    if name != "image_glow"
}
GUIDES = {name: partial(build, **SIZES.get(name, {})) for name, build in guides.GUIDES.items()}
NAMES = [n for n in [*GUIDES, *FLOWS] if n not in FIXED]


def make_guide(name, dim, context_dim=0):
    """`guides.make_guide` at the sizes above."""
    if name in GUIDES:
        return GUIDES[name](dim, context_dim)
    affine = flows.Triangular(dim, context_dim)
    return guides.FlowGuide(dim, FLOWS[name](dim, context_dim), affine)


def perturbed(module, std=0.3):
    """Move a module off its identity initialisation, so that tests bite."""
    with torch.no_grad():
        for p in module.parameters():
            inputs = p[0].numel() if p.dim() > 1 else 1
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


def same_map(ours, theirs, x):
    """One of our layers and a transform agree in value and log determinant."""
    y, ladj = ours(x)
    expected = theirs(x)

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, theirs.log_abs_det_jacobian(x, expected))


def shift_and_log_scale(params):
    """The parameters of an affine map as Pyro's transforms expect them."""
    shift, raw = params.unbind(-2)
    return shift, tanh_clamp(raw)
