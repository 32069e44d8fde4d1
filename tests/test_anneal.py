"""Annealed draws carry weights that are right, and go where the guide is short of mass."""

import math

import pytest
import torch

import flowvi
from flowvi.flows import realnvp
from flowvi.guides import FlowGuide, FullRank, MixtureGuide
from flowvi.samplers.ais import annealed_importance_sampling

LOC = [1.0, -0.5, 0.3]
LOG_Z = 3.0


def gaussian(scale=1.0):
    """A normal density of three dimensions, times e^3."""
    loc = torch.tensor(LOC)

    def log_prob(v):
        normal = torch.distributions.Normal(loc, scale)
        return LOG_Z + normal.log_prob(v["x"]).sum()

    return flowvi.from_density(log_prob, {"x": flowvi.Site((3,))})


def two_modes():
    """Normals of width 0.5 at -3 and +3 in both coordinates; the evidence is 1."""

    def log_prob(v):
        sides = [torch.distributions.Normal(m, 0.5).log_prob(v["x"]).sum() for m in (-3.0, 3.0)]
        return torch.logsumexp(torch.stack(sides), 0) - math.log(2)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def started(guide, loc, scale):
    guide.start(torch.tensor(loc), scale * torch.eye(guide.dim))
    return guide


GUIDES = {
    "full rank": lambda: started(FullRank(3), [0.0, 0.0, 0.0], 1.2),
    "flow": lambda: started(FlowGuide(3, realnvp(3, depth=2)), [0.2, 0.0, 0.0], 1.2),
    "mixture": lambda: started(MixtureGuide([FullRank(3), FullRank(3)]), [0.0, 0.0, 0.0], 1.2),
}


def log_mean(log_w):
    """Log of the mean weight, and its standard error by the delta method."""
    w = (log_w - log_w.max()).exp()
    return float(w.mean().log() + log_w.max()), float(w.std() / w.mean() / len(w) ** 0.5)


def exact(loc, scale, width, power):
    """Log of the integral of p^a / q^(a - 1) for isotropic normals, p of e^3 and q at zero."""
    p, q = power / scale**2, (power - 1) / width**2
    quadratic = 0.5 * (p * loc) ** 2 / (p - q) - 0.5 * p * loc**2
    sizes = -power * math.log(scale) + (power - 1) * math.log(width) - 0.5 * math.log(p - q)
    return power * LOG_Z + float((quadratic + sizes).sum())


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("temperatures", [0, 4])
def test_the_mean_weight_is_the_integral_of_the_path(power, temperatures, name):
    guide = GUIDES[name]()
    loc = torch.tensor(LOC) - (torch.tensor([0.2, 0, 0]) if name == "flow" else 0)

    found = annealed_importance_sampling(
        gaussian(), guide, 4000, power=power, temperatures=temperatures
    )
    value, error = log_mean(found.log_w)

    assert error < 0.1
    assert abs(value - exact(loc, 1.0, 1.2, power)) < 4 * error


def test_draws_end_at_the_last_density():
    """With enough rungs the draws themselves, not only their weights, are those of p."""
    found = annealed_importance_sampling(
        gaussian(0.6), started(FullRank(3), [0.0, 0.0, 0.0], 1.0), 2000, power=1.0
    )
    w = torch.softmax(found.log_w, 0)
    error = 0.6 * w.square().sum().sqrt()

    assert ((w @ found.z - torch.tensor(LOC)).abs() < 4 * error).all()
    assert ((found.z.mean(0) - torch.tensor(LOC)).abs() < 0.1).all()
    assert found.acceptance.min() > 0.4
    assert found.acceptance.max() < 0.9


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_weights_are_constant_where_the_guide_is_the_target(power, parts):
    guide = FullRank(3) if parts == 1 else MixtureGuide([FullRank(3), FullRank(3)])

    found = annealed_importance_sampling(gaussian(), started(guide, LOC, 1.0), 50, power=power)

    torch.testing.assert_close(found.log_w, torch.full((50,), power * LOG_Z))


