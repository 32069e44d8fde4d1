"""Modes that symmetries and further starts lead to, before a fit can overlook them."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from quick import quick
from random_models import random_model

import flowvi
from flowvi.guides import make_guide
from flowvi.initialization.ascents import ascend
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.initialization.missed_modes import describe_missed_modes, missed_modes
from flowvi.initialization.modes import further_modes
from flowvi.initialization.peaks import are_separate, connected_place, converged_peak
from flowvi.initialization.symmetry import images, symmetries

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


def ring():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square().sum(), 0.1), obs=torch.tensor(2.0))


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
        (clusters, ["entries of 'p', 'mu', 's' can be permuted"]),
        (chain, ["entries of 'first', 'move', 'mu' can be permuted"]),
        (product, ["the sign of 'a', 'b' can be flipped"]),
        (matrices, ["entries of 'precision' can be permuted"]),
        (line, []),
        (ring, ["entries of 'x' can be permuted", "the sign of 'x' can be flipped"]),
    ],
)
def test_symmetries_are_those_of_the_density(model, words):
    target = flowvi.from_pyro(model)

    found = symmetries(target, places(target))

    assert [symmetry.description for symmetry in found] == words


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
    home = GaussianApproximation(
        torch.tensor([3.0, 3.0], dtype=target.dtype), scale, "one", elbo=-0.1
    )
    starts = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=target.dtype)
    log = []

    found = further_modes(target, home, home.loc[None], starts, 1, log.append)

    signs = {tuple(g.loc.sign().int().tolist()) for g in found}
    assert signs == {(1, -1), (-1, 1), (-1, -1)} and len(found) == 3
    assert all(abs(g.mass) < 4 * g.mass_se + 1e-3 for g in found)
    assert log[0] == "symmetry of the density: the sign of 'a' can be flipped"


def test_one_mode_takes_no_further_starts():
    target = flowvi.from_pyro(line)
    scale = torch.eye(2, dtype=target.dtype)
    home = GaussianApproximation(torch.ones(2, dtype=target.dtype), scale, "one", elbo=-2.0)
    log = []

    found = further_modes(target, home, places(target)[:5], places(target), 1, log.append)

    assert found == [] and log == []


def test_hills_that_a_sign_leads_to_are_all_covered(monkeypatch):
    quick(monkeypatch, few_steps=60, steady_steps=60, evaluation_draws=500)
    target = flowvi.from_density(hills, {"a": flowvi.Site(), "b": flowvi.Site()})

    fit = flowvi.fit(target, seed=3, progress=False)

    draws = fit.draw(2000)
    diagnosis = flowvi.diagnose(draws)
    assert diagnosis.verdict != "do not trust"
    quarter = (draws.values["a"] > 0) & (draws.values["b"] > 0)
    assert abs(float(quarter.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert abs(diagnosis.log_evidence - math.log(4)) < 4 * diagnosis.log_evidence_se + 0.01


def counts(y, x, group):
    """Poisson regression with varying intercepts and slopes, correlated: one mode."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    factor = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
    theta = z @ (tau[:, None] * factor).mT
    with pyro.plate("row", len(y)):
        rate = a + b * x + theta[group, 0] + theta[group, 1] * x
        pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hierarchy_with_one_mode_has_no_other(dtype):
    """Normals without correlations around unfinished ascents were once taken for modes."""
    torch.set_default_dtype(dtype)
    x, group = torch.linspace(-2, 2, 60), torch.arange(60) % 4
    y = torch.poisson((0.8 + 0.4 * x + 0.5 * group - 0.2 * group * x).exp())
    target = flowvi.from_pyro(counts, y, x, group)

    fit = flowvi.fit(target, "meanfield", steps=1, escalate=False, progress=False)

    assert fit.meta["missed"] == [] and not any("modes" in line for line in fit.log)
    assert any(line.endswith("the best of 3 candidates") for line in fit.log)


@pytest.mark.parametrize("seed", [2, 5, 8])
def test_models_made_at_random_have_one_mode(seed):
    _, model, args = random_model(seed)
    target = flowvi.from_pyro(model, *args)
    points = places(target)
    home = GaussianApproximation(
        points[0], torch.eye(target.dim, dtype=target.dtype), "home", elbo=-1e3
    )
    ends = torch.stack([ascend(target, z)[-1] for z in points[:4]])

    assert further_modes(target, home, ends, points, 1, lambda words: None) == []


def neck(v):
    """A centred hierarchy: the density grows without bound as the scale goes to zero."""
    normal = dist.Normal(0.0, v["tau"].exp())
    return normal.log_prob(v["x"]).sum() + dist.Normal(0.0, 2.0).log_prob(v["tau"])


