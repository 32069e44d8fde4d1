"""Networks with latent weights have the density of their priors and likelihood, on any layer."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import flowvi
from flowvi.bnn import LIKELIHOODS, PRIORS, Horseshoe, Normal, UnitScales, bayesian

ROWS = 6


class Looked(nn.Module):
    """Embedded letters, then a line."""

    def __init__(self):
        super().__init__()
        self.letters = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, letter):
        return self.head(self.letters(letter))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.GRU(1, 2, batch_first=True)
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.body(x.unsqueeze(-1))[0][:, -1])


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.Bilinear(3, 2, 1)

    def forward(self, a, b):
        return self.mixed(a, b)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


NETWORKS = {
    "dense": (mlp, lambda: torch.randn(ROWS, 3)),
    "normalised": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 1)),
        lambda: torch.randn(ROWS, 3),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)),
        lambda: torch.randn(ROWS, 2, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 1, 2), nn.Flatten(), nn.Linear(4, 1)),
        lambda: torch.randn(ROWS, 2, 3),
    ),
    "embedding": (Looked, lambda: torch.randint(5, (ROWS,))),
    "recurrent": (Recurrent, lambda: torch.randn(ROWS, 3)),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(8, 1),
        ),
        lambda: torch.randn(ROWS, 2, 4),
    ),
    "two inputs": (Two, lambda: (torch.randn(ROWS, 3), torch.randn(ROWS, 2))),
    "statistics kept": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval(),
        lambda: torch.randn(ROWS, 3),
    ),
}


def by_hand(model, target, z, x, y):
    """Log density from one call of the network for each draw, and Pyro's own scoring of sites."""
    total = []
    for point in z:
        values = target.constrain(point)
        given = {name: values[name] for name in target.sites}
        trace = poutine.trace(poutine.condition(model, given)).get_trace(x, y)
        weights = {n: trace.nodes[n]["value"] for n in model.priors}
        inputs = x if isinstance(x, tuple) else (x,)
        output = functional_call(model.module, weights, inputs).squeeze(1)
        prior = sum(trace.nodes[name]["fn"].log_prob(given[name]).sum() for name in target.sites)
        jacobian = sum(
            torch.distributions.biject_to(site.support)
            .log_abs_det_jacobian(point[target.slices[name]].reshape(site.shape), given[name])
            .sum()
            for name, site in target.sites.items()
        )
        total.append(prior + jacobian + dist.Normal(output, given["noise"]).log_prob(y).sum())
    return torch.stack(total)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_density_is_that_of_one_network_for_each_draw(name):
    build, inputs = NETWORKS[name]
    model, x, y = bayesian(build().requires_grad_(True)), inputs(), torch.randn(ROWS)
    target = flowvi.from_pyro(model, x, y)
    z = 0.3 * torch.randn(3, target.dim)

    assert target.density.batched.how == "tape"
    assert_close(target.log_prob(z), by_hand(model, target, z, x, y))


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_is_scored(prior):
    model, x, y = bayesian(mlp(), prior), torch.randn(ROWS, 3), torch.randn(ROWS)
    target = flowvi.from_pyro(model, x, y)
    z = 0.3 * torch.randn(3, target.dim)

    assert_close(target.log_prob(z), by_hand(model, target, z, x, y))
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(target.constrain(z))


@pytest.mark.parametrize("prior", [p for p in PRIORS if p != "horseshoe"])
@pytest.mark.parametrize(
    ("layer", "leaf", "fan_in", "centre"),
    [
        (nn.Linear(8, 5), "weight", 8, 0.0),
        (nn.Linear(8, 5), "bias", 1, 0.0),
        (nn.Conv1d(2, 3, 4), "weight", 8, 0.0),
        (nn.ConvTranspose1d(2, 3, 4), "weight", 8, 0.0),
        (nn.LayerNorm(3), "weight", 1, 1.0),
        (nn.Embedding(4, 3), "weight", 1, 0.0),
    ],
)
def test_priors_have_the_scale_that_they_name(prior, layer, leaf, fan_in, centre):
    """The sum of squares of a tensor is that of its size over the fan-in, within 4 errors."""
    weight = flowvi.bnn.priors.weight_of(layer, leaf, torch.float64)
    if prior == "unit_scales" and weight.value.dim() > 1:
        fan_in = weight.value[0].numel()
    build = PRIORS[prior](scale=2.0)

    squares = torch.stack([(build(weight) - centre).square().mean() for _ in range(400)])

    error = squares.std() / len(squares) ** 0.5
    assert (squares.mean() - 4.0 / fan_in).abs() < 4 * error