@pytest.mark.parametrize("name", GUIDES)
def test_densities_are_those_at_the_draws(name):
    guide, target = GUIDES[name](), gaussian()

    found = annealed_importance_sampling(target, guide, 20, temperatures=2)

    torch.testing.assert_close(found.log_p, target.log_prob(found.z))
    torch.testing.assert_close(found.log_q, guide.log_prob(found.z).detach())
    assert all(p.requires_grad for p in guide.parameters())


def test_annealing_finds_the_mode_that_plain_weights_miss():
    target, guide = two_modes(), started(FullRank(2), [-2.0, -2.0], 1.5)

    plain, small = log_mean(
        annealed_importance_sampling(target, guide, 2000, power=1.0, temperatures=0).log_w
    )
    value, error = log_mean(
        annealed_importance_sampling(target, guide, 2000, power=1.0, temperatures=40).log_w
    )

    assert plain + 4 * small < -0.3, "it has half of the mass, and its error does not tell"
    assert abs(value) < 3 * error
    assert error < 0.3


def test_beyond_the_target_the_weight_is_where_the_guide_is_short():
    target, guide = two_modes(), started(FullRank(2), [-2.0, -2.0], 1.5)

    def share(power):
        found = annealed_importance_sampling(target, guide, 1000, power=power, temperatures=16)
        return float(torch.softmax(found.log_w, 0)[found.z[:, 0] > 0].sum())

    assert share(1.0) < 0.8
    assert share(2.0) > 0.99


def test_resampling_keeps_the_evidence_and_spreads_the_weights():
    """Its own error cannot be read off one run, whose draws depend on each other: many are."""
    target, guide = two_modes(), started(FullRank(2), [-2.0, -2.0], 1.5)
    options = {"power": 1.0, "temperatures": 20}

    plain = annealed_importance_sampling(target, guide, 1000, **options)
    found = [
        annealed_importance_sampling(target, guide, 1000, **options, resample=True, seed=s)
        for s in range(6)
    ]
    z = torch.tensor([math.exp(log_mean(f.log_w)[0]) for f in found])

    assert abs(z.mean() - 1) < 4 * z.std() / len(z) ** 0.5
    assert z.std() < 0.3
    assert log_mean(found[0].log_w)[1] < 0.5 * log_mean(plain.log_w)[1]


def half_line():
    """The half normal density on x > 0, nowhere else defined."""

    def log_prob(v):
        x = v["x"]
        return torch.where(x > 0, -0.5 * x**2, torch.nan).sum() + 0.5 * math.log(2 / math.pi)

    return flowvi.from_density(log_prob, {"x": flowvi.Site()})


def test_points_without_a_density_are_rejected_and_weigh_nothing():
    found = annealed_importance_sampling(half_line(), FullRank(1), 4000, power=1.0)
    value, error = log_mean(found.log_w)

    assert abs(value) < 4 * error
    assert (found.z[found.log_w.isfinite()] > 0).all()
    assert 0.4 < found.log_w.isinf().double().mean() < 0.6


def test_a_seed_gives_the_same_draws_and_leaves_the_generators_alone():
    state = torch.get_rng_state()
    first, second, other = (
        annealed_importance_sampling(gaussian(), FullRank(3), 10, seed=s).z for s in (1, 1, 2)
    )

    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_pieces_are_no_larger_than_the_target_asks_for(monkeypatch):
    target, sizes = gaussian(), []
    inner = target.density.forward
    monkeypatch.setattr(type(target), "chunk", lambda self: 30)
    monkeypatch.setattr(target.density, "forward", lambda z: sizes.append(len(z)) or inner(z))

    found = annealed_importance_sampling(target, FullRank(3), 100)

    assert len(found.z) == len(found.log_w) == 100
    assert max(sizes) == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"temperatures": -1}, "temperatures must be at least 0"),
        ({"leapfrog": 0}, "leapfrog must be at least 1"),
        ({"power": 0.0}, "power must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        annealed_importance_sampling(gaussian(), FullRank(3), **{"n": 10, **options})
