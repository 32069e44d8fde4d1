"""The monotone network increases, bends as it is told, and is inverted to rounding."""

import pytest
import torch

from flowvi.flows import FLOWS, naf
from flowvi.flows.neural_autoregressive import MonotoneNetwork


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.3, 3.0, 30.0])
def test_the_root_is_found_to_rounding(size, dtype):
    """For parameters far beyond those of a sane fit, the image of the root is the target."""
    network = MonotoneNetwork(8)
    params = size * torch.randn(4000, network.size, 3, dtype=dtype)
    y, _ = network.forward(3 * torch.randn(4000, 3, dtype=dtype), params)

    x, _ = network.inverse(y, params)

    error = (network.forward(x, params)[0] - y).abs() / (1 + y.abs() + size)
    assert error.max() < 100 * torch.finfo(dtype).eps


def test_slopes_are_positive_and_right():
    network = MonotoneNetwork(5)
    params = 3 * torch.randn(500, network.size, 1)
    x = torch.randn(500, 1, requires_grad=True)

    y, log_slope = network.forward(x, params)

    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], log_slope.exp())


def test_enough_bends_make_any_increasing_map():
    """Two steps, fitted by least squares, of which a line leaves a tenth of the variance."""
    network = MonotoneNetwork(16)
    x = torch.linspace(-4, 4, 200).unsqueeze(-1)
    y = 2 * torch.tanh(8 * (x + 1)) + 3 * torch.tanh(8 * (x - 0.5))
    params = torch.zeros(network.size, 1, requires_grad=True)
    optimiser = torch.optim.Adam([params], lr=0.05)

    for _ in range(500):
        optimiser.zero_grad()
        loss = (network.forward(x, params)[0] - y).square().mean()
        loss.backward()
        optimiser.step()

    line = 1 - torch.corrcoef(torch.cat([x, y], dim=1).T)[0, 1] ** 2
    assert loss < 0.01 * y.var() and line > 0.1


def test_it_is_a_line_far_out():
    network = MonotoneNetwork(4)
    params = torch.randn(network.size, 1)

    y, log_slope = network.forward(torch.tensor([[-1e4], [1e4]]), params)

    torch.testing.assert_close(log_slope[0], log_slope[1])
    torch.testing.assert_close(y.diff(dim=0), 2e4 * log_slope[:1].exp(), rtol=1e-3, atol=0)


def test_sizes_are_passed_on():
    assert naf(3, depth=3, units=5)(torch.zeros(3))[0].shape == (3,)
    assert FLOWS["naf"] is naf
