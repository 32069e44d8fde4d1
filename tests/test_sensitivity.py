"""Power-scaling tells what the prior does to each marginal, as arviz_stats.psense does."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.compat.arviz_groups import group_names
from flowvi.diagnostics.power_scaling import POWERS, cjs_distance, power_scaling, sensitivities
from flowvi.interop.inference_data import log_terms

# Of arviz_stats 0.8.0, for the arrays of `example`.
PSENSE = {
    "prior": [0.13780214051758907, 0.473961500196239],
    "likelihood": [0.9768939444555464, 0.14755454677675114],
}


def example():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 250)).ravel(), rng.gamma(2.0, size=(4, 250)).ravel()
    components = {"prior": -0.5 * x**2 - y, "likelihood": -2.0 * (x - 1) ** 2 + np.log(y)}
    return np.stack([x, y], axis=1), components


def normal(data, width):
    mu = pyro.sample("mu", dist.Normal(0.0, width))
    with pyro.plate("row", len(data)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=data)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 3):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def fitted(model, *args, **settings):
    target = flowvi.from_pyro(model, *args)
    fit = flowvi.fit(target, "fullrank", steps=30, compile=False, progress=False, **settings)
    return fit.draw(2000)


@pytest.fixture(scope="module")
def groups():
    return fitted(hierarchy, torch.tensor([0.2, 1.0, -0.4]))


def test_numbers_are_those_of_psense():
    x, components = example()

    for name, component in components.items():
        found = sensitivities(x, [power_scaling(component, power) for power in POWERS])
        np.testing.assert_allclose(found, PSENSE[name], atol=1e-6)


def test_numbers_of_draws_are_those_of_psense(groups):
    arviz_stats = pytest.importorskip("arviz_stats", reason="arviz_stats comes with ArviZ 1")
    xarray = pytest.importorskip("xarray")
    idata = flowvi.to_inference_data(groups)
    names = ("posterior", "log_prior", "log_likelihood")
    tree = xarray.DataTree.from_dict({name: idata[name] for name in names})
    table = arviz_stats.psense_summary(tree, round_to=12)

    found = flowvi.sensitivity(groups)

    if flowvi.diagnose(groups).verdict == "trust":
        np.testing.assert_allclose(found.prior, table["prior"], atol=1e-6)
        np.testing.assert_allclose(found.likelihood, table["likelihood"], atol=1e-6)


def test_distances_lie_between_those_of_equal_and_of_far_distributions():
    x = np.random.default_rng(0).normal(size=2000)
    equal = np.full(2000, 1 / 2000)
    far = np.where(x > 2.0, 1.0, 0.0)

    assert cjs_distance(x, equal) == pytest.approx(0.0, abs=1e-3)
    assert 0.3 < cjs_distance(x, far / far.sum()) <= 1.0


def test_the_log_prior_adds_up_to_the_density(groups):
    priors, likelihood = log_terms(groups)
    z = torch.as_tensor(groups.z)
    _, jacobians = groups.target.latents(z.to(groups.target.dtype))
    parts = [*priors.values(), *likelihood.values(), *(j.numpy() for j in jacobians.values())]

    assert set(priors) == {"mu", "tau", "effect"} and priors["effect"].shape == (1, 2000, 3)
    total = sum(part.reshape(1, 2000, -1).sum(-1) for part in parts)
    np.testing.assert_allclose(total, groups.log_p, rtol=1e-5)


def test_exports_have_the_log_prior_and_give_the_same_answer(groups):
    idata = flowvi.to_inference_data(groups)
    found, again = flowvi.sensitivity(groups), flowvi.sensitivity(idata)

    assert {"log_prior", "log_likelihood"} <= set(group_names(idata))
    assert idata["log_prior"]["effect"].dims == ("chain", "draw", "group")
    assert found.labels == again.labels
    np.testing.assert_allclose(found.prior, again.prior)


def test_words_say_what_dominates_and_what_disagrees():
    weak = flowvi.sensitivity(fitted(normal, torch.linspace(-1.0, 1.0, 50), 100.0))
    few = flowvi.sensitivity(fitted(normal, torch.tensor([0.1]), 0.1))
    apart = flowvi.sensitivity(fitted(normal, 6.0 + 0.1 * torch.randn(8), 0.5))

    assert weak.findings == ("",) and str(weak).startswith("The data outweigh the prior")
    assert few.findings == ("the prior dominates",) and "mu: the prior dominates" in str(few)
    assert apart.findings == ("prior and data disagree",)
    for found in (weak, few, apart):
        assert found.reliable and repr(found) == str(found)
        assert all(math.isfinite(k) for pair in found.khat.values() for k in pair)


def test_priors_can_be_scaled_by_name(groups):
    shared = flowvi.sensitivity(groups, prior=["mu", "tau"], var_names=["tau"])

    assert shared.labels == ("tau",)
    assert shared.prior[0] != flowvi.sensitivity(groups, var_names=["tau"]).prior[0]
    with pytest.raises(ValueError, match="prior"):
        flowvi.sensitivity(groups, prior=["sigma"])
    with pytest.raises(ValueError, match="var_names"):
        flowvi.sensitivity(groups, var_names=["sigma"])


def test_draws_without_both_parts_are_refused(groups):
    plain = flowvi.from_density(lambda v: -0.5 * v["x"] ** 2, {"x": flowvi.Site()})
    density = flowvi.fit(plain, "meanfield", steps=5, compile=False, progress=False).draw(200)

    with pytest.raises(ValueError, match="no log prior of their own"):
        flowvi.sensitivity(density)
    with pytest.raises(ValueError, match="at least 100 draws; got 50"):
        flowvi.sensitivity(groups.thinned(50))
    with pytest.raises(TypeError, match="draw"):
        flowvi.sensitivity(None)


def test_doubtful_draws_give_doubtful_numbers(groups):
    bad = flowvi.Draws(
        groups.z, groups.log_q + 9.0 * groups.z[..., 0], groups.log_q, groups.values, groups.target
    )

    found = flowvi.sensitivity(bad)

    assert not found.reliable and "not trusted" in str(found)


def test_models_with_discrete_latents_have_a_prior_where_it_does_not_depend_on_them():
    def mixture(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            part = pyro.sample(
                "part", dist.Bernoulli(share), infer={"enumerate": "parallel"}
            ).long()
            pyro.sample("y", dist.Normal(4.0 * part.to(y.dtype), 1.0), obs=y)

    target = flowvi.from_pyro(mixture, torch.tensor([0.1, 3.9, 4.2]))
    z = torch.zeros(2, 1, dtype=target.dtype)

    expected = dist.Beta(2.0, 2.0).log_prob(torch.tensor(0.5)).item()
    assert target.log_prior(z)["share"].tolist() == pytest.approx([expected] * 2)


def test_a_picture_has_a_dot_for_each_scalar_and_component(groups):
    import matplotlib.pyplot as plt

    from flowvi.plots import plot_sensitivity

    ax = plot_sensitivity(flowvi.sensitivity(groups))

    assert len(ax.get_yticks()) == 5
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["likelihood", "prior"]
    plt.close("all")
