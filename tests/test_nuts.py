"""NUTS samples any target without a fit, and a picture compares it with a fit."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.plots import plot_compare


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


@pytest.fixture(scope="module")
def target():
    return flowvi.from_pyro(model, torch.linspace(-1.0, 2.0, 12))


@pytest.fixture(scope="module")
def chains(target):
    return flowvi.nuts(target, 150, 250, 2, progress=False)


@pytest.fixture(scope="module")
def draws(target):
    return flowvi.fit(target, "fullrank", steps=60, compile=False, progress=False).draw(2000)


def test_it_samples_the_posterior(target, chains):
    weights = np.exp(chains.log_p - chains.log_p.max())
    # By quadrature over a grid of the unconstrained vector.
    axes = torch.linspace(-1.5, 2.5, 201), torch.linspace(-1.5, 1.5, 201)
    grid = torch.cartesian_prod(*axes)
    density = target.log_prob(grid.to(target.dtype)).softmax(0)
    mean = (density[:, None] * grid).sum(0)
    sd = ((density[:, None] * (grid - mean) ** 2).sum(0)).sqrt()

    ess = flowvi.diagnose(chains).ess
    error = (torch.as_tensor(chains.z).flatten(0, 1).mean(0) - mean) / sd

    assert chains.z.shape == (2, 250, 2) and np.isfinite(weights).all()
    assert (error.abs() < 4.5 / math.sqrt(ess)).all()


def test_its_draws_are_those_of_chains_without_a_guide(draws, chains):
    found = flowvi.diagnose(chains)

    assert chains.mcmc and "guide" not in chains.title and "NUTS" in chains.title
    assert math.isfinite(found.rhat) and math.isnan(found.elbo)
    assert np.isnan(chains.log_q).all()
    assert "r_hat" in chains.summary()
    assert flowvi.to_inference_data(chains).posterior.sizes["chain"] == 2
    with pytest.raises(ValueError, match=re.escape("neutra(fit)")):
        flowvi.evidence(draws, chains)


def test_a_seed_gives_the_same_chains(target):
    one, two = (flowvi.nuts(target, 100, 100, 2, seed=3, progress=False) for _ in range(2))

    np.testing.assert_array_equal(one.z, two.z)


def test_a_density_far_from_zero_is_started_at_a_draw_of_the_prior():
    def narrow():
        x = pyro.sample("x", dist.Uniform(100.0, 101.0))
        pyro.factor("wall", torch.where((x > 100.2), x * 0, x * 0 - math.inf))

    found = flowvi.nuts(flowvi.from_pyro(narrow), 100, 100, 2, progress=False)

    assert (found["x"] > 100.2).all()


def test_targets_without_one_vector_are_refused(target):
    def rows(y):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(TypeError, match="without local="):
        flowvi.nuts(flowvi.from_pyro(rows, torch.zeros(3), local="row"))
    with pytest.raises(TypeError, match="target"):
        flowvi.nuts(model)
    with pytest.raises(ValueError, match="chains"):
        flowvi.nuts(target, chains=1)
    with pytest.raises(TypeError, match="Did you mean 'chains'"):
        flowvi.nuts(target, chain=2)


def test_a_picture_shows_both_and_their_differences(draws, chains):
    import matplotlib.pyplot as plt

    axes = plot_compare(draws, chains)

    titles = [ax.get_title() for ax in axes.flat]
    assert re.match(r"mu\nmean [+-]0\.\d\d ± 0\.\d\d sd, sd × [01]\.\d\d$", titles[0])
    legend = axes.flat[0].figure.legends[0]
    assert legend.get_texts()[0].get_text() == "NUTS"
    assert plot_compare(draws, chains, ["sigma"]).size == 1
    with pytest.raises(ValueError, match="Markov chains"):
        plot_compare(chains, draws)
    plt.close("all")


def test_a_picture_of_two_models_is_refused(draws):
    other = flowvi.from_density(lambda v: -0.5 * v["x"] ** 2, {"x": flowvi.Site()})

    with pytest.raises(ValueError, match="'mu' is among the draws of the fit"):
        plot_compare(draws, flowvi.nuts(other, 100, 100, 2, progress=False))
