"""Draws of latents of rows: a verdict for each row, and one over all rows."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_every_kind import ROWS, of_rows
from torch import nn

import flowvi
from flowvi import diagnostics
from flowvi.diagnostics import diagnose, diagnose_rows, psis, psis_of_rows
from flowvi.diagnostics.rows import NAMED, evidence_of_each, total

TRUST, RESAMPLE, DISTRUST = diagnostics.VERDICTS


def weighted(widths, draws=1000, seed=0):
    """Draws of normal guides of such widths for standard normal posteriors, and log weights."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(1, draws, len(widths)))
    z = noise * widths
    return (noise**2 - z**2) / 2 + np.log(widths), {"z": z}


def labels(widths):
    return [str(n) for n in range(len(widths))]


def test_tails_are_fitted_together_as_alone():
    rng = np.random.default_rng(1)
    log_w = -rng.uniform(0.1, 1.2, size=(40, 1)) * np.log(rng.uniform(size=(40, 400)))
    log_w[3] = 0.0  # equal
    log_w[4, 3:] = -np.inf  # a handful of draws
    log_w[5, ::2] = -np.inf
    log_w[6] = np.round(log_w[6])  # ties, so that the tail is shorter

    found = psis_of_rows(log_w)

    for n, row in enumerate(log_w):
        alone = psis(row)
        np.testing.assert_allclose(found.log_weights[n], alone.log_weights, rtol=1e-12)
        assert found.khat[n] == pytest.approx(alone.khat, rel=1e-12)
    assert found.khat[3] == -math.inf and found.khat[4] == math.inf


def test_the_verdict_of_a_row_is_that_of_its_draws_alone():
    widths = np.array([0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.3])
    log_w, values = weighted(widths, 2000)

    found = diagnose_rows(log_w, values, labels(widths))

    for n in range(len(widths)):
        alone = diagnose(log_w[..., n], {"z": values["z"][..., n]})
        assert found.rows.verdict[n] == alone.verdict
        numbers = (alone.khat, alone.ess, alone.elbo, alone.elbo_se)
        table = (found.rows.khat, found.rows.ess, found.rows.elbo, found.rows.elbo_se)
        np.testing.assert_allclose([column[n] for column in table], numbers)
    assert {*found.rows.verdict} == {TRUST, RESAMPLE, DISTRUST}
    assert found.verdict == DISTRUST and found.draws == 2000


@pytest.mark.parametrize("seed", range(3))
def test_good_guides_are_no_false_alarm(seed):
    """Of a hundred rows whose guides are near, at three sets of draws."""
    widths = np.full(100, 0.95)

    found = diagnose_rows(*weighted(widths, seed=seed), labels(widths))

    assert found.verdict == TRUST and (found.rows.verdict == TRUST).mean() > 0.95
    assert abs(found.log_evidence) < 4 * found.log_evidence_se


def test_a_few_bad_rows_are_named_first():
    widths = np.full(100, 0.9)
    widths[[17, 33, 90]] = 0.3

    found = diagnose_rows(*weighted(widths), labels(widths))

    assert found.verdict == DISTRUST
    assert found.reasons[0] == "3 of 100 rows are not to be trusted: 17, 33, 90."
    assert found.reasons[1].startswith(
        f"Row {found.rows.labels[found.rows.worst(1)[0]]} has Pareto"
    )
    lines = str(found).split("\n")
    assert lines[:2] == ["Verdict: do not trust", f"  - {found.reasons[0]}"]
    assert "not below 0.67" in str(found) and len(lines) < 12 + NAMED


def test_of_many_rows_the_worst_are_named():
    widths = np.full(60, 0.9)
    widths[5:35] = 0.4

    first, *_ = diagnose_rows(*weighted(widths), labels(widths)).reasons

    assert first.startswith("30 of 60 rows are not to be trusted: ") and first.endswith(", ...")
    named = [int(n) for n in first.split(": ")[1].removesuffix(", ...").split(", ")]
    assert len(named) == NAMED and named == sorted(named) and set(named) <= {*range(5, 35)}


def test_rows_that_fail_by_noise_alone_are_named_and_do_not_decide():
    """Guides near the limit of what 4,000 draws tell: few rows are above it."""
    widths = np.full(100, 0.74)
    for seed in range(20):
        found = diagnose_rows(*weighted(widths, 4000, seed), labels(widths))
        if 0 < (found.rows.verdict == DISTRUST).sum() <= 5:
            break

    assert found.verdict == RESAMPLE
    assert "not to be trusted" in found.reasons[0] and "So few rows" in found.reasons[1]


