"""A plain log density of named values becomes the same kind of target as a Pyro model."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from reference import with_gradient
from scipy.special import gammaln
from torch import Tensor

from flowvi.targets import ModelError, Site, from_density, from_pyro
from flowvi.targets.pyro.bijections import bijection

SITES = {
    "mu": Site(),
    "tau": Site(support=constraints.positive),
    "eta": Site((8,), dims=("school",)),
}
EFFECT = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
ERROR = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]

SUPPORTS = {
    "real": (constraints.real, (2, 3)),
    "positive": (constraints.positive, (3,)),
    "interval": (constraints.interval(-1.0, 2.0), ()),
    "greater": (constraints.greater_than(2.0), (2,)),
    "simplex": (constraints.simplex, (2, 4)),
    "ordered": (constraints.ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr_matrix": (constraints.corr_matrix, (3, 3)),
    "lower_cholesky": (constraints.lower_cholesky, (2, 3, 3)),
    "unit_cholesky": (constraints.unit_lower_cholesky, (3, 3)),
    "positive_definite": (constraints.positive_definite, (3, 3)),
    "vector": (constraints.independent(constraints.positive, 1), (4,)),
}


def eight_schools(values: dict[str, Tensor]) -> Tensor:
    effect, error = torch.tensor(EFFECT), torch.tensor(ERROR)
    mu, tau, eta = values["mu"], values["tau"], values["eta"]
    return (
        dist.Normal(0.0, 5.0).log_prob(mu)
        + dist.HalfCauchy(5.0).log_prob(tau)
        + dist.Normal(0.0, 1.0).log_prob(eta).sum()
        + dist.Normal(mu + tau * eta, error).log_prob(effect).sum()
    )


def test_it_is_the_target_of_the_same_model_in_pyro():
    import zoo

    case = zoo.ZOO["eight_schools"]()
    target, other = from_density(eight_schools, SITES), from_pyro(case.model, *case.args)
    z = torch.randn(5, 10)

    for _ in range(2):
        torch.testing.assert_close(
            with_gradient(lambda z: target.log_prob(z).sum(), z),
            with_gradient(lambda z: other.log_prob(z).sum(), z),
        )
    assert list(target.sites) == list(other.sites) and target.slices == other.slices
    assert target.dims == {"mu": (), "tau": (), "eta": ("school",)}
    assert target.observed == {} and target.log_likelihood(z) == {}


@pytest.mark.parametrize("name", SUPPORTS)
def test_every_support_keeps_its_volume(name):
    """Values lie in the support, map back, and bring the log Jacobian of their free entries."""
    support, shape = SUPPORTS[name]
    target = from_density(lambda v: -0.1 * v["x"].square().sum(), {"x": Site(shape, support)})
    z = torch.randn(4, target.dim)

    values = target.constrain(z)["x"]

    assert values.shape == (4, *shape) and support.check(values).all()
    torch.testing.assert_close(target.unconstrain({"x": values}), z)
    for row, point in enumerate(z):
        jacobian = torch.autograd.functional.jacobian(
            lambda z: _free(name, target.constrain(z)["x"]), point
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet - 0.1 * values[row].square().sum()
        torch.testing.assert_close(target.log_prob(point), expected)


def _free(name: str, x: Tensor) -> Tensor:
    if name == "simplex":
        return x[..., :-1].reshape(-1)
    if name.startswith(("corr", "unit", "lower", "positive_definite")):
        strict = name.startswith(("corr", "unit"))
        rows, columns = torch.tril_indices(x.shape[-1], x.shape[-1], -1 if strict else 0)
        return x[..., rows, columns].reshape(-1)
    return x.reshape(-1)


def test_matrices_keep_their_gradient():
    """The transforms of our own have no cache and no branch: their inverses are exact."""
    for support in (constraints.lower_cholesky, constraints.positive_definite):
        transform = bijection(support)
        x = torch.randn(2, 6, requires_grad=True)

        y = transform(x)

        assert torch.autograd.gradcheck(transform, x)
        torch.testing.assert_close(transform.inv(y), x)
        assert transform.forward_shape(x.shape) == y.shape
        assert transform.inverse_shape(y.shape) == x.shape


class LogGamma(torch.autograd.Function):
    """A function that leaves torch on its way, and brings its own derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.as_tensor(gammaln(x.detach().numpy()))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return upstream * torch.digamma(x)