def test_a_density_without_bound_has_no_mode():
    target = flowvi.from_density(neck, {"x": flowvi.Site((20,)), "tau": flowvi.Site()})
    start = torch.cat([torch.ones(20), torch.zeros(1)]).to(target.dtype)
    path = ascend(target, start)

    assert all(converged_peak(target, z) is None for z in [start, path[len(path) // 2], path[-1]])


def double_well(v):
    a, b = v["x"]
    return -(a**4) + 6 * a**2 - 0.5 * b**2


def test_a_saddle_is_left_for_a_mode():
    target = flowvi.from_density(double_well, {"x": flowvi.Site((2,))})

    peak = converged_peak(target, torch.zeros(2, dtype=target.dtype))

    assert peak is not None
    wanted = torch.tensor([3.0**0.5, 0.0], dtype=target.dtype)
    torch.testing.assert_close(peak.loc.abs(), wanted, atol=0.05, rtol=0.0)
    # The curvature is 12 a^2 - 12 = 24 there, and 1 across.
    widths = torch.tensor([24.0**-0.5, 1.0], dtype=target.dtype)
    torch.testing.assert_close(peak.scale_tril.norm(dim=1), widths, atol=0.02, rtol=0.0)


def bow(v):
    """A ridge along a parabola, as high at both ends as in between."""
    x, y = v["x"]
    return -((x / 3) ** 8) - 50 * (y - x**2).square()


def two_bows(v):
    x, y = v["x"]
    arcs = [-0.1 * x.square() - 2 * (y - s * (2 + 0.3 * x.square())).square() for s in (1, -1)]
    return torch.logaddexp(*arcs)


def test_a_path_may_bend():
    """The straight line between the ends of a bow crosses a valley, the ridge does not."""
    site = {"x": flowvi.Site((2,))}
    one, two = flowvi.from_density(bow, site), flowvi.from_density(two_bows, site)
    left, right = torch.tensor([[-2.0, 4.0], [2.0, 4.0]], dtype=one.dtype)
    up, down = torch.tensor([[0.0, 2.0], [0.0, -2.0]], dtype=one.dtype)
    scale = torch.diag(torch.tensor([0.1, 0.1], dtype=one.dtype))

    assert connected_place(one, left, [right]) is None and not are_separate(one, left, right, scale)
    assert are_separate(two, up, down, scale)


def test_a_mode_has_a_mass_with_its_error():
    """Two normals with three and seven tenths of the mass."""

    def log_prob(v):
        parts = [0.3 * dist.Normal(4.0, 1.0).log_prob(v["x"]).exp().prod()]
        parts += [0.7 * dist.Normal(-4.0, 1.0).log_prob(v["x"]).exp().prod()]
        return sum(parts).log()

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})
    home = GaussianApproximation(
        torch.full((2,), -4.0, dtype=target.dtype), torch.eye(2).to(target.dtype), ""
    )
    home = dataclasses.replace(home, elbo=math.log(0.7))
    log = []

    (mode,) = further_modes(target, home, -home.loc[None], home.loc[None][:0], 1, log.append)

    assert abs(mode.mass - math.log(0.3)) < 4 * mode.mass_se + 1e-6 and mode.mass_se < 0.05
    words = describe_missed_modes([mode], math.log(0.7))
    assert "found another mode that the guide leaves out, with about 0.4" in words
    assert "standard error" in words
    guide = make_guide("fullrank", 2).to(target.dtype)
    guide.start(home.loc, home.scale_tril)
    assert missed_modes(target, guide, math.log(0.7), [mode], 1) == [mode]
    guide.start(mode.loc, mode.scale_tril)
    assert missed_modes(target, guide, math.log(0.3), [mode], 1) == []
    tiny = dataclasses.replace(mode, mass=math.log(0.7) - 5.0)
    guide.start(home.loc, home.scale_tril)
    assert missed_modes(target, guide, math.log(0.7), [tiny], 1) == []


def test_the_masses_of_missed_modes_add_up_with_their_errors():
    """Of e^c times 2 +- 2 * 0.3 and 1 +- 1 * 0.8, beside e^c that is covered."""
    covered, place = -7.0, torch.zeros(1)
    modes = [
        GaussianApproximation(
            place, torch.eye(1), "a mode", mass=covered + math.log(share), mass_se=error
        )
        for share, error in [(2.0, 0.3), (1.0, 0.8)]
    ]

    words = describe_missed_modes(modes, covered)

    assert "2 other modes" in words
    assert "about 3 times the mass that it covers (standard error 1)" in words
    assert "1 times the mass that it covers (standard error 0.8)" in describe_missed_modes(
        modes[1:], covered
    )