def test_horseshoes_are_products_of_half_cauchys():
    """Logs of |w| have the spread of log tau + log lambda + log |eps|: 2 (pi^2/4) + pi^2/8."""
    weight = flowvi.bnn.priors.weight_of(nn.Linear(1, 1), "weight", torch.float64)

    logs = torch.stack([Horseshoe()(weight).abs().log() for _ in range(1500)]).flatten()

    expected = 2 * math.pi**2 / 4 + math.pi**2 / 8
    assert abs(logs.var() - expected) < 4 * (logs - logs.mean()).square().std() / len(logs) ** 0.5


def test_horseshoes_can_share_a_scale_for_each_input():
    sites = flowvi.from_pyro(
        bayesian(nn.Linear(3, 2), Horseshoe(by_input=True)), torch.randn(4, 3), torch.randn(4, 2)
    ).sites

    assert sites["weight.local"].shape == (1, 3) and sites["bias.local"].shape == (2,)


def conjugate():
    """A line through four points, all of it normal: posterior and evidence in closed form."""
    x, noise = torch.randn(20, 3), 0.5
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 + noise * torch.randn(20)
    design = torch.cat([x, torch.ones(20, 1)], 1)
    variances = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    covariance = (design.mT @ design / noise**2 + (1 / variances).diag()).inverse()
    mean = covariance @ design.mT @ y / noise**2
    marginal = design * variances @ design.mT + noise**2 * torch.eye(20)
    evidence = dist.MultivariateNormal(torch.zeros(20), marginal).log_prob(y)
    return x, y, noise, mean, covariance, float(evidence)


def test_a_network_of_one_layer_is_linear_regression():
    x, y, noise, mean, covariance, evidence = conjugate()
    model = bayesian(nn.Linear(3, 1), likelihood=lambda f: dist.Normal(f, noise))

    fit = flowvi.fit(flowvi.from_pyro(model, x, y), "fullrank", steps=10, progress=False)
    draws = fit.draw(4000)
    weights = torch.as_tensor(np.concatenate([draws["weight"][0, :, 0], draws["bias"][0]], 1))

    found = flowvi.diagnose(draws)
    assert abs(found.log_evidence - evidence) < 4 * found.log_evidence_se + 1e-6
    assert found.verdict == "trust"
    error = covariance.diagonal().sqrt() / len(weights) ** 0.5
    assert ((weights.mean(0) - mean).abs() < 4 * error).all()
    assert_close(weights.mT.cov(), covariance, rtol=0.1, atol=0.1 * float(covariance.max()))


def test_a_minibatch_is_unbiased():
    """Over all batches of two of four rows the density averages to that of all rows."""
    x, y = torch.randn(4, 3), torch.randn(4)
    some = flowvi.from_pyro(bayesian(mlp(), batch=2), x, y)
    whole = flowvi.from_pyro(bayesian(mlp()), x, y)
    z = torch.randn(5, whole.dim)

    pairs = torch.combinations(torch.arange(4), 2)
    average = torch.stack([some.log_prob(z, {"row": rows}) for rows in pairs]).mean(0)

    assert some.subsampled == {"row": (4, 2)}
    assert_close(average, whole.log_prob(z))
    assert_close(some.log_prob(z), whole.log_prob(z))
    assert_close(some.log_likelihood(z)["y"], whole.log_likelihood(z)["y"])


def test_minibatches_train():
    model = bayesian(nn.Linear(1, 1), batch=6)
    target = flowvi.from_pyro(model, torch.randn(12, 1), torch.randn(12))

    fit = flowvi.fit(target, "meanfield", steps=10, progress=False)

    assert math.isfinite(fit.bounds[0])
    with pytest.raises(ValueError, match="plate 'row' is subsampled"):
        flowvi.fit(target, objective=flowvi.iwelbo(4), steps=5, progress=False)


