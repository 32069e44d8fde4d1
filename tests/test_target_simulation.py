"""Draws from the prior and simulated data have the distribution of the model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor
from zoo import ZOO, Case

from flowvi.targets import ModelError, Target, from_pyro

# These reject proposals until they accept, which no graph can record.
LOOPS = ("von_mises",)
SIMULATED = [name for name, build in ZOO.items() if build().simulates]
DRAWS, PYROS = 4000, 1000

pytestmark = [
    pytest.mark.filterwarnings("ignore:Singular sample detected"),
    pytest.mark.filterwarnings("ignore:Simulating one draw at a time:UserWarning"),
]


def captured(name: str) -> tuple[Case, Target]:
    torch.manual_seed(0)
    case = ZOO[name]()
    return case, from_pyro(case.model, *case.args, **case.kwargs)


@pytest.mark.parametrize("name", SIMULATED)
def test_prior_draws_have_the_shapes_and_supports_of_the_sites(name):
    _, target = captured(name)

    draws = target.prior(5, seed=0)

    assert set(draws) == {*target.sites, *target.deterministics, *target.observed}
    z = target.unconstrain({site: draws[site] for site in target.sites})
    assert z.isfinite().all() and z.shape == (5, target.dim)
    assert len(z.unique(dim=0)) == 5
    for site, value in target.constrain(z).items():
        assert draws[site].shape == tuple(value.shape)
        if name == "imputed_by_obs_mask" and site == "y":
            continue  # its observed rows are data there, and simulated here
        torch.testing.assert_close(torch.as_tensor(draws[site]).to(value), value)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_data_look_like_the_data(name):
    _, target = captured(name)
    z = 0.3 * torch.randn(4, target.dim)
    values = {site: value.numpy() for site, value in target.constrain(z).items()}

    first, again = (target.predictive(values, seed=1) for _ in range(2))

    assert set(first) == set(target.observed)
    for site, data in target.observed.items():
        value = torch.as_tensor(first[site])
        assert first[site].shape[-data.dim() :] == tuple(data.shape) or data.dim() == 0
        assert len(first[site]) == 4 and value.isfinite().all()
        np.testing.assert_array_equal(first[site], again[site])


def moments(draws: np.ndarray) -> np.ndarray:
    flat = np.tanh(draws.reshape(len(draws), -1))  # tails too heavy for moments are common
    return np.concatenate([flat, flat**2], 1)


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether means differ by less than five standard errors."""
    a, b = moments(a), moments(b)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    return bool((np.abs(a.mean(0) - b.mean(0)) < 5 * error + 1e-12).all())


@pytest.mark.parametrize(
    "name",
    [
        "nested_plates",
        "counts",
        pytest.param("categories", marks=pytest.mark.slow),
        "mixture_same_family",
        "enumerated_mixture",
        "enumerated_markov_chain",
        "scales_and_intervals",
        "dependent_bounds",
        "bayesian_network",
        "von_mises",
        "robust_regression",
    ],
)
def test_draws_have_the_distribution_that_pyro_draws_from(name):
    """But for LKJ matrices, which torch draws wrongly: test_samplers.py has them."""
    case, target = captured(name)
    n = 500 if name in LOOPS else DRAWS
    unseen = pyro.poutine.uncondition(case.model)

    draws = target.prior(n, seed=0)
    pyros = Predictive(unseen, num_samples=PYROS)(*case.args, **case.kwargs)

    for site in [*target.sites, *target.observed]:
        value = draws[site]
        assert agree(value, pyros[site].numpy().reshape(PYROS, *value.shape[1:])), site


def test_simulation_keeps_to_itself():
    """The caller's random state, data and parameter store are as they were."""
    case = ZOO["enumerated_mixture"]()
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    target = from_pyro(case.model, *case.args)
    values = target.prior(3, seed=0)
    target.predictive({name: values[name] for name in target.sites}, seed=0)

    assert torch.equal(torch.rand(3), expected)
    assert not dict(pyro.get_param_store())


def test_the_data_follow_the_given_values_and_not_the_prior():
    _, target = captured("eight_schools")
    values = {
        "mu": np.full(DRAWS, 100.0),
        "tau": np.full(DRAWS, 0.1),
        "eta": np.zeros((DRAWS, 8)),
    }

    y = target.predictive(values, seed=0)["y"]

    np.testing.assert_allclose(y.mean(0), 100.0, atol=5 * 18 / np.sqrt(DRAWS))
    np.testing.assert_allclose(y.std(0), target.constants["error"].numpy(), rtol=0.06)


def test_learned_parameters_are_those_of_the_moment():
    def model(y: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m + shift, 0.1), obs=y)

    target = from_pyro(model, torch.tensor(0.0))
    values = {"m": np.zeros(100)}
    before = target.predictive(values, seed=0)["y"]

    with torch.no_grad():
        next(target.parameters()).add_(10.0)
    after = target.predictive(values, seed=0)["y"]

    np.testing.assert_allclose(after - before, 10.0, rtol=1e-5)


def test_a_sampler_that_rejects_costs_a_loop_and_one_warning():
    _, target = captured("von_mises")

    with pytest.warns(UserWarning, match="one draw at a time") as caught:
        target.prior(10, seed=0)

    assert len(caught) == 1


def test_an_improper_prior_has_no_draws():
    _, target = captured("improper_location")

    with pytest.raises(ModelError, match="prior of 'm' is improper"):
        target.prior(3, seed=0)
    values = {"m": np.zeros(3), "s": np.ones(3)}
    assert target.predictive(values, seed=0)["y"].shape == (3, 5)


def test_a_distribution_that_cannot_draw_is_named():
    case = ZOO["discrete_hmm"]()
    target = from_pyro(case.model, *case.args, **case.kwargs)

    with pytest.raises(ModelError, match="'y' cannot be simulated"):
        target.prior(10, seed=0)


def test_what_a_model_asserts_of_simulated_data_is_its_own_error():
    y = torch.tensor([0.1, 0.2])

    def small() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2):
            drawn = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        assert drawn is y, "these are not the data"

    target = from_pyro(small)

    with pytest.raises(AssertionError, match="these are not the data"):
        target.prior(10, seed=0)
