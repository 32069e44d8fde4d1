"""Training works in single precision where that is enough, and reports nothing that it rounded."""

import math

import pytest
import torch
from families import FLOWS, GUIDES, make_guide, perturbed
from torch import nn

import flowvi
from flowvi import Site
from flowvi.flows import Chain, Layer
from flowvi.guides import FlowGuide
from flowvi.runtime.clock import Clock
from flowvi.targets import Target
from flowvi.training.draw_gradient import DrawGradient
from flowvi.training.settings import Settings

# Far from zero, of very different widths, and correlated: what single precision could not hold.
LOC = torch.tensor([1e6, -3.0, 1e-4], dtype=torch.float64)
WIDTHS = torch.tensor([1e-2, 1e3, 1e-6], dtype=torch.float64)
TRIL = WIDTHS[:, None] * torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [-0.7, 0.5, 0.5]]).double()
# In single precision, sums of about a hundred numbers.
ROUNDING = 1e-4


def log_density(v):
    u = torch.linalg.solve_triangular(TRIL, (v["x"] - LOC)[:, None], upper=False)[:, 0]
    return -(u**2).sum() / 2 - (1 + (0.3 * u[0] - u[1]) ** 2).sqrt()


@pytest.fixture(scope="module")
def target() -> Target:
    return flowvi.from_density(log_density, {"x": Site((3,))})


@pytest.mark.parametrize("name", [*GUIDES, *FLOWS])
def test_both_precisions_have_the_same_gradients(name, target):
    guide = perturbed(make_guide(name, 3), std=0.1).double()
    guide.start(LOC, TRIL)

    single = guide.mixed_precision_copy()

    if single is None:
        inner = getattr(guide, "flow", None)
        assert inner is None or not inner.single or not list(inner.parameters())
        return
    assert {p.dtype for p in single.parameters()} >= {torch.float32}
    for own, other in zip(single.parameters(), guide.parameters(), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-6, atol=1e-6)
    found = []
    for worker in (single, guide):
        torch.manual_seed(0)
        bound = flowvi.elbo(1)(target.log_prob, worker, repeats=(64,)).bound.mean()
        assert bound.dtype == torch.float64
        gradients = torch.autograd.grad(bound, list(worker.parameters()), allow_unused=True)
        found.append((bound.detach(), [g.double() for g in gradients if g is not None]))
    (bound, gradients), (expected, exact) = found
    torch.testing.assert_close(bound, expected, rtol=ROUNDING, atol=ROUNDING)
    whole = math.sqrt(sum(float(g.square().sum()) for g in exact))
    assert whole > 0.01
    for g, e in zip(gradients, exact, strict=True):
        assert float((g - e).norm()) <= ROUNDING * whole


class Large(Layer):
    """The identity, by way of numbers that only double precision has."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    @property
    def single(self) -> bool:
        return True

    def forward(self, x, context=None):
        return (x * 1e30 * 1e30) * 1e-30 * 1e-30 + self.shift, x.new_zeros(x.shape[:-1])

    def inverse(self, y, context=None):
        return y - self.shift, y.new_zeros(y.shape[:-1])


def test_a_flow_that_single_precision_cannot_hold_is_trained_in_double(target):
    guide = FlowGuide(3, Chain([Large()])).double()
    guide.start(LOC, TRIL)

    fit = flowvi.fit(
        target,
        guide,
        steps=60,
        lr=1e-3,
        particles=16,
        progress=False,
        compile=False,
        escalate=False,
    )

    assert "the next steps are in double precision" in fit.log
    assert not any("ended early" in line for line in fit.log)
    assert fit.history["skipped"].sum() == 10 and math.isfinite(fit.bounds[0])
    assert float(fit.guide.flow.layers[0].shift.detach()) != 0.0


def test_what_is_trained_follows_and_is_left_in_double(target):
    guide = perturbed(make_guide("realnvp", 3), std=0.1).double()
    guide.start(LOC, TRIL)
    settings = Settings(flowvi.elbo(1), 1, 1e-3, 8, compile=False)
    gradients = DrawGradient(target, guide, settings, Clock(), lambda line: None)
    trained = list(guide.parameters())
    assert all(a is b for a, b in zip(gradients.trained, trained, strict=True))
    for _ in range(2):
        torch.manual_seed(0)
        _, flat = gradients(8)
        torch.manual_seed(0)
        bound = flowvi.elbo(1)(target.log_prob, guide, repeats=(8,)).bound.mean()
        found = torch.autograd.grad(-bound, trained, allow_unused=True)
        exact = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(trained, found, strict=True)
            ]
        )
        assert flat.dtype == torch.float64
        assert 0 < float((flat - exact).norm()) <= ROUNDING * float(exact.norm())
        with torch.no_grad():
            for p in trained:
                p.add_(0.1 * torch.randn_like(p))


def test_parameters_of_model_and_guide_alike_stay_what_they_are():
    """A copy of the guide in another precision would no longer share them."""
    shared = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    guide = make_guide("realnvp", 3).double()
    guide.affine.params.value = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    target = flowvi.from_density(lambda v: -((v["x"] - shared) ** 2).sum() / 2, {"x": Site((3,))})
    target.also = nn.ParameterList([guide.affine.params.value])
    settings = Settings(flowvi.elbo(1), 1, 1e-3, 8, compile=False)

    gradients = DrawGradient(target, guide, settings, Clock(), lambda line: None)

    bound, flat = gradients(8)
    assert math.isfinite(bound) and len(flat) == sum(p.numel() for p in gradients.trained)
    assert not any(p.dtype == torch.float32 for p in gradients.trained)
    with torch.no_grad():
        guide.affine.params.value += 1.0
    assert not torch.equal(gradients(8)[1], flat)