def test_parameters_without_a_prior_are_trained_or_kept():
    net = mlp()
    net[0].bias.requires_grad_(False)
    kept = net[0].bias.detach().clone()
    target = flowvi.from_pyro(bayesian(net, {"2.*": "normal"}), torch.randn(9, 3), torch.randn(9))

    flowvi.fit(target, "meanfield", steps=10, progress=False)

    assert set(target.sites) == {"2.weight", "2.bias", "noise"}
    assert [p.shape for p in target.parameters()] == [net[0].weight.shape]
    assert_close(net[0].bias, kept, rtol=0, atol=0)


def test_the_first_pattern_that_fits_counts():
    priors = bayesian(mlp(), {"0.*": "laplace", "*.weight": Normal(2.0)}).priors

    assert set(priors) == {"0.weight", "0.bias", "2.weight"}
    assert priors["0.weight"] == PRIORS["laplace"]() and priors["2.weight"] == Normal(2.0)


def test_directions_of_unit_scales_are_trained():
    net = nn.Linear(3, 2)
    target = flowvi.from_pyro(bayesian(net, UnitScales()), torch.randn(9, 3), torch.randn(9, 2))

    values = target.constrain(torch.randn(5, target.dim))

    assert [p.shape for p in target.parameters()] == [net.weight.shape]
    assert_close(values["weight"].norm(dim=-1), values["weight.scale"].abs())


def test_directions_of_unit_scales_can_be_latent():
    """Every direction is as likely as any other: the mean of a unit vector is zero."""
    target = flowvi.from_pyro(
        bayesian(nn.Linear(3, 2), UnitScales(directions=True)), torch.randn(9, 3), torch.randn(9, 2)
    )
    values = target.prior(2000, 0)
    units = values["weight"] / values["weight.scale"][..., None]

    assert not list(target.parameters()) and target.sites["weight.direction"].shape == (2, 3)
    np.testing.assert_allclose(np.linalg.norm(units, axis=-1), 1.0)
    assert np.abs(units.mean(0)).max() < 4 * (1 / 3 / 2000) ** 0.5


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_scores_and_simulates(likelihood):
    net, x = nn.Linear(3, 2), torch.randn(ROWS, 3)
    y = {"categorical": torch.randint(2, (ROWS,))}.get(likelihood, torch.ones(ROWS, 2))
    target = flowvi.from_pyro(bayesian(net, likelihood=likelihood), x, y)

    assert target.log_prob(torch.zeros(target.dim)).isfinite()
    assert target.log_likelihood(torch.zeros(target.dim))["y"].shape == (ROWS,)
    assert target.prior(4, 0)["y"].shape == (4, *y.shape)


def test_single_precision_networks_take_double_data():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).float().eval()

    target = flowvi.from_pyro(
        bayesian(net, {"0.*": "normal"}), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    )

    assert target.log_prob(torch.zeros(target.dim)).dtype == torch.float64


def test_columns_of_numbers_are_numbers():
    x, y = torch.randn(ROWS, 3), torch.randn(ROWS)
    column, numbers = (flowvi.from_pyro(bayesian(mlp()), x, data) for data in (y.unsqueeze(1), y))
    z = torch.randn(2, numbers.dim)

    assert_close(column.log_prob(z), numbers.log_prob(z), rtol=0, atol=0)


def test_without_data_the_output_is_reported():
    model = bayesian(mlp())

    trace = poutine.trace(model).get_trace(torch.randn(ROWS, 3))

    assert trace.nodes["output"]["value"].shape == trace.nodes["y"]["value"].shape == (ROWS,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bayesian(nn.BatchNorm1d(3)), "couples the rows .* nn.LayerNorm"),
        (lambda: bayesian(mlp(), {"head.*": "normal"}), "No parameter .* 'head"),
        (lambda: bayesian(mlp(), "cauchy"), "No prior named 'cauchy'.*Choose from hier"),
        (lambda: bayesian(mlp(), likelihood="probit"), "No likelihood named 'probit'"),
        (lambda: bayesian(mlp(), batch=0), "batch must be a whole number of at least 1"),
        (
            lambda: bayesian(mlp())(torch.randn(4, 3), torch.randn(5)),
            "the same number of rows; got 4, 5",
        ),
        (lambda: bayesian(mlp())(torch.randn(4, 3), torch.randn(4, 2)), r"y has shape \(4, 2\)"),
        (
            lambda: bayesian(mlp(), likelihood=lambda f: dist.Normal(f.mean(), 1.0))(
                torch.randn(4, 3)
            ),
            "likelihood must return a distribution of 4 rows",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        make()