def test_few_draws_are_said_to_be_few():
    widths = np.full(30, 0.8)

    found = diagnose_rows(*weighted(widths, 200), labels(widths))

    assert found.verdict == DISTRUST and "such as fit.draw(4000), may say otherwise" in str(found)


def test_a_row_without_any_density_does_not_hide_the_others():
    widths = np.full(30, 0.95)
    log_w, values = weighted(widths)
    log_w[..., 4] = -np.inf
    log_w[:, ::50, 5] = -np.inf

    found = diagnose_rows(log_w, values, labels(widths))

    assert found.verdict == DISTRUST
    assert found.reasons[0] == "1 of 30 rows is not to be trusted: 4."
    assert found.rows.verdict[5] == RESAMPLE and found.rows.elbo[5] == -np.inf
    assert np.isfinite(np.delete(found.rows.log_evidence, 4)).all()
    assert found.log_evidence == -np.inf
    e = diagnostics.evidence_of_rows(log_w, labels(widths))
    assert not e.reliable and e.reasons[0] == "1 of 30 rows is not to be relied on: 4."
    assert diagnostics.where(log_w, values).heaviest == 95


def test_the_sum_over_many_rows_is_not_biased():
    """Logarithms of mean weights are too low by half their variance, which adds up."""
    noise = np.random.default_rng(2).normal(size=(5, 4000, 100))
    # Guides half as wide again, in five dimensions: weights are bounded.
    log_w = ((1 - 1.5**2) * noise**2 / 2 + math.log(1.5)).sum(0)

    values, errors = evidence_of_each(log_w, np.full(len(log_w), -math.inf))

    value, error = total(values, errors)
    plain = np.log(np.exp(log_w).mean(1)).sum()
    assert abs(value) < 3 * error and plain < -3 * error


def test_what_is_known_of_the_fit_is_said_before_the_rows():
    widths = np.full(5, 0.9)

    found = diagnose_rows(*weighted(widths), labels(widths), missed=["Training failed."])

    assert found.verdict == DISTRUST and found.reasons[0] == "Training failed."


# Fits.


@pytest.fixture(scope="module")
def y():
    return torch.linspace(-1.5, 2.5, ROWS)


@pytest.fixture(scope="module")
def fit(y):
    return of_rows(y)


def test_rows_are_called_by_their_coordinates(y):
    fit = of_rows(y)
    names = [f"school {n}" for n in range(ROWS)]
    fit.target.label({"data": names})

    draws = fit.draw(200, rows=[3, 7], seed=1)
    new = fit.draw(200, data=torch.tensor([0.0, 1.0, 2.0]))

    assert draws.labels == ["school 3", "school 7"] and new.labels == [0, 1, 2]
    assert flowvi.diagnose(draws).rows.labels == ("school 3", "school 7")
    assert "z[school 3]" in flowvi.where(draws).labels
    assert list(flowvi.to_inference_data(draws, particles=5)["posterior"]["data"]) == draws.labels
    with pytest.raises(ValueError, match="dim 'data' has size 24; got 2 labels"):
        fit.target.label({"data": ["a", "b"]})
    with pytest.raises(ValueError, match="No dim named 'rows'; the rows are in 'data'"):
        fit.target.label({"rows": names})


def test_models_are_compared_row_by_row(fit, y):
    """The error of the difference is that of the paired one, over rows."""
    other = of_rows(y, 1.4)
    a, b = (f.draw(1000, seed=2) for f in (fit, other))

    found = flowvi.compare({"one": a, "wide": b})

    exact = [dist.Normal(0.0, (1 + s**2) ** 0.5).log_prob(y).double().numpy() for s in (1.0, 1.4)]
    best, second = found.models
    sign = 1 if second.name == "wide" else -1
    apart = sign * (exact[1] - exact[0])
    monte_carlo = math.hypot(best.log_evidence_se, second.log_evidence_se)
    assert abs(second.difference - apart.sum()) < 4 * monte_carlo
    paired = apart.std(ddof=1) * ROWS**0.5
    assert second.difference_se == pytest.approx(paired, abs=4 * monte_carlo)
    assert paired < 0.5 * math.hypot(*(e.std() * ROWS**0.5 for e in exact))
    # From files as well.
    read = flowvi.compare({n: flowvi.to_inference_data(d) for n, d in (("one", a), ("wide", b))})
    assert read.models[1].difference == pytest.approx(second.difference)
    assert read.models[1].difference_se == pytest.approx(second.difference_se)


def test_rows_in_another_order_are_not_paired(fit):
    a, b = fit.draw(200, rows=[1, 2, 3]), fit.draw(200, rows=[3, 2, 1])

    with pytest.raises(ValueError, match="different rows, or in another order: evidences"):
        flowvi.compare({"a": a, "b": b})
    with pytest.raises(ValueError, match="fitted to different data"):
        flowvi.compare({"a": a, "b": fit.draw(200, rows=[1, 2, 4])})


