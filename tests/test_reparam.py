"""Sites that `poutine.reparam` put others in the place of are there under their own names."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import reparam

import flowvi

Y = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 2.5]])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"], autouse=True)
def precision(request):
    torch.set_default_dtype(request.param)


def groups(y, inside=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", len(y), dim=-1), poutine.reparam(config=inside or {}):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("of", len(y), dim=-2), pyro.plate("row", y.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(theta[:, None], 1.0), obs=y)


def decentred():
    return {"theta": reparam.LocScaleReparam(0.0)}


def inside(y):
    groups(y, decentred())


FORMS = {
    "config": lambda: poutine.reparam(groups, config=decentred()),
    "function": lambda: poutine.reparam(groups, config=lambda m: decentred().get(m["name"])),
    "handler": lambda: poutine.reparam(config=decentred())(groups),
    "within a plate": lambda: inside,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_original_is_there_beside_what_replaced_it(form):
    target = flowvi.from_pyro(FORMS[form](), Y.to(torch.get_default_dtype()))
    assert list(target.observed) == ["y"]
    assert target.deterministics == ("theta",)
    assert target.dims["theta"] == ("group",)
    z = torch.randn(4, target.dim)
    values = target.constrain(z)
    expected = values["mu"][:, None] + values["tau"][:, None] * values["theta_decentered"]
    torch.testing.assert_close(values["theta"], expected)
    assert set(target.log_likelihood(z)) == {"y"}
    # The density of a centred model, moved to the noise.
    plain = flowvi.from_pyro(groups, Y.to(torch.get_default_dtype()))
    centred = plain.unconstrain({n: values[n] for n in plain.sites})
    moved = plain.log_prob(centred) + 3 * values["tau"].log()
    torch.testing.assert_close(target.log_prob(z), moved.to(z), rtol=1e-5, atol=1e-5)


def test_draws_groups_and_predictions_have_the_original(brief):
    model = poutine.reparam(groups, config=decentred())
    target = flowvi.from_pyro(model, Y).label({"group": ["a", "b", "c"]})
    draws = flowvi.fit(target, "meanfield", steps=5).draw(50)
    theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["theta_decentered"]
    np.testing.assert_allclose(draws["theta"], theta, rtol=1e-5, atol=1e-5)
    idata = flowvi.to_inference_data(draws, prior=4, predictive=True)
    for group in (idata.posterior, idata.prior):
        assert group["theta"].dims[2:] == ("group",)
    assert list(idata.posterior["group"].values) == ["a", "b", "c"]
    assert list(idata.observed_data) == list(idata.posterior_predictive) == ["y"]
    found = flowvi.predict(draws, Y)
    np.testing.assert_allclose(found["theta"], theta, rtol=1e-5, atol=1e-5)
    assert set(found.log_likelihood) == {"y"}


def vector(y):
    theta = pyro.sample("theta", dist.StudentT(4.0, torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(theta[:2], 1.0).to_event(1), obs=y)


def test_reparametrisations_that_keep_the_density_with_the_original_are_proper():
    plain = flowvi.from_pyro(vector, Y)
    parts = poutine.reparam(vector, config={"theta": reparam.SplitReparam([1, 2], -1)})
    target = flowvi.from_pyro(parts, Y)
    assert target.improper == ()
    z = torch.randn(3, 3)
    torch.testing.assert_close(target.log_prob(z), plain.log_prob(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.constrain(z)["theta"].to(z), z, rtol=1e-5, atol=1e-5)


def direction(x):
    u = pyro.sample("u", dist.ProjectedNormal(torch.zeros(3)))
    pyro.sample("x", dist.Normal(u, 0.3).to_event(1), obs=x)


def relaxed(y):
    p = pyro.sample("p", dist.RelaxedOneHotCategorical(torch.tensor(0.7), torch.ones(3)))
    pyro.sample("y", dist.Normal(p, 1.0).to_event(1), obs=y)


def strategy(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


CONFIGS = {
    "projected": (direction, Y[:2].reshape(-1)[:3], {"u": reparam.ProjectedNormalReparam()}, "u"),
    "relaxed": (relaxed, torch.ones(3), {"p": reparam.GumbelSoftmaxReparam()}, "p"),
    "strategy": (strategy, Y[0], reparam.AutoReparam(centered=0.0), "scale"),
    "cosines": (vector, Y, {"theta": reparam.DiscreteCosineReparam()}, "theta"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_reparametrisation_keeps_the_original(name):
    model, y, config, site = CONFIGS[name]
    target = flowvi.from_pyro(poutine.reparam(model, config=config), y)
    assert site in target.deterministics
    assert site not in target.observed
    assert site in target.constrain(torch.zeros(target.dim))
    assert target.prior(2, 0)[site].shape[0] == 2


def local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0).expand([len(y), 2]).to_event(1))
        pyro.sample("y", dist.Normal(theta.sum(-1), 1.0), obs=y)


@pytest.mark.parametrize("site", ["theta", "mu"])
def test_rows_and_what_they_share_keep_the_original(site):
    model = poutine.reparam(local, config={site: reparam.LocScaleReparam(0.0)})
    target = flowvi.from_pyro(model, torch.arange(5.0), local="row")
    found = target.deterministics if site == "theta" else target.shared.deterministics
    assert found == (site,)
    if site == "theta":
        z, shared = torch.randn(5, 2), torch.zeros(1)
        values = target.constrain(z, target.batch(), shared)
        torch.testing.assert_close(values["theta"].to(z), 2 * z, rtol=1e-5, atol=1e-5)


def test_data_that_are_reparametrised_without_a_jacobian_are_refused():
    model = poutine.reparam(groups, config={"y": reparam.LocScaleReparam(0.0)})
    with pytest.raises(flowvi.ModelError, match="Leave 'y' out of"):
        flowvi.from_pyro(model, Y)


def test_an_observed_point_is_no_reparametrisation():
    """A Delta that is observed at other values has no density there."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(mu), obs=y)

    with pytest.raises(flowvi.ModelError, match="log density at site 'y' is -inf"):
        flowvi.from_pyro(model, torch.tensor(0.3))


def test_random_numbers_that_are_kept_out_of_the_density_are_refused():
    def model(n, y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Binomial(n, p), obs=y)

    config = {"p": reparam.ConjugateReparam(lambda n, y: dist.Beta(1 + y, 1 + n - y))}
    with pytest.raises(flowvi.ModelError, match="'p_updated' draws random numbers"):
        flowvi.from_pyro(
            poutine.reparam(model, config=config), torch.tensor(5.0), torch.tensor(2.0)
        )


def test_an_assertion_is_no_branch():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        assert x.exp() > 0
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = flowvi.from_pyro(model, torch.tensor(0.3))
    assert target.density.batched.how == "tape"
