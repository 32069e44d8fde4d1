"""A hopeless target is refused at once, by name; heavy tails and long axes are not hopeless."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import flowvi
from flowvi.initialization import candidates
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.initialization.preflight import check_integrable, check_size, density_drop, preflight
from flowvi.initialization.unbounded import find_collapse
from flowvi.targets import ModelError

Y = torch.tensor([1.3, 0.2, 0.9, 1.8, 0.4])


def flat(name: str) -> torch.Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.real, (), ()))


def only_the_sum() -> None:
    mean = flat("a") + flat("b")
    with pyro.plate("row", len(Y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def not_in_the_model() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    flat("b")
    with pyro.plate("row", len(Y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=Y)


def proper_all_the_same() -> None:
    a = flat("a")
    with pyro.plate("row", len(Y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=Y)


def cauchy() -> None:
    pyro.sample("c", dist.Cauchy(0.0, 1.0).expand([3]).to_event(1))


def horseshoe() -> None:
    t = pyro.sample("t", dist.HalfCauchy(1.0))
    width = pyro.sample("width", dist.HalfCauchy(1.0).expand([3]).to_event(1))
    pyro.sample("b", dist.Normal(0.0, t * width).to_event(1))


def long_axes() -> None:
    mean = pyro.sample("a", dist.Normal(0.0, 1e6)) + pyro.sample("b", dist.Normal(0.0, 1e6))
    with pyro.plate("row", len(Y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def start(target: flowvi.Target) -> candidates.GaussianApproximation:
    return candidates.best_gaussian(target, 0, False, lambda line: None)[0]


@pytest.mark.parametrize(
    ("model", "direction"), [(only_the_sum, "'a - b'"), (not_in_the_model, "'b'")]
)
def test_an_improper_posterior_is_refused_with_its_direction(model, direction):
    target = flowvi.from_pyro(model)

    with pytest.raises(ModelError, match=rf"{model.__name__} is improper.*along {direction}"):
        check_integrable(target, start(target))


@pytest.mark.parametrize("model", [proper_all_the_same, cauchy, horseshoe, long_axes])
def test_what_has_an_integral_is_not_refused(model):
    target = flowvi.from_pyro(model)

    assert "times the shortest" in check_integrable(target, start(target))


# Densities that have no bound, or rise where they should fall.


def constant_data(prior, width=None) -> flowvi.Target:
    def model(y):
        mu = flat("mu") if width is None else pyro.sample("mu", dist.Normal(0.0, width))
        sigma = pyro.sample("sigma", prior)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    return flowvi.from_pyro(model, torch.full((6,), 1.3))


def duplicated_rows() -> flowvi.Target:
    """Two rows, three times each: a line meets them exactly."""

    def model(x, y):
        a, b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in "ab")
        sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)

    x = torch.tensor([0.0, 1.0]).repeat(3)
    return flowvi.from_pyro(model, x, 1 + 2 * x)


def separated() -> flowvi.Target:
    def model(x, y):
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=flat("a") + flat("b") * x), obs=y)

    x = torch.arange(6.0) - 2.5
    return flowvi.from_pyro(model, x, (x > 0).to(x))


IMPROPER = dist.ImproperUniform(constraints.positive, (), ())


@pytest.mark.parametrize(
    ("prior", "width"),
    [
        (dist.HalfNormal(5.0), 10.0),
        (dist.HalfCauchy(5.0), 10.0),
        (IMPROPER, None),
    ],
)
def test_constant_data_of_an_unknown_scale_are_named(prior, width):
    target = constant_data(prior, width)

    with pytest.raises(ModelError, match="no bound as 'sigma' goes to zero") as caught:
        check_integrable(target, start(target))

    words = str(caught.value)
    assert "the data of the observed site 'y' are constant (all 6 are 1.3)" in words
    assert "Use data that vary" in words and "falls" not in words


def test_rows_that_a_model_meets_exactly_are_named():
    target = duplicated_rows()

    with pytest.raises(ModelError, match=r"'sigma' goes to zero, where .* 'y' exactly"):
        check_integrable(target, start(target))


def test_separated_data_are_named():
    target = separated()

    with pytest.raises(ModelError, match=r"does not fall.*'y' is certain.*separate the data"):
        check_integrable(target, start(target))


def test_a_density_that_rises_is_not_said_to_fall():
    target = flowvi.from_density(lambda v: 0.001 * v["x"], {"x": flowvi.Site()})
    far = GaussianApproximation(torch.zeros(1), torch.ones(1, 1), "given")

    with pytest.raises(ModelError, match=r"along 'x' its log density rises by 10 nats over 1e\+04"):
        check_integrable(target, far)


def test_a_scale_that_may_be_small_has_a_bound():
    """The prior vanishes at zero, or the data are noise of that size."""
    small = constant_data(dist.LogNormal(0.0, 1.0), 10.0)
    noise = torch.tensor([1.0, -2.0, 0.5, 1.5]) * 1e-6

    def model(y):
        sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    for target in (small, flowvi.from_pyro(model, noise)):
        assert "times the shortest" in check_integrable(target, start(target))


def test_a_funnel_has_a_bound_though_its_density_has_none():
    def model(y):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("row", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    target = flowvi.from_pyro(model, 0.1 * Y)
    # At a scale of e^-12, with the widths that a normal has there.
    loc = torch.tensor([-12.0, *[0.0] * len(Y)])
    widths = torch.tensor([1.0, *[math.exp(-12.0)] * len(Y)])

    assert find_collapse(target, GaussianApproximation(loc, torch.diag(widths), "given")) == ""


def test_a_fit_of_an_improper_posterior_stops_at_the_start():
    with pytest.raises(ModelError, match="Give these a proper prior"):
        flowvi.fit(flowvi.from_pyro(only_the_sum), steps=10, progress=False)


def test_the_look_says_where_the_density_is_not_finite():
    def log_density(values):
        x = values["x"]
        return torch.where(x > 0, -x, -torch.inf)

    found = preflight(flowvi.from_density(log_density, {"x": flowvi.Site()}), 0)

    assert not found.of_prior and found.points == 200
    assert abs(found.finite - 0.5) < 4 * math.sqrt(0.25 / 200)
    assert "of 200 random points" in str(found)


def test_the_look_uses_the_prior_where_there_is_one():
    found = preflight(flowvi.from_pyro(cauchy), 0)

    assert found.of_prior and found.finite == found.smooth == 1.0


def test_a_full_rank_base_beyond_memory_is_refused_with_a_remedy():
    check_size(2000, "fullrank")
    check_size(100_000, "realnvp")

    with pytest.raises(ValueError, match=r"100000 x 100000 numbers.*'lowrank'"):
        check_size(100_000, "fullrank")


def test_an_infinite_density_far_out_is_no_rise():
    """Rounding may make one of large numbers; it says nothing of an integral."""

    def normal_until_rounding(v):
        x = v["x"]
        return torch.where(x.abs() > 50, torch.inf, -0.5 * x**2)

    target = flowvi.from_density(normal_until_rounding, {"x": flowvi.Site()})

    assert density_drop(target, torch.zeros(1), torch.ones(1)) == math.inf
