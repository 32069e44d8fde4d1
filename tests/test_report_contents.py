"""A report shows first what a reader wants to see, in words that fit where it was made."""

import json
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.draws.draws import Draws
from flowvi.draws.selection import first_scalars, standardised
from flowvi.plots import plot_marginals, plot_predictive
from flowvi.plots.where import pair_of
from flowvi.reporting.contents import of_fit
from flowvi.reporting.page import page


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 5):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.deterministic("copy", theta)
        pyro.deterministic("one", torch.ones(5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(theta.exp()), obs=y)


@pytest.fixture(scope="module")
def fit():
    y = torch.poisson(torch.ones(20, 5)).long()
    target = flowvi.from_pyro(model, y).label({"group": ["a", "b", "c", "d", "e"]})
    return flowvi.fit(target, "fullrank", steps=10, compile=False, progress=False)


@pytest.fixture(scope="module")
def draws(fit):
    return fit.draw(500)


@pytest.fixture(scope="module")
def contents(fit):
    return of_fit(fit, 500, 0)


@pytest.fixture(scope="module")
def text(contents):
    return page(contents)


def words(text: str) -> str:
    plain = re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", plain).split())


def test_parameters_come_first_and_copies_constants_and_standardised_ones_are_left_out(draws):
    labels = [one.label for one in first_scalars(draws)]

    assert labels == ["mu", "tau", *(f"theta[{g}]" for g in "abcde")]
    assert standardised(draws) == {"eta"}


def test_latents_that_only_share_a_shape_are_kept():
    def plain():
        with pyro.plate("group", 5):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.deterministic("square", a**2)

    target = flowvi.from_pyro(plain)
    made = flowvi.fit(target, "meanfield", steps=5, compile=False, progress=False).draw(100)

    assert standardised(made) == set()


def test_the_table_folds_the_rest_away(text):
    main, folded = text.split("standardised or constant ones, and copies")

    assert "theta[c]" in main and ">eta[c]" not in main.split('id="posterior"')[1]
    assert ">eta[c]" in folded and "one[a]" in folded and "copy[a]" in folded
    assert "94 % HDI" in main and "MCSE" in main


def test_words_fit_python(text):
    said = words(text)

    assert "posterior.nc" not in said and "--restarts" not in said
    assert "fit.draw(4000)" in said and "restarts=2" in said


def test_prior_and_sensitivity_are_shown(contents, text):
    said = words(text)

    assert contents.sensitivity is not None and "Sensitivity to the prior" in said
    assert contents.prior is not None and contents.prior["theta"].shape == (1, 1000, 5)
    assert "under the prior and the posterior" in text


def test_many_scalars_are_counted(monkeypatch, contents):
    monkeypatch.setattr("flowvi.reporting.page.WHOLE", 3)

    said = words(page(contents))

    assert "7 scalars" in said and "4 more" in said


def test_counts_have_bars_of_whole_numbers():
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    ax = plot_predictive(rng.poisson(3.0, 200), rng.poisson(3.0, (50, 200)))

    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert np.allclose(centres, np.round(centres)) and len(set(np.round(centres))) == len(centres)
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1.0)
    wide = plot_predictive(rng.poisson(4000.0, 200), rng.poisson(4000.0, (50, 200)))
    assert len(wide.patches) <= 41
    plt.close("all")


def test_the_heaviest_weights_are_not_shown_against_their_own_logarithm():
    x = np.random.default_rng(0).gamma(2.0, size=100)
    columns = {"tau": x, "unconstrained tau": np.log(x), "mu": x[::-1]}

    assert pair_of(tuple(columns), columns) == ("tau", "mu")


def test_a_panel_is_as_wide_as_the_set_in_focus(draws):
    import matplotlib.pyplot as plt

    values = {name: 100 * value for name, value in draws.values.items()}
    wide = flowvi.Draws(draws.z, draws.log_p, draws.log_q, values, draws.target)
    sets = {"prior": wide, "posterior": draws}

    free, near = (plot_marginals(sets, ["mu"], focus=focus)[0, 0] for focus in ("", "posterior"))

    assert np.ptp(free.get_xlim()) > 20 * np.ptp(near.get_xlim())
    plt.close("all")


@pytest.mark.slow
def test_the_distribution_of_groups_is_no_prior_of_a_report():
    """Nor is that of standardised latents; what is scaled is said."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(())))
        with pyro.plate("group", len(y)):
            u = pyro.sample("u", dist.Normal(mu, tau))
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            v = pyro.deterministic("v", mu + tau * eta)
            pyro.sample("y", dist.Normal(u + v, 1.0), obs=y)

    fit = flowvi.fit(
        flowvi.from_pyro(model, torch.linspace(-1, 1, 6)), "meanfield", steps=1, progress=False
    )
    groups = flowvi.to_inference_data(fit.draw(400))
    assert json.loads(groups["log_prior"].attrs["hierarchical"]) == ["u"]

    contents = of_fit(fit, 400, 0)

    assert contents.sensitivity.scaled == ("mu", "tau")
    labels = {label.partition("[")[0] for label in contents.sensitivity.labels}
    assert labels == {"mu", "tau", "u", "v"}
    said = "priors of mu, tau; the distribution of u, eta is taken as part of the model."
    assert said in words(page(contents))


def test_what_the_other_elements_of_a_correlation_factor_determine_is_left_out():
    r = np.linspace(-0.9, 0.9, 50)
    factor = np.zeros((1, 50, 2, 2))
    factor[..., 0, 0], factor[0, :, 1, 0], factor[0, :, 1, 1] = 1.0, r, np.sqrt(1 - r**2)
    ordinary = factor * np.array([2.0, 1.0])[:, None]
    for value, labels in ((factor, ["L[1, 0]"]), (ordinary, ["L[1, 0]", "L[1, 1]"])):
        target = flowvi.from_density(lambda v: -v["x"].square(), {"x": flowvi.Site()})
        draws = Draws(r[None, :, None], r[None], r[None], {"L": value}, target, {})
        assert [one.label for one in first_scalars(draws)] == labels
