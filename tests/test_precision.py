"""One precision for every mix of inputs, the same for all kinds of models, and a result says it."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import flowvi
from flowvi.targets import ModelError, from_pyro

# The numbers of a prior, and what a float32 tensor makes of them.
LOC, SCALE = 0.3, 0.7
X = [-1.0, 0.5, 2.0, 0.25]
SEEN = {
    "float32": [0.1, -1.3, 2.2, 0.7],
    "float64": [0.1, -1.3, 2.2, 0.7],
    "int64": [0, 3, 1, 2],
    "bool": [True, False, True, True],
}


def numbers(kind):
    """The numbers of a prior as a user writes them."""
    if kind == "numbers":
        return LOC, SCALE
    dtype = getattr(torch, kind)
    return torch.tensor(LOC, dtype=dtype), torch.tensor(SCALE, dtype=dtype)


def likelihood(kind, mean):
    if kind == "bool":
        return dist.Bernoulli(logits=mean)
    if kind == "int64":
        return dist.Poisson(mean.exp())
    return dist.Normal(mean, SCALE)


def plain(kind, prior):
    """Without a plate; the mean is a product of matrices, which torch takes of one type only."""

    def model(x, y):
        loc, scale = numbers(prior)
        w = pyro.sample("w", dist.Normal(loc, scale).expand([1]).to_event(1))
        pyro.sample("y", likelihood(kind, x[:, None] @ w).to_event(1), obs=y)

    return model


def plates(kind, prior):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(*numbers(prior)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", likelihood(kind, x * w), obs=y)

    return model


def enumerated(kind, prior):
    def model(x, y):
        loc, scale = numbers(prior)
        w = pyro.sample("w", dist.Normal(loc, scale))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Bernoulli(scale), infer={"enumerate": "parallel"})
            pyro.sample("y", likelihood(kind, x * w + z), obs=y)

    return model


def given(kind):
    """Arguments as they come: numpy arrays of doubles, tensors of all else."""
    if kind == "float64":
        return np.array(X), np.array(SEEN[kind])
    dtype = torch.float32 if kind == "float32" else torch.get_default_dtype()
    return torch.tensor(X, dtype=dtype), torch.tensor(SEEN[kind], dtype=getattr(torch, kind))


def expected(shape, kind, prior, z):
    """The log density by hand, in double precision, of the numbers that were given. (S)"""
    loc, scale = (torch.tensor(float(n), dtype=torch.float64) for n in numbers(prior))
    inputs = [torch.as_tensor(a).double() for a in given(kind)]
    x, y = inputs
    log_prior = dist.Normal(loc, scale).log_prob(z[:, 0])

    def score(shift):
        mean = z * x + shift
        if kind == "bool":
            return dist.Bernoulli(logits=mean).log_prob(y)
        if kind == "int64":
            return dist.Poisson(mean.exp()).log_prob(y)
        return dist.Normal(mean, torch.tensor(SCALE, dtype=torch.float64)).log_prob(y)

    if shape is not enumerated:
        return log_prior + score(0.0).sum(-1)
    both = torch.stack([(1 - scale).log() + score(0.0), scale.log() + score(1.0)])
    return log_prior + both.logsumexp(0).sum(-1)


CELLS = list(
    itertools.product((plain, plates, enumerated), SEEN, ("numbers", "float32", "float64"))
)


@pytest.mark.parametrize(
    ("shape", "kind", "prior"), CELLS, ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_every_mix_is_evaluated_in_double(shape, kind, prior, default):
    """The density of the numbers that were given: what a tensor has rounded stays rounded."""
    target = from_pyro(shape(kind, prior), *given(kind))
    z = torch.tensor([[0.4], [-0.3]], dtype=torch.float64)

    log_p = target.log_prob(z)
    rows = target.log_likelihood(z)["y"]

    # Constants that a model makes of tensors in single precision have its rounding.
    rtol = 1e-6 if prior == "float32" else 1e-12
    assert target.dtype == log_p.dtype == rows.dtype == torch.float64
    torch.testing.assert_close(log_p, expected(shape, kind, prior, z), rtol=rtol, atol=0.0)
    assert {v.dtype for v in target.constrain(z).values()} == {torch.float64}
    assert target.log_prob(z.float()).dtype == torch.float32


def counts(y):
    level = pyro.sample("level", dist.Normal(14.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(level.exp()), obs=y)


def test_large_counts_lose_nothing():
    """The log factorial of a million, in single precision, is off by a nat for every row."""
    torch.set_default_dtype(torch.float32)
    y = np.array([1_202_604, 1_200_000, 1_210_000])

    found = from_pyro(counts, y).log_prob(torch.full((1,), 14.0, dtype=torch.float64))

    rate = torch.tensor(14.0, dtype=torch.float64).exp()
    rows = dist.Poisson(rate).log_prob(torch.tensor(y, dtype=torch.float64)).sum()
    torch.testing.assert_close(found, rows - 0.5 * np.log(2 * np.pi), rtol=1e-12, atol=0.0)


def test_columns_of_tables_are_evaluated_in_double(default):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"y": [0.1, 1.2, -0.4], "n": [1, 2, 3], "b": [True, False, True]})

    def model(y, n, b):
        w = pyro.sample("w", dist.Normal(LOC, SCALE))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(w * n + b, SCALE), obs=y)

    target = from_pyro(model, table.y, table.n, table.b)
    z = torch.zeros(1, dtype=torch.float64)

    exact = [torch.tensor(table[c].to_numpy(), dtype=torch.float64) for c in ("y", "b")]
    loc, scale = (torch.tensor(v, dtype=torch.float64) for v in (LOC, SCALE))
    rows = dist.Normal(exact[1], scale).log_prob(exact[0]).sum()
    expected = dist.Normal(loc, scale).log_prob(z[0]) + rows
    torch.testing.assert_close(target.log_prob(z), expected, rtol=1e-12, atol=0.0)


def test_what_a_model_holds_in_single_is_rounded_once():
    """Data from outside meet a scalar, which torch lets round to them: the graph does not."""
    torch.set_default_dtype(torch.float32)
    y = torch.tensor([0.1, 1.2, -0.4])

    def model():
        w = pyro.sample("w", dist.Normal(LOC, SCALE))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(w, SCALE), obs=y)

    def density(v):
        priors = dist.Normal(LOC, SCALE).log_prob(v["w"])
        return priors + dist.Normal(v["w"], SCALE).log_prob(y).sum()

    z = torch.tensor([0.123456789], dtype=torch.float64)
    loc, scale = (torch.tensor(v, dtype=torch.float64) for v in (LOC, SCALE))
    rows = dist.Normal(z, scale).log_prob(y.double()).sum()
    expected = dist.Normal(loc, scale).log_prob(z[0]) + rows
    for target in (from_pyro(model), flowvi.from_density(density, {"w": flowvi.Site()})):
        torch.testing.assert_close(target.log_prob(z), expected, rtol=1e-12, atol=0.0)


def through(net):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(torch.ones((), dtype=torch.float64)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(net(w) + x, s), obs=y)

    return model


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_network_in_single_keeps_its_latents_in_single(kind):
    """Beside data and latents in double too; evaluated in double, and simulated as it is."""
    torch.set_default_dtype(torch.float32)
    net = nn.Linear(1, 1).requires_grad_(False)
    x, y = given(kind)
    fit = flowvi.fit(from_pyro(through(net), x, y), "meanfield", steps=2, progress=False)
    draws = fit.draw(20)

    again = flowvi.predict(draws, x, y)
    data = fit.target.predictive({name: draws[name][0] for name in ("w", "s")}, 0)

    assert np.isfinite(data["y"]).all() and data["y"].shape == (20, 4)
    slope, shift = net.weight.double(), net.bias.double()
    mean = torch.as_tensor(draws["w"][0]) @ slope.T + shift + torch.as_tensor(x).double()
    width = torch.as_tensor(draws["s"][0]).unsqueeze(-1)
    exact = dist.Normal(mean, width).log_prob(torch.as_tensor(y).double())
    torch.testing.assert_close(
        torch.as_tensor(again.log_likelihood["y"][0]).double(), exact, rtol=1e-6, atol=1e-6
    )
    assert fit.meta["precision"] == "float64" and "float64" in str(fit).splitlines()[0]


HELD = torch.eye(2, dtype=torch.float32)


def test_types_that_do_not_go_together_are_named():
    """Never in the words of torch alone."""
    torch.set_default_dtype(torch.float32)
    net = nn.Linear(1, 1).requires_grad_(False)

    def on_rows(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] * w, SCALE), obs=y)

    def by_hand(v):
        return -(HELD @ v["x"]).sum() - (HELD.double() @ v["x"]).square().sum()

    x, y = given("float64")
    with pytest.raises(ModelError, match=r"float64 \(argument 'x'.*float32 \(site 'w'.*behind"):
        from_pyro(on_rows, x[:, None], y)
    with pytest.raises(ModelError, match=r"mixes tensors.*site 'w'.*\.double\(\)"):
        from_pyro(on_rows, x[:, None], y, local="row")
    with pytest.raises(ModelError, match=r"by_hand fails.*site 'x'.*\.double\(\)"):
        flowvi.from_density(by_hand, {"x": flowvi.Site((2,))})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_parameters_that_cannot_be_trained_are_refused_by_name(dtype):
    def model(y):
        loc = pyro.param("loc", torch.ones((), dtype=dtype))
        pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(loc, 1.0)), 1.0), obs=y)

    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=f"Parameter 'loc' is {name}; .*float32 or float64"):
        from_pyro(model, torch.tensor(0.5))


def test_modules_in_half_precision_are_refused_by_name():
    net = nn.Linear(1, 1).bfloat16()

    def model(y):
        pyro.module("net", net)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"weight' is bfloat16; .*\.float\(\)"):
        from_pyro(model, torch.tensor(0.5))
