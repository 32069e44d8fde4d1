"""Models are compared by what can be compared, and what cannot is said."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import flowvi
from flowvi.draws.sampling import draw
from flowvi.guides import FullRank

Y = torch.tensor([1.2, 0.4, 2.9, 1.7, 0.8], dtype=torch.float64)


def normal_model(prior):
    def model(y):
        mu = pyro.sample("mu", prior)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model


def exact(sd, y=Y):
    """Draws of the exact posterior under mu ~ N(0, sd^2), made a little wide."""
    n = len(y)
    precision = n + sd**-2
    guide = FullRank(1)
    guide.start(y.sum()[None] / precision, 1.1 * torch.eye(1) / math.sqrt(precision))
    return draw(
        flowvi.from_pyro(normal_model(dist.Normal(torch.tensor(0.0), sd)), y), [guide], 1000
    )


def log_evidence(sd):
    covariance = torch.eye(5) + sd**2
    return dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(Y).item()


def improper():
    model = normal_model(dist.ImproperUniform(constraints.real, (), ()))
    guide = FullRank(1)
    guide.start(Y.mean()[None], torch.eye(1) / math.sqrt(5))
    return draw(flowvi.from_pyro(model, Y), [guide], 1000)


def quietly(models, **options):
    """ArviZ warns of influential observations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flowvi.compare(models, **options)


@pytest.mark.parametrize("saved", [False, True])
def test_models_are_ranked_by_their_evidence(saved):
    draws = {"wide": exact(10.0), "narrow": exact(1.0)}
    models = {n: flowvi.to_inference_data(d) for n, d in draws.items()} if saved else draws

    found = quietly(models)

    best, other = found.models
    truth = log_evidence(10.0) - log_evidence(1.0)
    assert (best.name, other.name) == ("narrow", "wide")
    assert other.difference == pytest.approx(truth, abs=4 * other.difference_se)
    both = math.hypot(best.log_evidence_se, other.log_evidence_se)
    assert other.difference_se == pytest.approx(both) and best.difference_se == 0
    assert best.probability == pytest.approx(1 / (1 + math.exp(truth)), abs=0.01)
    assert best.probability + other.probability == pytest.approx(1)
    assert set(found.loo.index) == {"wide", "narrow"}
    assert str(found).startswith("Largest evidence: narrow, probability 0.")


def test_an_improper_prior_keeps_its_place_in_loo_only():
    found = quietly({"flat": improper(), "narrow": exact(1.0)})

    flat = found.models[-1]
    assert flat.name == "flat" and math.isnan(flat.log_evidence)
    assert "improper" in flat.note
    assert found.models[0].probability == 1
    assert "flat" in found.loo.index


def test_resampled_draws_are_compared_by_prediction_only():
    found = quietly({"a": flowvi.resample(exact(1.0)), "b": exact(10.0)})

    assert "have no weights" in found.models[-1].note
    assert set(found.loo.index) == {"a", "b"}


def test_models_of_different_data_are_refused():
    with pytest.raises(ValueError, match="'a' and 'b' were fitted to different data"):
        flowvi.compare({"a": exact(1.0), "b": exact(1.0, 2 * Y)})


def test_one_model_is_no_comparison():
    with pytest.raises(ValueError, match="at least two models; got a"):
        flowvi.compare({"a": exact(1.0)})
