"""Posterior SBC fits the data together with simulated ones; bands hold whole ECDFs."""

import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.analysis.replicates import WithReplicate
from flowvi.diagnostics.calibration import ecdf_band


def counts(y, exposure):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)
    with pyro.plate("other", 2):
        pyro.sample("b", dist.Bernoulli(0.3), obs=torch.tensor([1.0, 0.0]))
    return rate


Y, EXPOSURE = torch.tensor([2, 0, 3]), torch.tensor([1.0, 0.5, 2.0])
OTHER = {"y": torch.tensor([1, 1, 4]), "b": torch.tensor([0.0, 0.0])}


@pytest.fixture(scope="module")
def draws():
    target = flowvi.from_pyro(counts, Y, EXPOSURE)
    return flowvi.fit(target, "fullrank", steps=20, compile=False, progress=False).draw(500)


def test_the_density_counts_both_data_sets():
    one = flowvi.from_pyro(counts, Y, EXPOSURE)
    both = flowvi.from_pyro(pickle.loads(pickle.dumps(WithReplicate(counts, OTHER))), Y, EXPOSURE)
    z = torch.linspace(-1.0, 2.0, 5, dtype=one.dtype)[:, None]

    rate = z.exp() * EXPOSURE
    more = dist.Poisson(rate).log_prob(OTHER["y"]).sum(-1) + 2 * math.log(0.7)

    torch.testing.assert_close(
        both.log_prob(z), one.log_prob(z) + more.to(one.dtype), rtol=1e-5, atol=1e-5
    )


def test_masks_scales_and_events_count_twice_too():
    def model(x, mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2), pyro.poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([2, 3]).to_event(1), obs=x)

    x, mask = torch.randn(2, 3), torch.tensor([True, False])
    other = torch.randn(2, 3)
    one = flowvi.from_pyro(model, x, mask)
    both = flowvi.from_pyro(WithReplicate(model, {"x": other}), x, mask)
    z = torch.zeros(1, 1, dtype=one.dtype)

    more = dist.Normal(0.0, 1.0).log_prob(other[0]).sum().item()
    assert both.log_prob(z).item() == pytest.approx(one.log_prob(z).item() + more, rel=1e-5)


@pytest.mark.slow
def test_truths_are_draws_of_the_posterior_and_ranks_are_counted(draws):
    settings = {"guide": "fullrank", "steps": 5, "progress": False, "levels": 50}

    found = flowvi.sbc(draws=draws, fits=4, **settings)

    assert found.labels == ("rate",) and found.plain.shape == (4, 1)
    assert not found.failures and "Too few fits" in str(found)
    # Without the data at hand, the truths would be those of the prior, of sd 1.4.
    assert ((found.probabilities > 0.001) & (found.probabilities < 0.999)).all()
    np.testing.assert_array_equal(flowvi.sbc(draws, fits=4, **settings).plain, found.plain)


def test_an_exact_guide_is_calibrated_and_a_shifted_one_is_not(draws, monkeypatch):
    """The conjugate posterior stands in for the fit, so that many fits cost little."""
    from flowvi.analysis import sbc as module

    shift = 0.0

    def outcome(task, shared):
        rng = np.random.default_rng(task.number)
        more = task.common.model.replicate["y"].sum().item()
        shape, rate = 2 + Y.sum().item() + more, 1 + 2 * EXPOSURE.sum().item()
        sampled = rng.gamma(shape, 1 / rate, 100) + shift
        below = (sampled < task.truth["rate"]).sum()
        column = np.array([below])
        return module.Outcome(
            task.number, ("rate",), column, column, (column + 0.5) / 101, "trust", ""
        )

    exact = np.random.default_rng(1).gamma(2 + 5, 1 / (1 + 3.5), (1, 500))
    table = flowvi.Draws(
        np.log(exact)[..., None],
        np.zeros((1, 500)),
        np.zeros((1, 500)),
        {"rate": exact},
        draws.target,
    )
    monkeypatch.setattr(module, "_fit_task", outcome)

    good = flowvi.sbc(draws=table, fits=300, levels=100, progress=False)
    shift = 0.3
    bad = flowvi.sbc(draws=table, fits=300, levels=100, progress=False)

    assert good.uniform["plain"] > 0.01
    assert bad.uniform["plain"] < 1e-4 and str(bad).startswith("Not calibrated")


def test_arguments_that_do_not_go_together_are_refused(draws):
    plain = flowvi.from_density(lambda v: -0.5 * v["x"] ** 2, {"x": flowvi.Site()})
    density = flowvi.fit(plain, "meanfield", steps=5, compile=False, progress=False).draw(200)

    with pytest.raises(TypeError, match="leave out the model"):
        flowvi.sbc(counts, Y, EXPOSURE, draws=draws)
    with pytest.raises(TypeError, match="needs a model"):
        flowvi.sbc()
    with pytest.raises(flowvi.ModelError, match="plain density"):
        flowvi.sbc(draws=density)


@pytest.mark.parametrize("fits", [20, 200])
def test_a_band_holds_the_whole_ecdf_as_often_as_it_says(fits):
    cells = np.arange(1, 50) / 50
    low, high = ecdf_band(fits, cells, 0.1)
    rng = np.random.default_rng(5)

    shares = (rng.random((2000, fits, 1)) < cells).mean(1)
    outside = ((shares < low - 1e-12) | (shares > high + 1e-12)).any(1).mean()

    # Binomial counts are discrete, so that the band may hold more.
    assert 0.02 < outside < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 2000)
