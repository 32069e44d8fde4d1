"""Discrete latents of random small models, against the sum over every joint value."""

import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import KINDS, Oracle
from pyro import poutine
from reference import with_gradient
from torch import Tensor

from flowvi.targets import ModelError, from_pyro
from flowvi.targets.pyro.from_pyro import replicable

EACH = 21
# The first ones of each kind, in both precisions; the others take minutes.
FIRST = 6
MODELS = [
    pytest.param(kind, seed, marks=[] if seed < FIRST else [pytest.mark.slow])
    for kind in KINDS
    for seed in range(EACH)
]


def tolerance() -> dict[str, float]:
    """Rounding, of a density whose own terms are in the default precision."""
    single = torch.get_default_dtype() == torch.float32
    return {"rtol": 2e-4, "atol": 2e-4} if single else {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize(("kind", "seed"), MODELS)
def test_sums_are_those_over_every_joint_value(kind, seed):
    torch.set_default_dtype(torch.float32 if seed % 3 == 1 else torch.float64)
    model = KINDS[kind](seed)
    target = from_pyro(model)
    rows = {name: torch.arange(size) for name, (_, size) in target.subsampled.items()}
    oracle = Oracle(model, target, rows)
    z = 0.7 * torch.randn(target.dim, generator=torch.Generator().manual_seed(seed))

    found = with_gradient(lambda z: target.log_prob(z, rows or None), z)
    torch.testing.assert_close(found, with_gradient(oracle.log_prob, z), **tolerance())
    if rows:
        return
    probabilities, expected = target.probabilities(z), oracle.probabilities(z)
    for name in expected:
        torch.testing.assert_close(probabilities[name].to(z), expected[name].to(z), **tolerance())
    likelihood = target.log_likelihood(z)
    assert bool(likelihood) == oracle.adds_up(z)
    for name, expected_rows in (oracle.log_likelihood(z) if likelihood else {}).items():
        torch.testing.assert_close(likelihood[name].to(z), expected_rows.to(z), **tolerance())


Y = torch.tensor([0.3, -1.2, 0.8])
PARALLEL = {"enumerate": "parallel"}


def total_of_a_plate() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
    pyro.sample("y", dist.Normal(m + z.sum(), 1.0), obs=Y[0])


def branch_on_a_value() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
    pyro.sample("y", dist.Normal(m if z > 0 else 2 * m, 1.0), obs=Y[0])


def list_by_a_value() -> None:
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer=PARALLEL)
    pyro.sample("y", dist.Normal([m[0], m[1]][int(z)], 1.0), obs=Y[0])


def impossible_steps() -> None:
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).log()
    z = torch.tensor(0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z{t}", dist.Categorical(logits=log_p[z]), infer=PARALLEL)
        pyro.sample(f"y{t}", dist.Normal(m[z], 1.0), obs=Y[t])


def many_values() -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("n", 3, dim=-3):
        z = pyro.sample("z", dist.Binomial(3, p), infer=PARALLEL)
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y.reshape(3, 1, 1))


def samples_asked_for() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0), infer=PARALLEL)
    infer = {"enumerate": "parallel", "num_samples": 5, "expand": True}
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=infer)
    pyro.sample("y", dist.Normal(m + z, 1.0), obs=Y[0])


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "model",
    [
        total_of_a_plate,
        branch_on_a_value,
        list_by_a_value,
        impossible_steps,
        many_values,
        samples_asked_for,
    ],
)
def test_models_that_need_another_way(model, default):
    torch.set_default_dtype(default)
    target = from_pyro(model)
    oracle = Oracle(model, target)
    z = torch.randn(target.dim)

    found = with_gradient(target.log_prob, z)
    torch.testing.assert_close(found, with_gradient(oracle.log_prob, z), **tolerance())
    for name, expected in oracle.probabilities(z).items():
        torch.testing.assert_close(target.probabilities(z)[name].to(z), expected, **tolerance())


def test_probabilities_of_vectors_and_of_all_rows():
    def model(size: int | None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("n", 3, subsample_size=size) as rows:
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)), infer=PARALLEL)
            pyro.sample("y", dist.Normal((z * mu).sum(-1), 1.0), obs=Y[rows])

    target, part = from_pyro(model, None), from_pyro(model, 2)
    z = torch.randn(4, 3)
    expected = torch.softmax(dist.Normal(z[:, None], 1.0).log_prob(Y[:, None]), -1)

    torch.testing.assert_close(target.probabilities(z)["z"], expected)
    torch.testing.assert_close(part.probabilities(z)["z"], expected)


def test_a_part_of_the_rows_beside_a_sum_of_its_own():
    def model(size: int | None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        shared = pyro.sample("shared", dist.Bernoulli(0.2), infer=PARALLEL)
        pyro.sample("x", dist.Normal(mu[0] * shared, 1.0), obs=Y[0])
        with pyro.plate("n", 3, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Bernoulli(0.4), infer=PARALLEL)
            pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=Y[rows])

    target, part = from_pyro(model, None), from_pyro(model, 2)
    z = torch.randn(4, 2)

    torch.testing.assert_close(target.log_prob(z), part.log_prob(z))
    torch.testing.assert_close(
        target.log_prob(z[0]), Oracle(lambda: model(None), target).log_prob(z[0])
    )


