"""Predictions are runs of the model on new arguments at the draws, and new data are scored."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import nn

import flowvi
from flowvi.draws.sampling import draw
from flowvi.guides import MeanField

NOISE = 0.5


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def some(model, *args, n=600, guides=2):
    """Draws of guides that nobody has fitted."""
    target = flowvi.from_pyro(model, *args)
    made = [MeanField(target.dim) for _ in range(guides)]
    for guide in made:
        guide.start(torch.full((target.dim,), 0.3), 0.2 * torch.eye(target.dim))
    return draw(target, made, n, seed=1)


@pytest.fixture
def draws():
    return some(line, torch.randn(7), torch.randn(7))


def test_deterministic_values_are_those_of_the_new_arguments(draws):
    x = torch.tensor([-1.0, 2.0, 4.0])

    found = flowvi.predict(draws, x)

    np.testing.assert_allclose(found["mean"], draws["slope"][..., None] * x.numpy())
    assert found["y"].shape == (2, 600, 3) and not found.log_likelihood


def test_new_data_follow_the_model(draws):
    """Residuals of what is drawn are normal with the model's own noise, and independent."""
    found = flowvi.predict(draws, torch.tensor([-1.0, 2.0, 4.0]))

    residual = (found["y"] - found["mean"]).reshape(-1, 3) / NOISE
    error = len(residual) ** -0.5
    assert np.abs(residual.mean(0)).max() < 4 * error
    assert np.abs(np.cov(residual.T) - np.eye(3)).max() < 6 * error


def test_data_among_the_arguments_are_scored_and_not_repeated(draws):
    x, y = torch.tensor([-1.0, 2.0]), torch.tensor([0.4, 0.1])

    found = flowvi.predict(draws, x, y)

    expected = norm.logpdf(y.numpy(), draws["slope"][..., None] * x.numpy(), NOISE)
    np.testing.assert_allclose(found.log_likelihood["y"], expected)
    density = logsumexp(expected, axis=(0, 1)) - np.log(expected.shape[0] * expected.shape[1])
    np.testing.assert_allclose(found.log_density("y"), density)
    assert found["y"].std() > 0
    assert "log predictive density" in str(found)


def test_the_same_seed_gives_the_same_data(draws):
    x = torch.randn(3)
    one, same, other = (flowvi.predict(draws, x, seed=seed)["y"] for seed in (1, 1, 2))

    assert (one == same).all() and (one != other).any()


def test_summaries_are_over_all_draws(draws):
    found = flowvi.predict(draws, torch.randn(3))
    y = found["y"].reshape(-1, 3)

    np.testing.assert_allclose(found.mean("y"), y.mean(0))
    np.testing.assert_allclose(found.quantiles("y", (0.1, 0.5)), np.quantile(y, (0.1, 0.5), 0))


@pytest.mark.parametrize("batch", [None, 3])
def test_networks_predict_in_chunks(batch, monkeypatch):
    """All rows are predicted, whatever the size of minibatches and chunks."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model = flowvi.bayesian(net, likelihood=lambda f: dist.Normal(f, NOISE), batch=batch)
    draws = some(model, torch.randn(6, 2), torch.randn(6), n=9)
    x, y = torch.randn(5, 2), torch.randn(5)
    monkeypatch.setattr("flowvi.targets.pyro.rerun.NUMBERS", 100)

    output = flowvi.predict(draws, x)["output"]
    scored = flowvi.predict(draws, x, y)
    scores = scored.log_likelihood["y"]

    np.testing.assert_allclose(scored["output"], output)
    assert "output" not in draws.values
    weights = {n: torch.as_tensor(draws[n][1, 4]) for n in dict(net.named_parameters())}
    expected = torch.func.functional_call(net, weights, x).squeeze(1)
    np.testing.assert_allclose(output[1, 4], expected.detach())
    np.testing.assert_allclose(scores, norm.logpdf(y.numpy(), output, NOISE))


def test_parameters_of_the_model_are_those_that_were_trained():
    def shifted(x, y=None):
        shift = pyro.param("shift", torch.tensor(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            mean = pyro.deterministic("mean", slope * x + shift)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    draws = some(shifted, torch.randn(3), torch.randn(3), n=5)
    with torch.no_grad():
        next(draws.target.parameters()).fill_(7.0)

    found = flowvi.predict(draws, torch.zeros(4))

    np.testing.assert_allclose(found["mean"], 7.0)


def test_discrete_data_are_predicted():
    model = flowvi.bayesian(nn.Linear(2, 3), likelihood="categorical")
    draws = some(model, torch.randn(6, 2), torch.randint(3, (6,)), n=400)

    found = flowvi.predict(draws, torch.randn(4, 2))

    shares = np.stack([(found["y"] == k).mean((0, 1)) for k in range(3)], -1)
    expected = torch.as_tensor(found["output"]).softmax(-1).mean((0, 1)).numpy()
    assert np.abs(shares - expected).max() < 4 * 0.5 / 800**0.5


def test_latents_of_other_rows_are_refused():
    def groups(x, y=None):
        with pyro.plate("row", len(x)):
            level = pyro.sample("level", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    draws = some(groups, torch.randn(3), torch.randn(3), n=5)

    assert flowvi.predict(draws, torch.zeros(3))["y"].shape == (2, 5, 3)
    with pytest.raises(flowvi.ModelError, match=r"'level' has shape \(3,\) in the fit and \(4,\)"):
        flowvi.predict(draws, torch.zeros(4))


def test_what_is_missing_is_named(draws):
    found = flowvi.predict(draws, torch.zeros(2))

    with pytest.raises(ValueError, match="brought no data to score"):
        found.log_density("y")
    with pytest.raises(KeyError, match=r"No prediction named 'z'.*Choose from mean, y"):
        found["z"]


def test_a_plain_density_cannot_predict():
    target = flowvi.from_density(lambda v: -(v["a"] ** 2), {"a": flowvi.Site()})
    draws = draw(target, [MeanField(1)], 5)

    with pytest.raises(flowvi.ModelError, match="no arguments to change"):
        flowvi.predict(draws, torch.zeros(2))


def test_draws_of_a_nested_fit_predict_rows():
    """Latents of rows are drawn: y is normal given the shared latent, with both variances."""

    def rows(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    target = flowvi.from_pyro(rows, torch.randn(6), local="row")
    draws = flowvi.nested(target, inner="fullrank", steps=2).draw(2000)
    found = flowvi.predict(draws, torch.tensor([0.0, 1.0, 2.0]))
    assert found["z"].shape == found["y"].shape == (1, 2000, 3)
    spread = found["y"] - draws["m"][..., None]
    assert abs(spread.var((0, 1)) - 2).max() < 5 * 2 * (2 / 2000) ** 0.5
    expected = norm.logpdf([0.0, 1.0, 2.0], draws["m"][..., None], 2**0.5)
    given = found.log_likelihood["y"][0]
    exact = np.log(np.exp(expected).mean((0, 1)))
    error = np.exp(given).std(0) / np.exp(given).mean(0) / 2000**0.5
    assert (abs(found.log_density("y") - exact) < 5 * error).all()
