"""`fit(start=)`: values of the latents or an earlier fit, and what does not fit is refused."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import brief
from kinds import KINDS, data, own, whole

import flowvi
from flowvi.fitting.given_start import RIDGE, normal_of_draws

FAR = 40.0


@pytest.fixture(autouse=True)
def short(monkeypatch):
    brief(monkeypatch)


def two_modes(x):
    """A mode at either side, too far apart for a fit at one to see the other."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 100.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(a.abs(), 1.0), obs=x)


def two_modes_in_part(x):
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 100.0))
    with pyro.plate("row", len(x), subsample_size=5) as index:
        pyro.sample("x", dist.Normal(a.abs(), 1.0), obs=x[index])


def hierarchy(x):
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    s = pyro.sample("s", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("group", len(x)):
        u = pyro.sample("u", dist.Normal(m, s))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


@pytest.mark.parametrize("model", [two_modes, two_modes_in_part])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_search_begins_at_given_values(model, side):
    target = flowvi.from_pyro(model, FAR + torch.linspace(-1, 1, 20))

    fit = flowvi.fit(target, "fullrank", steps=5, start={"a": side * (FAR - 3)}, progress=False)

    values = fit.draw(100)["a"]
    assert abs(values.mean() - side * FAR) < 5 / math.sqrt(20)
    assert "start: the given values; no other places are searched" in fit.log


@pytest.mark.parametrize("name", ["global", "subsampled"])
def test_an_earlier_fit_is_a_start_and_lends_its_parameters(name):
    kind = KINDS[name]
    first = kind.target()
    earlier = kind.fit(first, 30)

    target = kind.target()
    fit = kind.fit(target, 1, start=earlier)

    # Without a start the parameter would be one step of at most 0.05 away from zero.
    assert abs(own(target) - own(first)) <= 0.051 < abs(own(first))
    assert "start: the earlier fit; no other places are searched" in fit.log
    width = fit.start.widths / earlier.guide.sample((4000,)).z.detach().double().std(0)
    assert 0.5 < float(width) < 2.0


def test_an_earlier_fit_of_rows_is_trained_on():
    kind = KINDS["rows"]
    first, target = kind.target(), kind.target()
    earlier = kind.fit(first, 20)

    fit = flowvi.fit(target, start=earlier, epochs=1, batch_size=2, lr=1e-9, progress=False)

    assert abs(own(target) - own(first)) < 1e-6
    for ours, theirs in zip(fit.guide.parameters(), earlier.guide.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours is not theirs
    assert fit.meta["specs"] == earlier.meta["specs"]


@pytest.mark.slow
def test_a_structured_fit_begins_at_the_shared_values():
    target = flowvi.from_pyro(hierarchy, torch.linspace(-2, 2, 60).sin())

    fit = flowvi.fit(target, "structured", start={"m": 0.1, "s": 0.5}, budget=20, progress=False)
    again = flowvi.fit(target, "structured", start=fit, budget=20, progress=False)

    for found, name in ((fit, "the given values"), (again, "the earlier fit")):
        assert f"start: {name}; no other places are searched" in found.log
    assert abs(fit.draw(400)["m"].mean() - again.draw(400)["m"].mean()) < 0.1


def mean_of_rows(x):
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def test_draws_are_a_start_by_their_weighted_moments(default):
    x = torch.linspace(0.0, 2.0, 19, dtype=default)
    target = flowvi.from_pyro(mean_of_rows, x)
    loc, sd = float(x.sum()) / 20, 20**-0.5
    exact = flowvi.fit(target, "fullrank", steps=5, progress=False).draw(1)
    # Draws of a normal that is off by one sd, and twice as wide.
    shifted = torch.distributions.Normal(loc + sd, 2 * sd)
    z = shifted.sample((1, 4000))
    with torch.no_grad():
        log_p = target.log_prob(z[0, :, None].to(target.dtype))[None]
    draws = replace(
        exact, z=z[..., None].numpy(), log_p=log_p.numpy(), log_q=shifted.log_prob(z).numpy()
    )

    found = normal_of_draws(draws)

    # The weights leave a third of the draws; 5 % of the variance of the plain ones is added.
    assert abs(float(found.loc) - loc) < 4 * sd / math.sqrt(4000 / 3)
    assert abs(float(found.scale_tril) / sd - math.sqrt(1 + RIDGE * 4)) < 4 / math.sqrt(
        2 * 4000 / 3
    )
    fit = flowvi.fit(target, "fullrank", steps=1, start=draws, progress=False)
    same = flowvi.fit(target, "fullrank", steps=1, start=fit.start, progress=False)
    assert abs(fit.start.loc - loc) < 0.05 * sd and abs(same.start.loc - loc) < 0.05 * sd
    assert "start: the given draws; no other places are searched" in fit.log


def test_draws_that_are_far_lead_to_a_search():
    near = flowvi.fit(flowvi.from_pyro(whole, data()), "fullrank", steps=1, progress=False)
    target = flowvi.from_pyro(whole, data() + 1000.0)

    fit = flowvi.fit(target, "fullrank", steps=1, start=near.draw(500), progress=False)

    assert "start: the given draws are not near the posterior" in fit.log[0]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"b": 1.0}, "start has a value for 'b', which is no latent site of hierarchy"),
        ({"s": -1.0}, r"start\['s'\] lies outside of the support"),
        ({"u": torch.zeros(4)}, "start does not fit hierarchy: Site 'u' has shape"),
        ({"m": math.nan}, r"start\['m'\] lies outside"),
    ],
)
def test_values_that_do_not_fit_are_refused(start, words):
    target = flowvi.from_pyro(hierarchy, torch.zeros(5))
    with pytest.raises(ValueError, match=words):
        flowvi.fit(target, "fullrank", steps=1, start=start, progress=False)


def test_a_start_of_another_kind_is_refused():
    fit = KINDS["global"].fit(KINDS["global"].target(), 1)
    rows = KINDS["rows"]
    with pytest.raises(ValueError, match="start must be an earlier fit of rows; got a Fit"):
        flowvi.fit(rows.target(), start=fit, progress=False)
    with pytest.raises(ValueError, match="other latents than hierarchy"):
        flowvi.fit(flowvi.from_pyro(hierarchy, torch.zeros(5)), start=fit, progress=False)
    with pytest.raises(TypeError, match="start must be values of the latent sites"):
        flowvi.fit(flowvi.from_pyro(whole, data()), start=3, progress=False)
    with pytest.raises(ValueError, match="start holds draws of whole with other latents"):
        flowvi.fit(flowvi.from_pyro(hierarchy, torch.zeros(5)), start=fit.draw(10), progress=False)
    with pytest.raises(ValueError, match="start is a normal of 1 dimensions"):
        flowvi.fit(flowvi.from_pyro(hierarchy, torch.zeros(5)), start=fit.start, progress=False)
    with pytest.raises(ValueError, match="start has no meaning for a NestedTarget"):
        flowvi.fit(flowvi.NestedTarget(KINDS["nested"].target()), start={"m": 0.0}, progress=False)
    earlier = rows.fit(rows.target(), 1)
    with pytest.raises(ValueError, match="start holds draws of rows, but whole has"):
        flowvi.fit(flowvi.from_pyro(whole, data()), start=earlier.draw(10), progress=False)
    with pytest.raises(ValueError, match="leave out guide"):
        flowvi.fit(rows.target(), "realnvp", start=earlier, progress=False)
