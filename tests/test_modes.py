"""Modes that symmetries and further starts lead to, before a fit can overlook them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import run, training
from flowvi.gaussians import Gaussian
from flowvi.modes import further_modes
from flowvi.symmetry import images, symmetries

Y = torch.tensor([-4.1, -3.7, -4.4, 0.1, 0.3, -0.2, 5.2, 4.9, 4.8])


def clusters():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(Y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(mu + shared, s))
        pyro.sample("y", mixture, obs=Y)


def chain():
    first = pyro.sample("first", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("state", 2):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(2)))
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    alpha = first.log() + dist.Normal(mu, 1.0).log_prob(Y[0])
    for y in Y[1:]:
        alpha = (alpha[:, None] + move.log()).logsumexp(0) + dist.Normal(mu, 1.0).log_prob(y)
    pyro.factor("likelihood", alpha.logsumexp(0))


def product():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    c = pyro.sample("c", dist.Normal(1.0, 1.0))
    pyro.sample("y", dist.Normal(a * b + c, 0.5), obs=torch.tensor(2.0))


def matrices():
    pyro.sample("correlation", dist.LKJCholesky(3, 2.0))
    pyro.sample("precision", dist.Wishart(torch.tensor(5.0), covariance_matrix=torch.eye(2)))
    pyro.sample("order", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))


def line():
    w = pyro.sample("w", dist.Normal(torch.tensor([0.0, 1.0]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(2.0))


def hills(x):
    """Four equal hills at (+-3, +-3), of which a site's sign leads from one to another."""
    a, b = x["a"], x["b"]
    one = dist.Normal(3.0, 0.4)
    return one.log_prob(a.abs()) + one.log_prob(b.abs())


def places(target):
    return target.unconstrain({k: v for k, v in target.prior(40, 1).items() if k in target.sites})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (clusters, ["entries of 'p', 'mu', 's' can trade places"]),
        (chain, ["entries of 'first', 'move', 'mu' can trade places"]),
        (product, ["the sign of 'a', 'b' can be turned"]),
        (matrices, ["entries of 'precision' can trade places"]),
        (line, []),
    ],
)
def test_symmetries_are_those_of_the_density(model, words):
    target = flowvi.from_pyro(model)

    found = symmetries(target, places(target))

    assert [symmetry.words for symmetry in found] == words


def test_images_of_a_point_have_its_density_and_are_all_there_are():
    target = flowvi.from_pyro(clusters)
    z = places(target)[7]

    moved = images(target, symmetries(target, places(target)), z)

    values = target.constrain(torch.cat([z[None], moved]))
    assert len({tuple(row.tolist()) for row in values["mu"]}) == len(values["mu"]) == 6
    weights = values["p"].sort(-1).values
    torch.testing.assert_close(weights, weights[:1].expand(6, 3))
    torch.testing.assert_close(values["shared"], values["shared"][:1].expand(6))


def test_further_starts_find_what_the_first_have_not():
    target = flowvi.from_density(hills, {"a": flowvi.Site(), "b": flowvi.Site()})
    scale = 0.4 * torch.eye(2, dtype=target.dtype)
    home = Gaussian(torch.tensor([3.0, 3.0], dtype=target.dtype), scale, "one", elbo=-0.1)
    starts = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=target.dtype)
    log = []

    found = further_modes(target, home, home.loc[None], starts, 1, log.append)

    signs = {tuple(g.loc.sign().int().tolist()) for g in found}
    assert signs == {(1, -1), (-1, 1), (-1, -1)} and len(found) == 3
    assert all(abs(g.mass) < 4 * g.mass_se + 1e-3 for g in found)
    assert log[0] == "the density stays the same: the sign of 'a' can be turned"


def test_one_mode_takes_no_further_starts():
    target = flowvi.from_pyro(line)
    scale = torch.eye(2, dtype=target.dtype)
    home = Gaussian(torch.ones(2, dtype=target.dtype), scale, "one", elbo=-2.0)
    log = []

    found = further_modes(target, home, places(target)[:5], places(target), 1, log.append)

    assert found == [] and log == []


def test_hills_that_a_sign_leads_to_are_all_covered(monkeypatch):
    monkeypatch.setattr(run, "FEW_STEPS", 60)
    monkeypatch.setattr(run, "STEADY_STEPS", 60)
    monkeypatch.setattr(training, "JUDGE_DRAWS", 500)
    target = flowvi.from_density(hills, {"a": flowvi.Site(), "b": flowvi.Site()})

    fit = flowvi.fit(target, seed=3, progress=False)

    draws = fit.draw(2000)
    diagnosis = flowvi.diagnose(draws)
    assert diagnosis.verdict != "do not trust"
    quarter = (draws.values["a"] > 0) & (draws.values["b"] > 0)
    assert abs(float(quarter.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert abs(diagnosis.log_evidence - math.log(4)) < 4 * diagnosis.log_evidence_se + 0.01
