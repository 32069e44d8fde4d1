"""Observations with `obs_mask`: what they lack is latent, and nothing else."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import brief as make_brief
from pyro import poutine

import flowvi

NAN = float("nan")
SEEN = torch.tensor([True, False, True, True, False])
Y = torch.tensor([1.0, NAN, 2.0, 0.5, NAN])


def normal(y, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", len(y)):
        return pyro.sample("y", dist.Normal(m, s), obs=y, obs_mask=seen)


def positive(y, seen):
    """Latents inside a support that depends on other latents, and a use of all values."""
    m = pyro.sample("m", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Uniform(0.0, m + 3.0), obs=y, obs_mask=seen)
        pyro.sample("z", dist.Normal(x, 1.0), obs=torch.arange(len(y)) / 2.0)


def vectors(y, seen):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y, obs_mask=seen)


def shares(y, seen):
    """Values with fewer unconstrained numbers than entries."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Dirichlet(a * torch.ones(3)), obs=y, obs_mask=seen)


def table(y, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 5, dim=-2), pyro.plate("column", 2, dim=-1):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=seen)


PAIRS = torch.stack([Y, Y + 1], -1)
PARTS = torch.where(SEEN[:, None], torch.tensor([0.2, 0.3, 0.5]), NAN)
GRID = torch.stack([SEEN, SEEN.flip(0)], -1)
CASES = {
    "normal": (normal, Y, SEEN, "y", 2),
    "positive": (positive, Y, SEEN, "x", 2),
    "vectors": (vectors, PAIRS, SEEN, "y", 4),
    "shares": (shares, PARTS, SEEN, "y", 4),
    "table": (table, torch.where(GRID, torch.arange(10.0).reshape(5, 2), NAN), GRID, "y", 4),
    "none seen": (normal, Y * NAN, torch.zeros(5, dtype=torch.bool), "y", 5),
    "all seen": (normal, torch.ones(5), torch.ones(5, dtype=torch.bool), "y", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_density_is_that_of_the_missing_elements(case):
    """The log joint of the seen rows, the missing ones and the rest, as Pyro adds it up."""
    model, y, seen, name, size = CASES[case]
    target = flowvi.from_pyro(model, y, seen)
    rest = sum(s.stop - s.start for n, s in target.slices.items() if n != f"{name}_unobserved")
    assert target.dim == rest + size
    assert not target.masked  # by what was seen, no prior is
    z = torch.randn(3, target.dim, generator=torch.Generator().manual_seed(0)).to(target.dtype)
    values = target.constrain(z)
    torch.testing.assert_close(target.unconstrain(values), z, rtol=1e-4, atol=1e-4)
    ladj = sum(v.reshape(3, -1).sum(-1) for v in target.latents(z)[1].values())
    for i in range(3):
        full = torch.where(seen.reshape(*seen.shape, *(1,) * (y.dim() - seen.dim())), y, 0.0)
        if size:
            full[~seen] = values[f"{name}_unobserved"][i].to(full)
        given = {n: values[n][i] for n in target.sites if n != f"{name}_unobserved"}
        # The same model with all values given has the density of both.
        whole = poutine.condition(model, data=given)
        trace = poutine.trace(whole).get_trace(full, torch.ones_like(seen))
        expected = trace.log_prob_sum() + ladj[i]
        torch.testing.assert_close(
            target.log_prob(z)[i].float(), expected.float(), rtol=1e-5, atol=1e-5
        )
        seen_too = values[name][i].to(full)
        torch.testing.assert_close(seen_too[seen], y[seen])
        torch.testing.assert_close(seen_too, full, rtol=1e-5, atol=1e-5)


def evidence(y, seen):
    """Log density of y_n ~ N(m, 1), m ~ N(0, 1), at the rows that are seen."""
    k = int(seen.sum())
    fn = dist.MultivariateNormal(torch.zeros(k), torch.eye(k) + torch.ones(k, k))
    return float(fn.log_prob(y[seen]))


def linear(y, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=seen)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["single", "double"])
def fitted(request):
    torch.set_default_dtype(request.param)
    y = Y.to(request.param)
    target = flowvi.from_pyro(linear, y, SEEN).label({"row": list("abcde")})
    with pytest.MonkeyPatch.context() as patch:
        make_brief(patch)
        fit = flowvi.fit(target, "fullrank", steps=200)
    return y, fit.draw(1000)


def test_fit_is_that_of_the_observed_rows(fitted):
    y, draws = fitted
    found = flowvi.evidence(draws)
    assert found.log_evidence == pytest.approx(evidence(y, SEEN), abs=1e-3)
    assert flowvi.diagnose(draws).verdict == "trust"
    # The exact posterior of a missing value: N(mean, var) of m, and one more.
    mean, var = y[SEEN].sum() / 4, 1 / 4
    free = draws["y_unobserved"]
    error = ((1 + var) / free[..., 0].size) ** 0.5
    assert free.shape == (1, 1000, 2)
    assert abs(free.mean((0, 1)) - float(mean)).max() < 4 * error
    full = draws["y"]
    np.testing.assert_allclose(full[..., SEEN.numpy()], y[SEEN].expand(1, 1000, -1), rtol=1e-6)
    np.testing.assert_allclose(full[..., ~SEEN.numpy()], free, rtol=1e-6)


def test_groups_name_the_missing_rows(fitted):
    _, draws = fitted
    idata = flowvi.to_inference_data(draws, prior=3, predictive=5)
    for group in (idata.posterior, idata.prior):
        assert group["y_unobserved"].dims[2:] == ("y_missing",)
        assert list(group["y_missing"].values) == ["b", "e"]
        assert group["y"].dims[2:] == ("row",)
    assert idata.posterior_predictive["y_observed"].shape == (1, 5, 5)
    scores = idata.log_likelihood["y_observed"].values
    assert (scores[..., [1, 4]] == 0).all() and (scores[..., [0, 2, 3]] != 0).all()


def test_loo_leaves_out_what_was_not_seen(fitted):
    y, draws = fitted
    found = flowvi.loo(draws)
    expected = [evidence(y, SEEN) - evidence(y, SEEN & (torch.arange(5) != i)) for i in (0, 2, 3)]
    assert found.n_data_points == 3
    scores = flowvi.to_inference_data(draws).log_likelihood["y_observed"].values[0][:, SEEN]
    ratios = np.exp(-scores)
    errors = ratios.std(0) / ratios.mean(0) / len(ratios) ** 0.5
    assert (abs(found.loo_i - expected) < 5 * errors).all()
    again = flowvi.loo(flowvi.resample(draws))
    assert again.n_data_points == 3
    assert "of 3 rows" in str(flowvi.predict(draws, y, SEEN))
    # Missing values compare as equal: these are the same data.
    assert len(flowvi.compare({"one": draws, "two": draws}).models) == 2


def test_predictions_for_other_gaps_draw_what_these_lack(fitted):
    y, draws = fitted
    same = flowvi.predict(draws, y, SEEN)
    np.testing.assert_allclose(same["y"][..., 1], draws["y_unobserved"][..., 0], rtol=1e-6)
    other = SEEN.flip(0)
    new = flowvi.predict(draws, y.nan_to_num(0.3), other)
    assert new["y_unobserved"].shape == (1, 1000, 2)
    np.testing.assert_allclose(new["y"][..., [0, 3]], new["y_unobserved"], rtol=1e-6)
    # Drawn given m: independent noise of variance one.
    noise = new["y_unobserved"] - draws["m"][..., None]
    assert abs(noise.var((0, 1)) - 1).max() < 5 * (2 / 1000) ** 0.5
    assert "y_unobserved" not in flowvi.predict(draws, torch.ones(5), SEEN | ~SEEN).values


def test_pyro_takes_the_fit_as_a_guide(brief):
    fit = flowvi.fit(flowvi.from_pyro(linear, Y, SEEN), "fullrank", steps=200)
    guide = flowvi.pyro_guide(fit)
    loss = pyro.infer.Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1)
    found = -loss.loss(linear, guide, Y.nan_to_num(), SEEN)
    assert found == pytest.approx(evidence(Y, SEEN), abs=1e-3)


def test_rows_with_guides_of_their_own_have_one_length():
    """A row's vector has a place for the value whether it is missing or not."""

    def model(y, seen):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=seen)

    target = flowvi.from_pyro(model, Y, SEEN, local="row")
    assert target.dim == 2
    z = torch.randn(5, 2).to(target.dtype)
    found = target.log_prob(z, target.batch())
    normal = dist.Normal(0.0, 1.0)
    free = normal.log_prob(z[:, 1] - z[:, 0])
    seen = torch.where(SEEN, normal.log_prob(Y.nan_to_num() - z[:, 0]), 0.0)
    torch.testing.assert_close(found, normal.log_prob(z[:, 0]) + free + seen, rtol=1e-5, atol=1e-5)
