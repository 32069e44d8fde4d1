"""Masked networks look only backwards, and autoregressive flows are the maps of their papers."""

import pyro.distributions.transforms as T
import pytest
import torch
from families import perturbed, same_map, shift_and_log_scale
from torch.autograd.functional import jacobian

from flowvi.flows import FLOWS, Autoregressive, Inverse
from flowvi.flows.clamps import asymmetric_clamp, tanh_clamp
from flowvi.flows.elementwise import Affine
from flowvi.flows.masked import MaskedPerceptron

CONTEXT = 3


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("hidden", [8, 64])
def test_outputs_see_every_earlier_coordinate_and_no_other(hidden, context_dim):
    """Wide networks use all there is to see; narrow ones never look ahead."""
    net = perturbed(MaskedPerceptron(12, 2, context_dim, hidden))
    context = torch.randn(context_dim) if context_dim else None

    seen = jacobian(lambda x: net(x, context), torch.randn(12)).abs().sum(0)

    assert torch.equal(seen.triu(), torch.zeros(12, 12))
    if hidden == 64:
        assert (seen.tril(-1) + torch.ones(12, 12).triu() > 1e-9).all()


def test_the_order_alternates():
    """Every coordinate of the flow depends on every other."""
    for name in ("iaf", "maf", "nsf_autoregressive"):
        flow = perturbed(FLOWS[name](5), std=1.0)

        moved = jacobian(lambda x, flow=flow: flow(x)[0], 0.5 * torch.randn(5))

        assert (moved.abs() > 1e-12).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_one_layer_is_triangular(reverse):
    layer = perturbed(Autoregressive(5, Affine(), reverse=reverse))

    moved = jacobian(lambda x: layer(x)[0], torch.randn(5))

    assert torch.equal(moved, moved.triu() if reverse else moved.tril())


def test_the_first_coordinate_bends_with_the_context():
    """It sees no coordinate, but a function of the context that is not linear."""
    layer = perturbed(Autoregressive(1, Affine(), 1), std=1.0)
    context = torch.linspace(-3, 3, 7).unsqueeze(-1)

    shift, _ = layer(torch.zeros(7, 1), context)

    assert shift.squeeze().diff().diff().abs().max() > 1e-3


def test_affine_layer_is_pyros():
    ours = perturbed(Autoregressive(4, Affine()))

    class Network(torch.nn.Module):
        permutation = torch.arange(4)

        def forward(self, x):
            return shift_and_log_scale(ours.net(x, None))

    theirs = T.AffineAutoregressive(Network())
    y = torch.randn(8, 4)

    same_map(ours, theirs, torch.randn(8, 4))
    torch.testing.assert_close(ours.inverse(y)[0], theirs.inv(y))


def test_maf_is_iaf_backwards():
    forwards, backwards = perturbed(FLOWS["iaf"](4)), FLOWS["maf"](4)
    for there, back in zip(forwards.layers, reversed(backwards.layers), strict=True):
        back.layer = there
    x = torch.randn(6, 4)

    torch.testing.assert_close(backwards(x), forwards.inverse(x))
    torch.testing.assert_close(Inverse(forwards)(x), forwards.inverse(x), rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [tanh_clamp, asymmetric_clamp])
def test_clamps_increase_from_zero_to_their_bounds(clamp):
    lowest, highest = (-3.0, 3.0) if clamp is tanh_clamp else (-2.0, 0.1)

    c = clamp(torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9]))

    assert c[2] == 0 and (c.diff() > 0).all()
    torch.testing.assert_close(c[[0, -1]], torch.tensor([lowest, highest]))


def test_couplings_of_nice_preserve_volume():
    flow = perturbed(FLOWS["nice"](5))
    couplings, scale = flow.layers
    x = torch.randn(6, 5)

    assert torch.equal(couplings(x)[1], torch.zeros(6))
    torch.testing.assert_close(flow(x)[1], scale(x)[1])