def test_numpy_inside_a_function_with_a_derivative():
    def density(values):
        x = values["x"]
        return (2 * x.log() - x + LogGamma.apply(x)).sum() - x.square().sum()

    def in_torch(values):
        x = values["x"]
        return (2 * x.log() - x + torch.lgamma(x)).sum() - x.square().sum()

    sites = {"x": Site((3,), constraints.positive)}
    with pytest.warns(UserWarning, match="density one draw at a time") as caught:
        target = from_density(density, sites)
    expected = from_density(in_torch, sites)
    z = torch.randn(4, 3)

    for _ in range(2):
        torch.testing.assert_close(
            with_gradient(lambda z: target.log_prob(z).sum(), z),
            with_gradient(lambda z: expected.log_prob(z).sum(), z),
        )
    assert len(caught) == 1 and target.density.batched.how == "loop"
    torch.testing.assert_close(target.constrain(z), expected.constrain(z))


def test_a_branch_in_python():
    def density(values):
        x = values["x"]
        return -x.square() if x > 0 else -2 * x.square()

    with pytest.warns(UserWarning, match=r"one draw at a time.*test_from_density.py:\d+"):
        target = from_density(density, {"x": Site()})
    z = torch.tensor([[1.0], [-1.0]])

    value, gradient = with_gradient(lambda z: target.log_prob(z).sum(), z)

    assert value == -3.0 and gradient.tolist() == [[-2.0], [4.0]]


def test_a_gradient_that_is_lost_is_refused():
    def detached(values):
        x = values["x"].detach().numpy()
        return torch.as_tensor(-(x**2).sum()) + 0 * values["x"].sum()

    with pytest.raises(ModelError, match="gradient of detached is not the slope"):
        from_density(detached, {"x": Site((3,))})


def test_a_function_that_maps_but_cannot_be_recorded():
    def density(values):
        assert values["x"].numpy is not None
        return torch.func.vmap(lambda row: -row.square().sum())(values["x"]).sum()

    target = from_density(density, {"x": Site((3, 2))})

    assert target.log_prob(torch.ones(6)).item() == -6.0


def test_callables_of_every_kind_have_a_name():
    class Density:
        def __call__(self, values):
            return -values["x"].square()

    assert from_density(Density(), {"x": Site()}).name == "Density"
    assert from_density(lambda v: -v["x"].square(), {"x": Site()}).name == "<lambda>"


def test_single_precision_is_evaluated_in_double():
    torch.set_default_dtype(torch.float32)

    target = from_density(eight_schools, SITES)

    assert target.dtype == torch.float64
    assert target.log_prob(torch.zeros(2, 10)).dtype == torch.float32


REFUSED = {
    "two numbers": (lambda v: -v["x"].square(), {"x": Site((2,))}, r"shape \(\); got \(2,\)"),
    "a float": (lambda v: -1.0, {"x": Site()}, r"shape \(\); got float"),
    "no site": (lambda v: torch.zeros(()), {}, "at least one site"),
    "a sphere": (
        lambda v: torch.zeros(()),
        {"x": Site((3,), constraints.sphere)},
        "'x' has support Sphere",
    ),
    "a discrete site": (
        lambda v: torch.zeros(()),
        {"k": Site((), constraints.boolean)},
        "'k'.*Boolean",
    ),
    "nothing finite": (
        lambda v: v["x"] * torch.nan,
        {"x": Site()},
        "not finite at any",
    ),
    "random": (
        lambda v: -v["x"].square() + torch.randn(()),
        {"x": Site()},
        r"random numbers.*test_from_density.py:\d+",
    ),
    "a shape that does not fit": (
        lambda v: v["x"].sum(),
        {"x": Site((3, 2), constraints.corr_cholesky)},
        "'x' has shape",
    ),
    "dims that do not fit": (
        lambda v: v["x"].sum(),
        {"x": Site((3,), dims=("a", "b"))},
        "'x'.*dims",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    density, sites, message = REFUSED[what]

    with pytest.raises(ModelError, match=message):
        from_density(density, sites)


def test_there_is_nothing_to_simulate():
    target = from_density(eight_schools, SITES)

    with pytest.raises(ModelError, match="no prior"):
        target.prior(3, seed=0)
    with pytest.raises(ModelError, match="cannot simulate"):
        target.predictive({"mu": np.zeros(3)}, seed=0)


def test_points_to_start_from_are_finite():
    target = from_density(eight_schools, SITES)

    with warnings.catch_warnings():
        starts = target.starts(torch.Generator().manual_seed(0))

    assert starts.shape[1] == 10 and target.log_prob(starts).isfinite().all()
    assert 1 <= target.chunk() <= 2000
