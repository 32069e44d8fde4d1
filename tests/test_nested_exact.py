"""The default nested fit reaches posteriors in closed form, and says so where it does not."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import flowvi
from flowvi.initialization.nested import start
from flowvi.training.learning_rate import BoundLevel
from models import linear_gaussian_joint

NOISE = 0.5


def normal_rows(rows, scale, dtype):
    """y_n = z_n + noise, z_n ~ N(m, scale): a target, and mean, sd and evidence of m."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    y = scale * (1.0 + noise[0] + NOISE * noise[1])

    def model(y):
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), 10.0 * scale))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(m, scale))
            pyro.sample("y", dist.Normal(z, NOISE * scale), obs=y)

    wide, own = (10.0 * scale) ** 2, (1 + NOISE**2) * scale**2
    variance = 1 / (1 / wide + rows / own)
    covariance = own * torch.eye(rows).double() + wide * torch.ones(rows, rows).double()
    evidence = MultivariateNormal(torch.zeros(rows).double(), covariance).log_prob(y)
    target = flowvi.from_pyro(model, y.to(dtype), local="n")
    return target, np.array([float(y.sum()) * variance / own]), variance**0.5, float(evidence)


def exact(fit, mean, sd, evidence, site):
    """Evidence, means and sds of weighted draws in standard errors; the plain ones trusted."""
    draws = fit.draw(1000)
    found = flowvi.diagnose(draws)
    weights = np.exp(draws.log_weights.reshape(-1) - draws.log_weights.max())
    weights /= weights.sum()
    effective = 1 / np.square(weights).sum()
    theta = draws[site].reshape(1000, -1)
    spread = np.sqrt(weights @ np.square(theta - mean))
    assert effective > 300 and not fit.meta["failures"]
    assert abs(found.log_evidence - evidence) < 4.5 * found.log_evidence_se + 1e-5 * abs(evidence)
    assert (np.abs(weights @ theta - mean) < 4.5 * sd / effective**0.5).all()
    assert (np.abs(spread / sd - 1) < 4.5 / math.sqrt(2 * effective)).all()
    return found


@pytest.mark.parametrize(
    ("rows", "scale", "dtype"),
    [
        (30, 1e3, torch.float32),
        pytest.param(30, 1e-3, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_the_default_call_is_exact_for_normal_rows(rows, scale, dtype):
    """Of any scale, in both precisions."""
    torch.set_default_dtype(dtype)
    target, mean, sd, evidence = normal_rows(rows, scale, dtype)

    found = exact(flowvi.nested(target), mean, sd, evidence, "m")

    assert found.verdict == "trust"


@pytest.mark.slow
def test_the_default_call_is_exact_for_weights_of_inputs():
    """The latent of a row depends on the product of its input and theta."""
    model, known = linear_gaussian_joint, linear_gaussian_joint.reference()
    target = flowvi.from_pyro(model.model, *model.data(), local="row")

    fit = flowvi.nested(target)

    mean, sd = (np.array(known[name]["theta"]) for name in ("mean", "sd"))
    exact(fit, mean, sd, known["log_evidence"], "theta")


def test_a_start_is_the_posterior_of_theta_given_its_rows():
    """Where all rows are seen, it is that of the closed form, at any scale."""
    for scale in (1.0, 1e3):
        target, mean, sd, _ = normal_rows(20, scale, torch.float64)

        found = start(target, 0)

        assert abs(found.loc.item() - mean[0]) < 0.05 * sd
        assert found.widths.item() == pytest.approx(sd, rel=0.05)
        # z given m is normal around (4 y + m) / 5.
        assert found.slope.item() == pytest.approx(0.2, abs=0.01)


def test_a_training_that_diverges_is_not_silent(recwarn):
    """Steps that are far too large: what there was is kept, or the verdict and a warning say so."""
    target, _, _, evidence = normal_rows(20, 1.0, torch.float64)

    fit = flowvi.nested(target, steps=60, lr=30.0)

    start = flowvi.nested(target, steps=1, lr=1e-12).draw(200).log_weights
    kept = fit.draw(200).log_weights
    error = math.hypot(kept.std(), start.std()) / 200**0.5
    assert start.mean() - 4.5 * error < kept.mean() < evidence + 4.5 * error
    assert flowvi.diagnose(fit.draw(1000)).verdict == "do not trust"
    back = [line for line in fit.log if "restored the last good state" in line]
    assert back or fit.meta["failures"]
    assert len(recwarn) >= len(fit.meta["failures"])


def test_a_failure_is_in_the_verdict():
    """A model whose gradient is not finite anywhere near the posterior."""

    def model(y):
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            # The square root of zero has no gradient.
            pyro.sample("y", dist.Normal(z + (0 * z).abs().sqrt(), 1.0), obs=y)

    target = flowvi.from_pyro(model, torch.randn(10), local="n")

    with pytest.warns(UserWarning, match="ended early"):
        fit = flowvi.nested(target, inner="meanfield", steps=60)

    verdict = flowvi.diagnose(fit.draw(200))
    assert fit.meta["failures"] and verdict.verdict == "do not trust"
    assert any("ended early" in reason for reason in verdict.reasons)


def test_a_bound_that_is_infinite_is_in_the_verdict():
    """Guides of rows that reach where the density is zero."""

    def model(y):
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.factor("wall", torch.where(z > 0.0, 0.0, -torch.inf))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    target = flowvi.from_pyro(model, torch.zeros(5), local="n")

    with pytest.warns(UserWarning, match="The bound of model is -inf on fresh draws"):
        fit = flowvi.nested(target, "meanfield", "meanfield", steps=5)

    reasons = flowvi.diagnose(fit.draw(200)).reasons
    assert any("put mass where the density is not finite" in reason for reason in reasons)


def test_a_bound_that_collapses_is_told_from_a_noisy_one():
    noise = np.random.default_rng(0).normal(0, 3, 200)
    noisy, falling, wild = BoundLevel(), BoundLevel(), BoundLevel()

    for i, e in enumerate(noise):
        noisy.add(-10 + e)
        wild.add(-1e20 if i % 20 == 7 else -10 + e)
        falling.add(-10 + e if i < 100 else -10 - 1.3 ** (i - 100))

    assert not noisy.collapsed and not wild.collapsed and not wild.low
    assert falling.collapsed and falling.low
    again = BoundLevel()
    again.load_state_dict(falling.state_dict())
    assert (again.median, again.floor) == (falling.median, falling.floor)
