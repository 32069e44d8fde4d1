"""Base densities score what they draw, and their draws carry the right derivative."""

import copy

import pytest
import torch
from families import perturbed
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
)

from flowvi import flows
from flowvi.guides import FlowGuide
from flowvi.objectives import Renyi, elbo

BASES = {
    "mixture": flows.GaussianMixture,
    "normal": flows.Normal,
    "student": flows.StudentT,
}


def guide_on(name, dim=3):
    return perturbed(FlowGuide(dim, flows.FLOWS["realnvp"](dim), base=BASES[name](dim)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("name", BASES)
def test_shapes_and_dtypes(name, dim, dtype):
    base = BASES[name](dim).to(dtype)

    eps = base.sample((4, 2))

    assert eps.shape == (4, 2, dim) and eps.dtype == dtype
    assert base.log_prob(eps).shape == (4, 2) and base.log_prob(eps).dtype == dtype


@pytest.mark.parametrize("name", BASES)
def test_draws_follow_the_density(name):
    """The mean of q / p over draws of p is one, for a narrower normal q."""
    base = perturbed(BASES[name](2))
    narrow = MultivariateNormal(torch.zeros(2), 0.25 * torch.eye(2))

    with torch.no_grad():
        eps = base.sample((50_000,))
        ratio = (narrow.log_prob(eps) - base.log_prob(eps)).exp()

    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


def test_student_is_torchs_student():
    base = perturbed(flows.StudentT(3, df=5.0))
    eps = 3 * torch.randn(6, 3)

    expected = StudentT(base.df).log_prob(eps).sum(-1)

    torch.testing.assert_close(base.log_prob(eps), expected)
    torch.testing.assert_close(flows.StudentT(2).df, torch.full((2,), 30.0))


def test_mixture_is_torchs_mixture():
    weights = torch.tensor([1.0, 2.0, 5.0])
    base = perturbed(flows.GaussianMixture(2, 3, weights))
    parts = Independent(Normal(base.loc, base.log_scale.exp()), 1)
    eps = torch.randn(6, 2)

    expected = MixtureSameFamily(Categorical(weights), parts).log_prob(eps)

    torch.testing.assert_close(base.log_prob(eps), expected)


def test_the_derivative_of_a_draw_by_its_degrees_of_freedom():
    """E[eps^2] = df / (df - 2), within four standard errors."""
    base = flows.StudentT(20_000, df=12.0)

    eps = base.sample(())
    slope = torch.autograd.grad(eps.square().sum(), base.raw)[0] / torch.sigmoid(base.raw)

    assert abs(slope.mean() + 2 / 10**2) < 4 * slope.std() / len(slope) ** 0.5


@pytest.mark.parametrize("alpha", [1.0, 0.0])
@pytest.mark.parametrize("name", BASES)
def test_dreg_lands(name, alpha):
    """With the base's own parameters among those that are frozen."""
    guide = guide_on(name)
    target = copy.deepcopy(guide)

    bound, _ = Renyi(alpha, 5)(target.log_prob, guide, repeats=(3,))
    zero = torch.autograd.grad(bound.sum(), list(guide.parameters()))

    assert all(g.abs().max() < 1e-9 for g in zero)


@pytest.mark.parametrize("name", ["mixture", "student"])
def test_dreg_is_unbiased_for_the_base(name):
    base = perturbed(BASES[name](2))
    guide = FlowGuide(2, flows.Chain([]), base=base)
    target = MultivariateNormal(torch.ones(2), torch.eye(2))

    def one(kind):
        bound = elbo(1, kind)(target.log_prob, guide, repeats=(4000,)).bound
        found = torch.autograd.grad(bound.mean(), list(base.parameters()))
        return torch.cat([g.flatten() for g in found])

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("name", BASES)
def test_guides_with_any_base_are_copied_and_saved(name):
    guide, loaded = guide_on(name), guide_on(name)
    z = torch.randn(4, 3)

    loaded.load_state_dict(guide.state_dict())

    expected = guide.log_prob(z)
    torch.testing.assert_close(loaded.log_prob(z), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(guide).log_prob(z), expected, rtol=0, atol=0)


def test_wrong_bases_are_refused():
    with pytest.raises(ValueError, match=r"df must be more than 1.*got 1"):
        flows.StudentT(2, df=1.0)
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        flows.GaussianMixture(3, 2, torch.ones(3))


def test_the_contract_is_abstract():
    for call in (lambda: flows.Base().sample(()), lambda: flows.Base().log_prob(torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            call()


def test_loft_is_the_logarithm_beyond_its_threshold():
    x = torch.tensor([-500.0, -100.0, 0.3, 101.0, 1e6])

    y, ladj = flows.Loft()(x)

    beyond = (x.abs() - 100).clamp_min(0)
    torch.testing.assert_close(y, x.sign() * ((beyond + 1).log() + x.abs().clamp_max(100)))
    torch.testing.assert_close(ladj, -(beyond + 1).log().sum())


def test_loft_s_inverse_has_minus_its_log_determinant():
    x = torch.tensor([[150.0, -1e3], [20.0, 1e5]])

    y, ladj = flows.Loft()(x)
    back, inverse = flows.Loft().inverse(y)

    torch.testing.assert_close(back, x)
    assert (ladj < -3).all()
    torch.testing.assert_close(inverse, -ladj)


def test_loft_comes_back_from_beyond_the_largest_number():
    x, _ = flows.Loft().inverse(torch.tensor([1e4, -1e4]))

    assert x.isfinite().all()
    torch.testing.assert_close(flows.Loft()(x)[0], torch.tensor([1e4, -1e4]))


def test_sinh_arcsinh_skews_and_stretches():
    layer = flows.SinhArcsinh(2)
    with torch.no_grad():
        layer.params.value.copy_(torch.tensor([0.5, 0.0, 0.0, 0.5]))
    x = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]])

    y, _ = layer(x)

    assert y[1, 0] > 0 and y[2, 0] - y[1, 0] > y[1, 0] - y[0, 0]
    torch.testing.assert_close(y[0, 1], -y[2, 1])
    assert y[2, 1] > 2 * x[2, 1]