def selection(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("d", x.shape[1]):
        xi = pyro.sample("xi", dist.Bernoulli(0.5), infer=PARALLEL)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ (w * xi), 1.0), obs=y)


def test_data_of_a_sum_over_joint_values_can_be_replaced():
    x, other = torch.randn(3, 2), torch.randn(3)
    target = replicable(selection, x, Y).observing({"y": other})
    z = torch.randn(2)

    torch.testing.assert_close(target.log_prob(z), from_pyro(selection, x, other).log_prob(z))


def test_a_parameter_of_the_model_in_a_sum_over_joint_values():
    def model(q: Tensor | None = None) -> None:
        if q is None:
            q = pyro.param("q", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 2):
            xi = pyro.sample("xi", dist.Bernoulli(q), infer=PARALLEL)
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(m * xi.sum(), 1.0), obs=Y)

    target = from_pyro(model)
    z = torch.tensor([0.7])
    free = torch.logit(torch.tensor(0.3)).requires_grad_()
    oracle = Oracle(lambda: model(torch.sigmoid(free)), target)

    (expected,) = torch.autograd.grad(oracle.log_prob(z), free)
    (found,) = torch.autograd.grad(target.log_prob(z), list(target.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_data_and_priors_of_different_precision(default):
    torch.set_default_dtype(default)
    values = {}
    for given in (torch.float32, torch.float64):
        y = Y.to(given).numpy()

        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
                pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

        target = from_pyro(model, y)
        values[given] = target.log_prob(torch.tensor([0.3, -0.4], dtype=torch.float64))
        assert target.dtype == torch.float64
    torch.testing.assert_close(values[torch.float32], values[torch.float64], rtol=1e-6, atol=1e-6)


def test_simulations_of_single_values_are_made_all_at_once():
    """An index without axes is read by torch into Python, one draw at a time."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-9.0, 0.0, 9.0]), 0.1).to_event(1))
        for i in range(2):
            z = pyro.sample(f"z{i}", dist.Categorical(torch.ones(3)), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(torch.stack([mu, mu])[..., z - 3][0], 0.1), obs=Y[i])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = from_pyro(model).prior(500, 0)
    for i in range(2):
        counts = np.bincount(np.round(drawn[f"y{i}"] / 9 + 1).astype(int), minlength=3)
        # A count of 500 has a standard error of 10.5.
        assert (abs(counts - 500 / 3) < 45).all()


def test_derived_values_that_depend_on_a_discrete_site_are_left_out():
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer=PARALLEL)
            pyro.sample("y", dist.Normal(m + z, 1.0), obs=Y)
        pyro.deterministic("total", z.sum())
        pyro.deterministic("twice", 2 * m)

    assert from_pyro(model).deterministics == ("twice",)


def mentions(message: str, *parts: str) -> None:
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


def refused(model, *args) -> str:
    with pytest.raises(ModelError) as caught:
        from_pyro(model, *args)
    return str(caught.value)


def test_refusals_name_the_sites_and_the_way_out():
    def support() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
        x = pyro.sample("x", dist.Uniform(0.0, 1 + z))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    def scales() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
            with poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
                pyro.sample("y", dist.Normal(m + z, 1.0), obs=Y)

    def counts() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), p), infer=PARALLEL)
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def broadcasting(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("d", x.shape[1]):
            xi = pyro.sample("xi", dist.Bernoulli(0.5), infer=PARALLEL)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal((x * (w * xi).unsqueeze(-2)).sum(-1), 1.0), obs=y)

    def looped(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        total = sum(
            pyro.sample(f"z{i}", dist.Bernoulli(0.5), infer=PARALLEL) for i in pyro.plate("d", 40)
        )
        pyro.sample("y", dist.Normal(m + total, 1.0), obs=y)

    def weighted(x: Tensor, y: Tensor) -> None:
        with poutine.scale(scale=2.0):
            selection(x, y)

    mentions(refused(support), "support of site 'x'", "one support")
    mentions(refused(scales), "'z' and 'y'", "different scales", "full plate")
    mentions(refused(counts), r"'z' \(Binomial\)", "same set")
    for model in (selection, broadcasting):
        message = refused(model, torch.randn(3, 20), Y)
        mentions(message, "'xi' in plate 'd'", "1,048,576", "4,096", "pyro.factor")
    mentions(message, "'y' in plate 'n'")
    mentions(refused(looped, Y[0]), "too many of these sites at once", "10\\^12", "pyro.factor")
    mentions(refused(weighted, torch.randn(3, 2), Y), "'w' is scaled", "'xi'", "full plate")


def test_the_rows_of_a_local_model_are_summed_like_the_whole():
    def model(y: Tensor, keep: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=keep):
                z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
                pyro.sample("y", dist.Normal(x + mu[z.long()], 1.0), obs=y)

    keep = torch.tensor([True, False, True])
    target, rows = from_pyro(model, Y, keep), from_pyro(model, Y, keep, local="n")
    mu, x = torch.randn(2), torch.randn(3)
    z = target.unconstrain({"mu": mu, "x": x})

    found = rows.log_prob(x[:, None], rows.batch(range(3)), mu).sum() + rows.shared.log_prob(mu)
    torch.testing.assert_close(found, target.log_prob(z))