def test_trained_parameters_are_no_evidence_for_a_model():
    decoder = nn.Linear(1, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    target = flowvi.from_pyro(model, torch.randn(20, 1), local="data")
    fit = flowvi.fit(target, "fullrank", epochs=20, progress=False)
    fitted, left_out = fit.draw(500), fit.draw(500, data=torch.randn(20, 1))

    note = flowvi.compare({"a": fitted, "b": fitted}).models[0].note
    other = flowvi.compare({"a": left_out, "b": left_out}).models[0].note

    assert "were trained" in note and "trained" not in other


def test_rows_are_resampled_each_by_its_weights(fit):
    draws = fit.draw(500, rows=[0, 9], seed=3)

    better = flowvi.resample(draws, n=40)

    assert better["z"].shape == (1, 40, 2) and better.z.shape == (1, 40, 2, 1)
    for n in range(2):
        assert set(better["z"][0, :, n]) <= set(draws["z"][0, :, n])
    np.testing.assert_array_equal(better.z[..., 0], better["z"])
    assert flowvi.diagnose(better) is better.diagnosis and better.diagnosis.rows.draws == 500
    assert better.batch is draws.batch
    with pytest.warns(UserWarning, match="for 2 of 2 rows: their resampled draws are no better"):
        flowvi.resample(hopeless(draws))


def hopeless(draws):
    rng = np.random.default_rng(0)
    return replace(draws, log_p=draws.log_q - 2 * np.log(rng.uniform(size=draws.log_q.shape)))


def test_rows_are_predicted_with_other_data(fit, y):
    draws = fit.draw(400, rows=range(3), seed=1)

    found = flowvi.predict(draws)
    other = flowvi.predict(draws, y[:3] + 1)

    np.testing.assert_allclose(found["y"], other["y"])  # the latents are the same
    exact = dist.Normal(torch.as_tensor(draws["z"]), 1.0).log_prob(y[:3] + 1)
    np.testing.assert_allclose(other.log_likelihood["y"], exact, rtol=1e-6)
    with pytest.raises(ValueError, match=r"predict got 24 rows, and draws of the latents of 3"):
        flowvi.predict(draws, y)


def test_draws_of_rows_say_what_they_are(fit):
    draws = fit.draw(50, rows=[0, 9])

    assert isinstance(draws, flowvi.RowDraws) and flowvi.RowDraws is flowvi.Draws
    assert "1 x 50 draws for each of 2 rows in 1 dimensions" in str(draws) and len(draws) == 50
    assert draws.thinned(7)["z"].shape == (1, 7, 2)
    assert fit.draw(200).khat.shape == (ROWS,)
    with pytest.raises(ValueError, match="A diagnosis needs >= 100 draws"):
        flowvi.diagnose(draws)
    with pytest.raises(ValueError, match="evidence of draws with rows takes no mcmc"):
        flowvi.evidence(fit.draw(200), draws)


def two_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.5, 0.3))
        pyro.sample("x", dist.Normal(z.sum(-1), s), obs=x)


def one_latent(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Normal(torch.zeros_like(x), s), obs=x)


def test_the_log_prior_of_rows_is_exported():
    """In the values' own supports: no Jacobian of the map to them."""
    x = torch.linspace(-1, 1, 7)
    for model in (one_latent, two_latents):
        target = flowvi.from_pyro(model, x, local="data")
        draws = flowvi.fit(target, "meanfield", epochs=1, progress=False).draw(40)

        groups = flowvi.to_inference_data(draws)
        ((name, found),) = groups["log_prior"].data_vars.items()

        s = torch.as_tensor(draws["s"])
        expected = dist.Gamma(3.0, 2.0).log_prob(s)
        if model is two_latents:
            z = torch.as_tensor(draws["z"])
            expected = dist.LogNormal(0.5, 0.3).log_prob(s)
            expected = expected + dist.Normal(0.0, 2.0).log_prob(z).sum(-1)
        assert found.dims == ("chain", "draw", "data")
        assert name == ("s" if model is one_latent else "latents")
        np.testing.assert_allclose(found.values.reshape(expected.shape), expected, rtol=1e-5)


def test_the_log_prior_of_a_sum_over_discrete_sites_is_left_out():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    target = flowvi.from_pyro(model, torch.zeros(5), local="data")
    draws = flowvi.fit(target, "meanfield", epochs=1, progress=False).draw(20)
    assert target.log_prior(torch.zeros(1, 5, 1)) == {}
    assert "log_prior" not in flowvi.groups.group_names(flowvi.to_inference_data(draws))
