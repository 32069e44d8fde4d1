"""Summaries, data frames and exports of draws agree with ArviZ, and counts stay counts."""

import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.compat.arviz_groups import make_groups, to_dataset
from flowvi.diagnostics.summary import hdi, mcse
from flowvi.interop.inference_data import split_into
from flowvi.interop.read_draws import draws_of, resample_groups

COUNTS = [3, 0, 2, 5, 1, 4]


def counted(y):
    """Counts and whether they are large; one group of each."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("group", 2):
        pyro.sample("odds", dist.Beta(6.0, 6.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)
        pyro.sample("large", dist.Bernoulli(0.5), obs=(y > 2).to(torch.get_default_dtype()))


@pytest.fixture(scope="module")
def fit():
    return flowvi.fit(
        flowvi.from_pyro(counted, torch.tensor(COUNTS)).label({"group": ["u", "v"]}),
        "fullrank",
        steps=20,
        compile=False,
        progress=False,
    )


@pytest.fixture(scope="module")
def draws(fit):
    return fit.draw(1000)


def shifted(draws):
    """The same draws with weights that move a mean by half a sd."""
    z = draws.z[..., 0]
    meta = {key: fact for key, fact in draws.meta.items() if key != "check"}
    log_p = draws.log_q + 0.5 * (z - z.mean()) / z.std()
    return flowvi.Draws(draws.z, log_p, draws.log_q, draws.values, draws.target, meta)


def test_intervals_and_errors_are_those_of_arviz():
    x = np.random.default_rng(0).gamma(2.0, size=(1000, 3))

    low, high = hdi(x, 0.94)
    mean, sd = mcse(x, np.full(3, 1000.0))

    theirs = np.stack([az.hdi(column, 0.94) for column in x.T])
    np.testing.assert_allclose(np.stack([low, high], axis=1), theirs)
    np.testing.assert_allclose(mean, x.std(0) / 1000**0.5)
    # The sd of the estimate of a sd, over many tables.
    many = np.random.default_rng(1).gamma(2.0, size=(1000, 4000)).std(0)
    np.testing.assert_allclose(sd, many.std(), rtol=0.1)


def test_intervals_of_few_or_undefined_draws():
    low, high = hdi(np.array([[1.0], [2.0]]), 0.94)
    assert (low, high) == (1.0, 2.0)
    assert np.isnan(hdi(np.array([[1.0], [np.nan], [2.0]]), 0.5)[0]).all()
    assert mcse(np.ones((5, 1)), np.array([5.0]))[1] == 0.0


def test_a_summary_has_a_labelled_line_for_every_scalar(draws):
    found = draws.summary()

    assert [*found.index] == ["rate", "odds[u]", "odds[v]"]
    assert found.loc["odds[v]", "mean"] == pytest.approx(draws["odds"][..., 1].mean())
    assert (found["draws"] == "plain").all() and (found["ess"] == 1000).all()
    assert [*found][:6] == ["mean", "sd", "hdi_3%", "hdi_97%", "mcse_mean", "mcse_sd"]
    assert [*draws.summary(0.5)][2:4] == ["hdi_25%", "hdi_75%"]
    with pytest.raises(ValueError, match="between 0 and 1; got 94"):
        draws.summary(94)


def test_a_summary_is_of_the_draws_that_the_verdict_recommends(draws):
    doubted = shifted(draws)

    found = doubted.summary()

    assert flowvi.diagnose(doubted).verdict == "trust the resampled draws"
    assert (found["draws"] == "resampled").all()
    again = flowvi.resample(doubted)
    assert found.loc["rate", "mean"] == pytest.approx(again["rate"].mean(), rel=1e-12)
    assert (found["ess"] < 500).all()
    assert (doubted.thinned(50).summary()["draws"] == "untrusted").all()


def test_a_data_frame_has_a_row_for_each_draw(draws):
    frame = draws.to_dataframe()

    assert [*frame] == ["chain", "draw", "rate", "odds[u]", "odds[v]", "log_weight"]
    assert len(frame) == 1000 and frame["draw"].iloc[-1] == 999
    np.testing.assert_array_equal(frame["odds[v]"], draws["odds"][0, :, 1])
    assert "log_weight" not in flowvi.resample(shifted(draws)).to_dataframe()


def test_draws_plot_themselves(draws):
    import matplotlib.pyplot as plt

    assert draws.plot().size == 3
    assert draws.plot(["rate"], kind="pair").shape == (1, 1)
    with pytest.raises(ValueError, match="kind"):
        draws.plot(kind="trace")
    plt.close("all")


def test_independent_draws_are_exported_as_four_chains(draws):
    idata = flowvi.to_inference_data(draws, predictive=200)

    assert idata.posterior.sizes["chain"] == 4 and idata.posterior.sizes["draw"] == 250
    assert idata.posterior_predictive.sizes["chain"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = az.summary(idata)
    assert (found["r_hat"] < 1.03).all() and (found["ess_bulk"] > 500).all()
    np.testing.assert_array_equal(idata.posterior["rate"].values.ravel(), draws["rate"].ravel())


def test_the_chains_are_one_guide_again_when_read(draws):
    idata = flowvi.to_inference_data(draws)
    back = draws_of(idata)

    assert back.log_p.shape == draws.log_p.shape
    np.testing.assert_array_equal(back["odds"], draws["odds"])
    assert flowvi.evidence(idata).log_evidence == flowvi.evidence(draws).log_evidence
    resampled = resample_groups(idata, seed=3)
    assert resampled.posterior.sizes["chain"] == 4
    assert draws_of(resampled)["rate"].shape == (1, 1000)


def test_any_number_of_draws_is_exported():
    assert [split_into(n) for n in (1000, 1001, 1003, 15, 1005)] == [4, 7, 4, 1, 5]


def test_a_prime_number_of_draws_loses_three_at_most(fit):
    idata = flowvi.to_inference_data(fit.draw(1003))
    assert idata.posterior.sizes["chain"] * idata.posterior.sizes["draw"] == 1000
    assert flowvi.to_inference_data(fit.draw(10)).posterior.sizes["chain"] == 1


def test_chains_and_restarts_stay_what_they_are(fit):
    chains = flowvi.neutra(fit, 100, 100, 2, progress=False)
    idata = flowvi.to_inference_data(chains)

    assert idata.posterior.sizes["chain"] == 2 and "split" not in idata.posterior.attrs
    assert "r_hat" in chains.summary()


def test_simulated_counts_are_integers(draws):
    target = draws.target
    simulated = target.predictive({name: draws[name][0, :5] for name in target.sites}, 0)
    predicted = flowvi.predict(draws.thinned(20), torch.tensor([1, 2, 3, 4, 5, 6]))
    idata = flowvi.to_inference_data(draws, predictive=100, prior=20)

    assert simulated["y"].dtype == np.int64 and target.prior(3, 0)["y"].dtype == np.int64
    assert predicted["y"].dtype == np.int64
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        dataset = to_dataset(idata[group])
        # Zeros and ones that were given as floating-point numbers are counts too.
        assert dataset["y"].dtype == dataset["large"].dtype == np.int64
    assert make_groups({"observed_data": to_dataset(idata["observed_data"])}) is not None


def test_whole_numbers_of_a_density_stay_what_they_were():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    target = flowvi.from_pyro(model, torch.tensor([1.0, 2.0, 3.0]))
    made = flowvi.fit(target, "fullrank", steps=5, compile=False, progress=False).draw(100)
    idata = flowvi.to_inference_data(made, predictive=20)

    assert idata.observed_data["y"].dtype.kind == idata.posterior_predictive["y"].dtype.kind == "f"


def test_counts_of_rows_are_integers():
    def model(y):
        with pyro.plate("row", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    target = flowvi.from_pyro(model, torch.tensor(COUNTS), local="row")

    assert target.prior(4)["y"].dtype == np.int64
    assert target.predictive(torch.zeros(2, 6, 1))["y"].dtype == np.int64
