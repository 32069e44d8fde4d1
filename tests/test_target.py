"""A target has the density of its model, and gives its values back."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from reference import log_joint, log_likelihood, values_of, with_gradient
from torch import Tensor
from zoo import ZOO, Case

from flowvi.targets import Target, from_pyro
from flowvi.targets.recording.capture import agree

POINTS = 3

# torch tests the samples of a Wishart distribution the wrong way round.
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


def captured(name: str) -> tuple[Case, Target]:
    torch.manual_seed(0)
    case = ZOO[name]()
    return case, from_pyro(case.model, *case.args, **case.kwargs)


def somewhere(target: Target, n: int = POINTS) -> Tensor:
    """Random points at which the density is finite."""
    z = 0.7 * torch.randn(20 * n, target.dim, dtype=target.dtype)
    return z[target.log_prob(z).isfinite()][:n].clone()


def value_and_gradient(target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    log_p = target.log_prob(z)
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    return log_p.detach(), gradient


def rounding(case: Case) -> float:
    """What a case that holds tensors of the default precision loses by it."""
    single = case.holds and torch.get_default_dtype() == torch.float32
    return 1e-4 if single else 1e-6


def close(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ZOO)
def test_density_and_gradient_are_the_model_s(name, default):
    case, target = captured(name)
    z = somewhere(target)

    expected = [with_gradient(lambda z: log_joint(case, target, z), row) for row in z]
    log_p, gradient = value_and_gradient(target, z)

    assert target.density.batched.how == case.how
    assert target.dtype == torch.float64
    assert len(z) == POINTS
    close(log_p, torch.stack([value.double() for value, _ in expected]), rounding(case))
    close(gradient, torch.stack([g for _, g in expected]), rounding(case))


@pytest.mark.parametrize("name", ZOO)
def test_every_way_of_evaluating_agrees(name):
    """Rows alone, batches of any shape, and the lowered program that the second call makes."""
    _, target = captured(name)
    z = somewhere(target, 4)
    first = value_and_gradient(target, z)

    second = value_and_gradient(target, z)
    elsewhere = value_and_gradient(target, z.flip(0) * 0.9)
    _, fresh = captured(name)
    one_by_one = [value_and_gradient(fresh, row) for row in z.flip(0) * 0.9]
    grid = fresh.log_prob(z.reshape(2, 2, -1)).reshape(-1)
    without_gradient = [target.log_prob(z.detach()) for _ in range(2)][1]

    for i in range(2):
        close(second[i], first[i], 1e-10)
        close(elsewhere[i], torch.stack([row[i] for row in one_by_one]), 1e-10)
    close(grid.detach(), first[0], 1e-10)
    close(without_gradient.detach(), first[0], 1e-10)


@pytest.mark.parametrize("name", ZOO)
def test_values_are_the_model_s_and_map_back(name, default):
    case, target = captured(name)
    z = somewhere(target)

    values = target.constrain(z)
    z_back = target.unconstrain(values)

    close(z_back, z)
    assert list(values) == [*target.sites, *target.deterministics]
    assert {v.dtype for v in values.values()} <= {torch.float64, torch.int64, torch.bool}
    for name, site in target.sites.items():
        assert values[name].shape == (POINTS, *site.shape)
        assert site.support.check(values[name]).all() or "a" in target.sites
    if case.enumerated:
        return
    for row, point in enumerate(z):
        expected = values_of(case, target, point)
        for name, value in values.items():
            close(value[row].to(expected[name].dtype), expected[name], rounding(case))


@pytest.mark.parametrize("name", ZOO)
def test_every_axis_has_a_name(name):
    _, target = captured(name)
    shapes = {n: v.shape[1:] for n, v in target.constrain(somewhere(target)).items()}
    shapes |= {n: v.shape for n, v in (target.observed | target.constants).items()}

    assert set(target.dims) == set(shapes)
    for name, shape in shapes.items():
        assert len(target.dims[name]) == len(set(target.dims[name])) == len(shape)


@pytest.mark.parametrize("name", ZOO)
def test_rows_of_the_likelihood_sum_to_what_the_data_add(name, default):
    case, target = captured(name)
    z = somewhere(target)
    expected = torch.stack([log_likelihood(case, target, point) for point in z])

    rows = target.log_likelihood(z)

    assert set(rows) == (set(target.observed) if case.rows else set())
    for site, value in rows.items():
        assert len(target.dims[site]) >= value.dim() - 1 or target.observed[site].dim() == 0
    if rows:
        found = sum(value.reshape(POINTS, -1).sum(-1) for value in rows.values())
        close(found, expected.double(), rounding(case))


@pytest.mark.parametrize("name", [name for name, build in ZOO.items() if build().twice])
def test_second_derivatives_are_those_of_the_gradient(name):
    _, target = captured(name)
    z = somewhere(target, 1)
    value_and_gradient(target, z)
    direction = torch.randn_like(z)

    def slope(z: Tensor) -> Tensor:
        return (value_and_gradient(target, z)[1] * direction).sum()

    z.requires_grad_()
    (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), z, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), z)
    step = 1e-5
    differences = (slope(z + step * direction) - slope(z - step * direction)) / (2 * step)

    found = (product * direction).sum()
    torch.testing.assert_close(found, differences.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ZOO)
def test_single_precision_points_give_single_precision_numbers(name):
    _, target = captured(name)
    z = somewhere(target)

    log_p, gradient = value_and_gradient(target, z.float())

    assert log_p.dtype == gradient.dtype == torch.float32
    close(log_p.double(), target.log_prob(z).detach(), 1e-3)


def test_double_data_with_single_priors_are_evaluated_in_double():
    """The model's own slope is single then: it is compared as such."""
    value, slope = torch.zeros(1, dtype=torch.float64), torch.full((3,), 1e4, dtype=torch.float32)
    assert agree((value, slope), (value, slope.double() * (1 + 3e-7)))
    assert not agree((value, slope.double()), (value, slope.double() * (1 + 3e-7)))

    def counts(y, x):
        level = pyro.sample("level", dist.Normal(2.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            own = pyro.sample("own", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((level + slope * x + spread * own + 5).exp()), obs=y)

    torch.set_default_dtype(torch.float32)
    x = np.linspace(-1.0, 1.0, 40)
    target = from_pyro(counts, np.arange(40) * 10, x)

    assert target.dtype == torch.float64
