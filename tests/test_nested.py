"""Bounds over theta of bounds over z stay below the evidence, and reach it where it is known."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.draws.draws import Draws
from flowvi.fitting.fit_nested import nested
from flowvi.guides import MeanField
from flowvi.objectives import Renyi
from flowvi.objectives.nested import NestedTarget

ROWS, NOISE = 30, 0.5


def model(x):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z + theta, NOISE), obs=x)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(5)
    return 1.1 * torch.randn(ROWS) + 0.7


@pytest.fixture(scope="module")
def target(data):
    return flowvi.from_pyro(model, data, local="data")


@pytest.fixture(scope="module")
def evidence(data):
    """All of it is normal: x has variance 1 + s^2 of its own, and 1 in common."""
    covariance = (1 + NOISE**2) * torch.eye(ROWS) + torch.ones(ROWS, ROWS)
    zero = torch.zeros(ROWS)
    return float(dist.MultivariateNormal(zero, covariance).log_prob(data))


@pytest.fixture(scope="module")
def fitted(target):
    return nested(target, inner="fullrank", batch_size=10, steps=600, particles=8)


def improved(fit, before, evidence):
    """Whether training has raised the ELBO, by draws of both fits, to the evidence at most."""
    after, start = (f.draw(400).log_weights.reshape(-1) for f in (fit, before))
    error = math.hypot(after.std(), start.std()) / 20
    assert after.mean() > start.mean() + 4.5 * error
    assert after.mean() < evidence + 4.5 * after.std() / 20


def untrained(target, *guides, **settings):
    """The same fit after a step of no size."""
    return nested(target, *guides, **{**settings, "steps": 1, "lr": 1e-12})


def test_minibatches_reach_the_evidence(fitted, evidence):
    """The ELBO and the importance-weighted bound are below it, and the weights average to it."""
    found = flowvi.diagnose(fitted.draw(1000))
    (weighted,) = flowvi.bounds(fitted.draw(1000, particles=50), particles=(100,))

    assert found.elbo < evidence + 4.5 * found.elbo_se
    assert found.elbo < weighted.bound + 4.5 * math.hypot(found.elbo_se, weighted.se)
    assert abs(found.log_evidence - evidence) < 4.5 * found.log_evidence_se
    assert weighted.bound < evidence + 4.5 * weighted.se
    # What the bound lacks is what the weights say it does.
    lacks, error = evidence - found.elbo, math.hypot(found.elbo_se, found.gap_se)
    assert abs(lacks - found.gap) < 4.5 * error


def test_theta_has_its_posterior(fitted, data):
    """By its weights, in standard errors."""
    variance = 1 / (1 + ROWS / (1 + NOISE**2))
    mean = variance * float(data.sum()) / (1 + NOISE**2)

    draws = fitted.draw(2000)

    theta, weights = draws["theta"].reshape(-1), np.exp(draws.log_weights.reshape(-1))
    weights /= weights.sum()
    effective = 1 / np.square(weights).sum()
    spread = math.sqrt(weights @ np.square(theta - mean))
    assert effective > 1000
    assert abs(weights @ theta - mean) < 4.5 * (variance / effective) ** 0.5
    assert abs(spread / variance**0.5 - 1) < 4.5 / math.sqrt(2 * effective)


def test_minibatches_are_unbiased(fitted, target):
    """The density from ten rows, over many batches, is that from all rows."""
    theta, bound = torch.tensor([[0.4]]), Renyi(0.0, 4, "total")

    with torch.no_grad():
        some = torch.stack(
            [
                fitted.density.log_prob(theta, target.batch(torch.randperm(ROWS)[:10]), bound)
                for _ in range(400)
            ]
        )
        whole = torch.stack(
            [fitted.density.log_prob(theta, target.batch(), bound) for _ in range(100)]
        )

    error = math.hypot(float(some.std()) / 20, float(whole.std()) / 10)
    assert abs(float(some.mean() - whole.mean())) < 4 * error


def test_bounds_of_rows_are_below_their_likelihood(fitted, target, data):
    theta = torch.tensor([[0.2], [0.9]])

    with torch.no_grad():
        rows = torch.stack(
            [fitted.density.rows(theta, target.batch(), Renyi(0.0, 2, "total")) for _ in range(300)]
        )

    exact = dist.Normal(theta, math.sqrt(1 + NOISE**2)).log_prob(data)
    error = rows.std(0) / len(rows) ** 0.5
    assert (rows.mean(0) < exact + 4.5 * error).all()


@pytest.mark.parametrize("sees_theta", [True, False])
@pytest.mark.parametrize("outer", [1, 4])
def test_every_form_trains(target, evidence, outer, sees_theta):
    form = {"outer": outer, "sees_theta": sees_theta, "particles": 2}
    guides = target, "meanfield", "meanfield"

    fit = nested(*guides, **form, steps=60)

    assert isinstance(fit.draw(50), Draws) and np.isfinite(fit.history["bound"]).all()
    # The score of the inner guide drops out where its bound stands alone, and not in a weight.
    assert fit.target.within.gradient == ("dreg" if outer == 1 else "total")
    improved(fit, untrained(*guides, **form), evidence)


@pytest.mark.parametrize("outer", [1, 3])
def test_gradients_are_those_of_the_bound(target, fitted, outer):
    """The gradient that trains is that of the bound as written, within 4.5 errors."""
    guide, density = fitted.guide, fitted.density
    learned = [*guide.parameters(), density.inner.guide.affine.params.value]

    def one(within, over):
        def log_p(theta):
            flat = density.log_prob(theta.reshape(-1, 1), target.batch(), Renyi(0.0, 2, within))
            return flat.reshape(theta.shape[:-1])

        bound = Renyi(0.0 if outer > 1 else 1.0, outer, over)(log_p, guide, repeats=(40,)).bound
        found = torch.autograd.grad(bound.mean(), learned, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    within = "dreg" if outer == 1 else "total"
    trained = torch.stack([one(within, "dreg") for _ in range(60)])
    plain = torch.stack([one("total", "total") for _ in range(60)])

    error = (trained.var(0) / 60 + plain.var(0) / 60).sqrt()
    assert ((trained.mean(0) - plain.mean(0)).abs() < 4.5 * error + 1e-9).all()


def test_new_rows_are_predicted_below_their_density(fitted, data):
    """Averaged over the posterior of theta, a new row is normal."""
    x = torch.tensor([-1.0, 0.5, 3.0])
    variance = 1 / (1 + ROWS / (1 + NOISE**2))
    mean = variance * float(data.sum()) / (1 + NOISE**2)

    found = np.stack([fitted.predictive_bound(x, n=50, particles=64, seed=i) for i in range(12)])

    # Given theta of the guide, from which 50 values are drawn at a time.
    guide = fitted.draw(4000)["theta"]
    spread = math.sqrt(1 + NOISE**2 + guide.var())
    exact = dist.Normal(float(guide.mean()), spread).log_prob(x).numpy()
    error = found.std(0, ddof=1) / len(found) ** 0.5
    assert (found.mean(0) < exact + 4.5 * error + 0.01).all()
    assert (found.mean(0) > exact - 4.5 * error - 0.01).all()
    assert abs(guide.mean() - mean) < variance**0.5


def test_weights_over_theta_need_all_rows(target):
    with pytest.raises(ValueError, match=r"of batches of 10 it would be no bound.*outer=1"):
        nested(target, outer=4, batch_size=10)


def test_a_minibatch_bound_would_exceed_the_evidence(fitted, target, evidence):
    """The counter-example: weights of ten of the rows, scaled to all of them."""
    bound = Renyi(0.0, 8, "total")

    with torch.no_grad():
        found = []
        for _ in range(200):
            theta, log_q = MeanFieldOfPrior.sample(64)
            batch = target.batch(torch.randperm(ROWS)[:3])
            log_w = fitted.density.log_prob(theta, batch, bound) - log_q
            found.append(torch.logsumexp(log_w, 0) - math.log(64))
        values = torch.stack(found)

    assert values.mean() - 4 * values.std() / len(values) ** 0.5 > evidence


class MeanFieldOfPrior:
    """Draws from the prior of theta and their log density."""

    @staticmethod
    def sample(n):
        prior = dist.Normal(torch.tensor(0.0), 1.0)
        theta = prior.sample((n, 1))
        return theta, prior.log_prob(theta).sum(-1)


def test_a_model_without_shared_latents_is_refused(data):
    def alone(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="has no latents outside plate 'data'"):
        nested(flowvi.from_pyro(alone, data, local="data"))


def test_the_inner_guide_is_a_module_of_the_density(fitted):
    assert isinstance(fitted.density, NestedTarget)
    assert all(p.requires_grad for p in fitted.density.parameters())


def test_fits_are_saved_and_loaded(fitted, target, tmp_path):
    """Both guides and the number of draws; the same draws come out."""
    fitted.save(tmp_path)

    loaded = flowvi.load(tmp_path, target)

    before, after = fitted.draw(20), loaded.draw(20)
    np.testing.assert_array_equal(before.log_p, after.log_p)
    np.testing.assert_array_equal(before.log_q, after.log_q)
    head = "model: fullrank guide of theta, fullrank of rows, 600 steps, K = 8"
    assert str(loaded).split("\n")[0] == head and str(loaded) == str(fitted)


def test_guides_of_ones_own_go_on_and_are_asked_for(fitted, target, tmp_path):
    """They are copied, and start where they are."""
    before = [p.clone() for p in fitted.guide.parameters()]
    inner = fitted.density.inner
    going = nested(target, fitted.guide, inner, steps=1, lr=1e-9)
    going.save(tmp_path)

    assert all(torch.equal(a, b) for a, b in zip(before, fitted.guide.parameters(), strict=True))
    np.testing.assert_allclose(going.draw(5).log_p, fitted.draw(5).log_p, rtol=1e-5)
    with pytest.raises(
        flowvi.runtime.files.CheckpointError, match=r"of your own making .FullRank.; pass"
    ):
        flowvi.load(tmp_path, target)
    with pytest.raises(flowvi.runtime.files.CheckpointError, match=r"load\(folder, target, inner="):
        flowvi.load(tmp_path, target, guide=fitted.guide)
    loaded = flowvi.load(tmp_path, target, guide=fitted.guide, inner=inner)
    np.testing.assert_array_equal(loaded.draw(5).log_p, going.draw(5).log_p)


def test_files_of_another_kind_or_model_are_refused(fitted, target, data, tmp_path):
    fitted.save(tmp_path)
    manifest = json.loads((tmp_path / "fit.json").read_text())

    with pytest.raises(
        flowvi.runtime.files.CheckpointError, match="was fitted to a model with latents"
    ):
        flowvi.load(tmp_path, flowvi.from_pyro(model, data))
    with pytest.raises(
        flowvi.runtime.files.CheckpointError, match="fitted to another model: site 'theta'"
    ):
        flowvi.load(tmp_path, flowvi.from_pyro(wide, data, local="data"))
    manifest["meta"]["specs"] = [manifest["meta"]["specs"][0]] * 3
    (tmp_path / "fit.json").write_text(json.dumps({**manifest, "guides": 3}))
    with pytest.raises(flowvi.runtime.files.CheckpointError, match="holds no nested fit of model"):
        flowvi.load(tmp_path, target)


def wide(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z + theta.sum(), NOISE), obs=x)


@pytest.mark.parametrize(
    "guide",
    ["multiplicative", flowvi.Multiplicative(), flowvi.Blocks({"*": "kronecker"})],
    ids=["name", "multiplicative", "blocks"],
)
def test_recipes_are_guides_of_theta(guide, data, tmp_path):
    target = flowvi.from_pyro(wide, data, local="data")

    few = {"particles": 2, "draws": 2}
    fit = nested(target, guide, "meanfield", steps=60, **few)
    fit.save(tmp_path)

    improved(fit, untrained(target, guide, "meanfield", **few), math.inf)
    assert fit.draw(10)["theta"].shape == (1, 10, 2, 3)
    np.testing.assert_array_equal(flowvi.load(tmp_path, target).draw(5).log_q, fit.draw(5).log_q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"draws": 1.5}, "draws must be a whole number of at least 1; got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"lr": 0.0}, "lr must be a positive number; got 0.0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"inner": "nvp"}, "No guide named 'nvp'. Did you mean "),
        ({"inner": MeanField(1)}, "inner must be the name of a guide, or a flowvi.Amortised"),
        ({"guide": "nvp"}, "No guide named 'nvp'"),
        ({"guide": MeanField(3)}, "The guide has D = 3, but the latents that all rows of model"),
        ({"guide": 4}, "guide must be the name of a guide, Blocks, Multiplicative"),
    ],
)
def test_arguments_out_of_range_are_named(target, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        nested(target, **arguments)


def test_an_executor_trains_the_same_bound(target):
    """The worker makes its own target: weights of theta need the same gradient inside as here."""
    few = {"inner": "meanfield", "particles": 2, "draws": 2, "steps": 12, "outer": 3, "seed": 4}

    with ThreadPoolExecutor(1) as executor:
        there = nested(target, **few, executor=executor)
    here = nested(target, **few)

    np.testing.assert_array_equal(there.history["bound"], here.history["bound"])
    assert there.meta["outer"] == here.meta["outer"] == 3


def test_settings_of_rows_alone_are_refused_by_name(target):
    density = flowvi.NestedTarget(target, "meanfield")

    with pytest.raises(ValueError, match="has a batch_size of its own: epochs has no meaning"):
        flowvi.fit(density, epochs=4)


def test_a_divergence_that_does_not_train_the_guide_of_rows_is_refused_by_name(target):
    """Its draws of theta are given: neither the guide of rows nor the model has a gradient."""
    density = flowvi.NestedTarget(target, "meanfield")
    objective = flowvi.OBJECTIVES["forward_kl"](torch.zeros(4, 1, dtype=density.dtype))

    with pytest.raises(
        ValueError, match=r"forward_kl .*rows of model.*NestedTarget use .*elbo\(\)"
    ):
        flowvi.fit(density, objective=objective, steps=2, progress=False)
