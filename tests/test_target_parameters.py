"""Parameters of a model are parameters of its target: trained, constrained, and nobody else's."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from reference import log_joint, with_gradient
from torch import Tensor, nn
from torch.distributions import constraints
from zoo import ZOO

from flowvi.targets import from_pyro

WITH_PARAMETERS = [name for name, build in ZOO.items() if build().params]


def captured(name):
    torch.manual_seed(0)
    case = ZOO[name]()
    return case, from_pyro(case.model, *case.args, **case.kwargs)


def perturb(target) -> None:
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_parameters_are_the_target_s_and_pyro_s_store_is_empty(name):
    _, target = captured(name)

    assert all(p.requires_grad and p.is_leaf for p in target.parameters())
    assert len(list(target.parameters())) == len(target.state_dict()) > 0
    assert not dict(pyro.get_param_store())


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_density_follows_the_parameters(name):
    """After a change, the target has the density of the model with its new parameters."""
    case, target = captured(name)
    z = torch.randn(3, target.dim)
    before = target.log_prob(z)

    perturb(target)
    fresh = from_pyro(case.model, *case.args, **case.kwargs)
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), target.parameters(), strict=True):
            p.copy_(q)

    assert not torch.allclose(target.log_prob(z), before)
    torch.testing.assert_close(target.log_prob(z), fresh.log_prob(z))


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_gradients_reach_the_parameters(name):
    _, target = captured(name)
    z = torch.randn(3, target.dim)

    def slope(p: Tensor, direction: Tensor) -> Tensor:
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                p.add_(step * direction)
                values.append(target.log_prob(z).sum())
        with torch.no_grad():
            p.add_(1e-5 * direction)
        return (values[0] - values[1]) / 2e-5

    for p in target.parameters():
        (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), p)
        direction = torch.randn_like(p)
        torch.testing.assert_close(
            (gradient * direction).sum(), slope(p, direction), rtol=1e-5, atol=1e-5
        )


def test_a_module_is_trained_where_it_stands():
    """What a fit learns is in the user's own module, and Pyro sees it."""
    case, target = captured("learned_and_random_weights")
    z = torch.randn(2, target.dim)

    perturb(target)

    own = {id(p) for p in target.parameters()}
    assert {id(p) for p in case.model.parameters()} == own
    for point in z:
        expected = with_gradient(lambda z: log_joint(case, target, z), point)
        torch.testing.assert_close(
            with_gradient(target.log_prob, point), expected, rtol=1e-8, atol=1e-8
        )


def test_values_and_likelihoods_follow_the_parameters():
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", m * scale)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    target = from_pyro(model, torch.tensor(0.5))
    z = torch.ones(1, 1)
    assert target.constrain(z)["mean"].item() == pytest.approx(2.0)
    before = target.log_likelihood(z)["y"].item()

    with torch.no_grad():
        next(target.parameters()).fill_(torch.tensor(0.5).log())

    assert target.constrain(z)["mean"].item() == pytest.approx(0.5)
    assert target.log_likelihood(z)["y"].item() > before


def test_a_store_that_is_in_use_is_left_alone():
    held = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive).item()

    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    target = from_pyro(model, torch.tensor(0.5))
    perturb(target)
    target.log_prob(torch.zeros(2, 1))

    assert pyro.param("scale").item() == held
    assert list(pyro.get_param_store()) == ["scale"]


def test_two_targets_of_one_model_share_no_parameter():
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    one, two = (from_pyro(model, torch.tensor(0.5)) for _ in range(2))
    before = two.log_prob(torch.zeros(1))

    perturb(one)

    assert torch.equal(two.log_prob(torch.zeros(1)), before)


def test_module_local_parameters():
    pyro.settings.set(module_local_params=True)
    try:
        _, target = captured("learned_and_random_weights")
        assert len(list(target.parameters())) == 4
        perturb(target)
        assert target.log_prob(torch.zeros(3, target.dim)).isfinite().all()
    finally:
        pyro.settings.set(module_local_params=False)


def test_frozen_parameters_are_constants():
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, y: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, self.fixed))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    target = from_pyro(Model(), torch.tensor(0.5))

    assert not list(target.parameters())
    assert target.density.lowers


@pytest.mark.parametrize("cast", ["float", "double", "half"])
@pytest.mark.parametrize("name", ["eight_schools", "registered_module"])
def test_a_cast_leaves_the_precision_alone(name, cast):
    _, target = captured(name)
    z = torch.randn(3, target.dim)
    before = target.log_prob(z)

    getattr(target, cast)()

    assert target.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in target.parameters())
    torch.testing.assert_close(target.log_prob(z), before)


def test_copies():
    """Without parameters a target can be copied; with them a copy would not follow its model."""
    _, fixed = captured("eight_schools")
    _, learned = captured("registered_module")
    z = torch.randn(3, fixed.dim)

    again = copy.deepcopy(fixed)

    torch.testing.assert_close(again.log_prob(z), fixed.log_prob(z))
    again.label({"school": list("abcdefgh")})
    assert not fixed.coords
    with pytest.raises(TypeError, match="parameters of its own"):
        copy.deepcopy(learned)


def test_a_captured_module_can_still_be_saved():
    case, _ = captured("learned_and_random_weights")

    torch.save(case.model.body, io.BytesIO())
