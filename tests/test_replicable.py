"""A model that was captured once serves other data as a capture of its own would."""

import numpy as np
import pyro
import pytest
import torch
from test_target import captured
from zoo import ZOO

import flowvi
from flowvi.targets import ModelError, replicable
from flowvi.targets.recording import program

SIMULATED = [name for name, build in ZOO.items() if build().simulates]
# Data that are read into Python, or have other names or shapes where they are simulated.
REFUSED = {
    "data_decides_the_branch",
    "multinomial_of_one_vector",
    "scalar_observed_in_a_plate",
    "reparametrised_model",
    "directions",
}

pytestmark = pytest.mark.filterwarnings("ignore")


def once(name):
    torch.manual_seed(0)
    case = ZOO[name]()
    return case, replicable(case.model, *case.args, **case.kwargs)


# A third of the models; all of them take most of a minute.
SOME = [
    pytest.param(name, marks=[] if i % 3 == 0 else [pytest.mark.slow])
    for i, name in enumerate(SIMULATED)
]


@pytest.mark.parametrize("name", SOME)
def test_other_data_have_the_density_of_a_capture_of_their_own(name):
    whole = captured(name)[1]
    if whole.subsampled or not whole.observed or whole.improper:
        with pytest.raises(ModelError):
            once(name)[1].prior(1, seed=1)
        return
    try:
        case, target = once(name)
    except ModelError:
        assert name in REFUSED
        return
    drawn = target.prior(1, seed=1)
    data = {site: torch.as_tensor(drawn[site][0]).to(t) for site, t in target.observed.items()}
    model = pyro.poutine.condition(case.model, data=data)
    alone = flowvi.from_pyro(model, *case.args, **case.kwargs)
    z = 0.3 * torch.randn(3, target.dim, dtype=target.dtype)

    found = target.observing(data)

    for _ in range(program.PATIENCE + 2):
        torch.testing.assert_close(found.log_prob(z).to(alone.dtype), alone.log_prob(z))
    torch.testing.assert_close(target.log_prob(z), whole.log_prob(z).to(target.dtype))
    for site, value in found.observed.items():
        np.testing.assert_array_equal(value.numpy(), data[site].numpy())


def schools():
    return once("eight_schools")[1]


def test_gradients_follow_the_data():
    target = schools()
    other = target.observing({"y": target.observed["y"] + 5.0})
    z = torch.zeros(2, target.dim, requires_grad=True)

    gradients = [torch.autograd.grad(t.log_prob(z).sum(), z)[0] for t in (target, other)] * 6

    assert not torch.allclose(gradients[0], gradients[1])
    assert torch.allclose(gradients[-1], gradients[1])


@pytest.mark.parametrize("data", [{}, {"x": torch.zeros(8)}, {"y": torch.zeros(7)}])
def test_data_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match=r"observing needs values|observes values of shape"):
        schools().observing(data)


def test_a_target_that_was_captured_with_its_data_keeps_them():
    target = captured("eight_schools")[1]

    with pytest.raises(ValueError, match="no site"):
        target.observing(target.observed)
