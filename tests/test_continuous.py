"""Continuous flows follow their velocity to a stated tolerance, with the exact trace."""

import copy

import pytest
import torch
from families import perturbed
from torch.autograd.functional import jacobian

from flowvi.flows import FLOWS, Continuous
from flowvi.flows.continuous import runge_kutta
from flowvi.guides import FlowGuide
from flowvi.objectives import Renyi

CONTEXT = 3


@pytest.fixture
def adaptive():
    """A builder with the adaptive solver, where it is installed."""
    pytest.importorskip("torchdiffeq", reason="the extra flowvi[ode] is not installed")
    return lambda *args, **sizes: perturbed(Continuous(*args, **sizes), std=1.0)


def slope_at(flow, x, t, context=None):
    return flow._slope(context)(t, torch.cat([x, torch.zeros(*x.shape[:-1], 1)], dim=-1))


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_the_closed_form_is_the_trace_of_the_jacobian(dim):
    flow = perturbed(Continuous(dim, CONTEXT, steps=1), std=1.0)
    x, context = torch.randn(dim), torch.randn(CONTEXT)

    found = slope_at(flow, x, 0.3, context)[-1]

    full = jacobian(lambda x: slope_at(flow, x, 0.3, context)[:-1], x)
    torch.testing.assert_close(found, full.trace())


def test_hutchinsons_estimate_is_unbiased_over_the_signs():
    flow = perturbed(Continuous(4, steps=1, probes=20_000), std=1.0)
    exact = Continuous(4, steps=1)
    exact.load_state_dict(flow.state_dict(), strict=False)
    x = torch.randn(4)

    full = jacobian(lambda x: slope_at(exact, x, 0.5)[:-1], x)
    each = ((flow.signs @ full) * flow.signs).sum(-1)
    found = slope_at(flow, x, 0.5)[-1]

    torch.testing.assert_close(found, each.mean())
    assert abs(found - full.trace()) < 4 * each.std() / len(each) ** 0.5


def test_both_directions_use_the_same_signs_until_they_are_renewed():
    flow = perturbed(Continuous(3, steps=16, probes=1), std=1.0)
    x = torch.randn(6, 3)

    y, ladj = flow(x)
    _, back = flow.inverse(y)
    copied = copy.deepcopy(flow)(x)[1]
    for _ in range(20):
        flow.renew()
        torch.testing.assert_close(flow(x)[0], y)
        if not torch.allclose(flow(x)[1], ladj):
            break

    torch.testing.assert_close(back, -ladj)
    torch.testing.assert_close(copied, ladj, rtol=0, atol=0)
    assert not torch.allclose(flow(x)[1], ladj)
    assert ((flow.signs == 1) | (flow.signs == -1)).all()


def test_runge_kutta_is_of_order_four():
    """Half the step, a sixteenth of the error."""
    errors = [
        (runge_kutta(lambda t, y: t * y, torch.ones(()), 0.0, 1.0, n) - torch.tensor(0.5).exp())
        for n in (8, 16)
    ]

    assert 14 < errors[0] / errors[1] < 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
def test_the_adaptive_solver_keeps_its_tolerance(context_dim, dtype, adaptive):
    flow = adaptive(5, context_dim).to(dtype)
    fixed = Continuous(5, context_dim, steps=128).to(dtype)
    fixed.load_state_dict(flow.state_dict())
    context = torch.randn(20, context_dim, dtype=dtype) if context_dim else None
    x = 3 * torch.randn(10, 20, 5, dtype=dtype)

    y, ladj = flow(x, context)
    x_back, back = flow.inverse(y, context)

    exact, exact_ladj = fixed(x, context)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj, exact_ladj, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, -ladj, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e3, 1e-30])
def test_the_adaptive_solver_survives_extreme_inputs(size, adaptive):
    flow = adaptive(4)
    x = (size * torch.randn(20, 4)).requires_grad_()

    for direction in (flow, flow.inverse):
        y, ladj = direction(x)
        gradient = torch.autograd.grad(y.sum() + ladj.sum(), x)[0]

        assert y.isfinite().all() and ladj.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_gradients_land_with_the_adaptive_solver(alpha, adaptive):
    guide = FlowGuide(3, adaptive(3))
    target = copy.deepcopy(guide)

    bound, log_w = Renyi(alpha, 4)(target.log_prob, guide)
    found = torch.autograd.grad(bound, list(guide.parameters()))

    # log q and its score along the path and at its end differ by the solver's error, no more.
    assert log_w.abs().max() < 1e-3
    assert all(g.abs().max() < 1e-3 for g in found)


def test_without_the_extra_the_row_exists_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)

    with pytest.raises(ImportError, match=r"pip install 'flowvi\[ode\]', or pass steps="):
        FLOWS["ffjord"](2)
    assert FLOWS["ffjord"](2, steps=4)(torch.zeros(2))[0].shape == (2,)
