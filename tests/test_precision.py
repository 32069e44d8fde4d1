"""One precision for every mix of inputs, the same for all kinds of models, and a result says it."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import flowvi
from flowvi.target import ModelError, from_pyro

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
