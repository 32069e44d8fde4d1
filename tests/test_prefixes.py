"""A guide whose depth is chosen when drawing: each prefix of its layers is a guide."""

import numpy as np
import pytest
import torch
from families import correlated, gradients, perturbed
from torch import nn

import flowvi
from flowvi.flows import FLOWS
from flowvi.guides import FlowGuide, PrefixGuide, make_guide
from flowvi.guides.prefixes import LAYERED, layers_of
from flowvi.objectives import elbo

SMALL = {"depth": 3}


def target():
    """A banana: y around x^2."""
    site = {"x": flowvi.Site(), "y": flowvi.Site()}
    return flowvi.from_density(
        lambda v: -(v["x"] ** 2) / 2 - (v["y"] - v["x"] ** 2) ** 2 / 0.5, site
    )


@pytest.fixture(scope="module")
def fit():
    return flowvi.fit(
        target(),
        flowvi.Prefixes("nsf_coupling", SMALL),
        steps=100,
        lr=0.01,
        particles=32,
        start={"x": 0.0, "y": 0.0},
        progress=False,
    )


def guide(flow="iaf", dim=3, context_dim=0):
    return perturbed(make_guide("prefixes", dim, context_dim, flow=flow, sizes=SMALL))


@pytest.mark.parametrize("name", LAYERED)
def test_a_composed_flow_is_its_layers_one_after_the_other(name):
    flow = perturbed(FLOWS[name](3, depth=3))
    x = torch.randn(5, 3)
    layers = layers_of(flow)

    y, ladj = x, 0.0
    for layer in layers:
        y, more = layer(y)
        ladj = ladj + more

    assert len(layers) == 3 and all(list(layer.parameters()) for layer in layers)
    torch.testing.assert_close((y, ladj), flow(x))


@pytest.mark.parametrize("name", LAYERED)
def test_each_prefix_scores_what_it_samples(name):
    whole = guide(name)
    for layers in range(4):
        part = whole.prefix(layers)
        z, log_q = part.sample((6,))
        assert part.depth == layers
        torch.testing.assert_close(part.log_prob(z), log_q, rtol=1e-6, atol=1e-6)
        if layers == 3:
            torch.testing.assert_close(whole.log_prob(z), log_q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", ["stl", "total"])
def test_the_objective_is_the_mean_of_the_bounds_of_all_prefixes(gradient):
    """In value and, on the same noise, in the gradient of each parameter."""
    whole, log_p = guide(), correlated_in_three()

    torch.manual_seed(1)
    bound = elbo(5, gradient)(log_p, whole).bound
    found = gradients(bound, whole)
    parts = []
    for layers in (0, 1, 2, 3):
        torch.manual_seed(1)
        parts.append(elbo(5, gradient)(log_p, deepest(whole.prefix(layers))).bound)
    mean = torch.stack(parts).mean()

    torch.testing.assert_close(bound, mean)
    torch.testing.assert_close(found, gradients(mean, whole))


def test_rows_are_trained_in_the_same_way():
    whole = guide(context_dim=2)
    context = torch.randn(4, 2)

    torch.manual_seed(1)
    bound = elbo(5)(correlated_in_three(), whole, context).bound
    parts = []
    for layers in (0, 1, 2, 3):
        torch.manual_seed(1)
        parts.append(elbo(5)(correlated_in_three(), deepest(whole.prefix(layers)), context).bound)

    assert bound.shape == (4,)
    torch.testing.assert_close(bound, torch.stack(parts).mean(0))


def test_all_prefixes_start_at_the_gaussian():
    whole = make_guide("prefixes", 2, flow="spline", sizes=SMALL)
    normal = correlated()

    whole.start(normal.loc, normal.scale_tril)

    z = torch.randn(7, 2)
    for layers in range(4):
        torch.testing.assert_close(whole.prefix(layers).log_prob(z), normal.log_prob(z))


def test_a_fit_draws_with_as_many_layers_as_asked(fit, tmp_path):
    """More layers are better here, and a saved fit has the same prefixes."""
    table = fit.prefixes(4000)

    assert [p.layers for p in table] == [0, 1, 2, 3]
    assert table[3].elbo > table[0].elbo + 4 * np.hypot(table[0].elbo_se, table[3].elbo_se)
    assert table[3].gap < 0.5 * table[0].gap and all(p.seconds > 0 for p in table)
    assert len(str(table).splitlines()) == 5
    again = flowvi.load(fit.save(tmp_path / "fit"), target())
    for layers in (0, 2):
        draws = fit.draw(500, layers=layers)
        z, log_q = draws.z[0], draws.log_q[0]
        np.testing.assert_allclose(
            fit.guide.prefix(layers).log_prob(torch.as_tensor(z)).detach(), log_q, rtol=1e-6
        )
        np.testing.assert_array_equal(again.draw(500, layers=layers).log_q, draws.log_q)
        # The check of the fit is of all layers.
        assert draws.meta["layers"] == layers and "check" not in draws.meta
    assert fit.draw(500, layers=3).meta["check"] == fit.meta["check"]
    np.testing.assert_array_equal(fit.draw(500).log_q, fit.draw(500, layers=3).log_q)
    first = flowvi.diagnose(fit.draw(4000, layers=1))
    assert first.elbo == table[1].elbo


class Identity(nn.Module):
    def forward(self, x):
        return x[:, None]


def test_rows_are_bounded_and_drawn_with_few_layers():
    """Each depth of a guide of rows has bounds of its own; more layers than it has are refused."""
    import pyro
    import pyro.distributions as dist

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(30)
    rows = flowvi.from_pyro(model, x, local="data")
    own = make_guide("prefixes", 1, 1, flow="planar", sizes=SMALL)
    found = flowvi.fit(
        rows, flowvi.Amortised(Identity(), own), epochs=3, batch_size=10, progress=False
    )

    bounds = [found.iw_bound(x, 5, layers=k).values for k in range(4)]
    draws = found.draw(20, x, layers=1)

    assert len({b.tobytes() for b in bounds}) == 4
    np.testing.assert_array_equal(found.iw_bound(x, 5).values, bounds[3])
    part = flowvi.Amortised(Identity(), found.guide.guide.prefix(1))
    with torch.no_grad():
        log_q = part.log_prob(torch.as_tensor(draws.z[0]), rows.as_batch(x))
    np.testing.assert_allclose(log_q, draws.log_q[0], rtol=1e-6)
    with pytest.raises(ValueError, match="layers must be at most 3"):
        found.draw(20, x, layers=4)


def test_guides_without_prefixes_are_refused():
    plain = flowvi.fit(target(), "meanfield", steps=3, start={"x": 0.0}, progress=False)

    with pytest.raises(ValueError, match=r"a MeanField was trained as a whole.*flowvi.Prefixes"):
        plain.draw(10, layers=1)
    with pytest.raises(ValueError, match="was trained as a whole"):
        plain.prefixes()
    with pytest.raises(ValueError, match=r"'householder' is not made of layers.*iaf"):
        flowvi.fit(target(), flowvi.Prefixes("householder"), progress=False)
    with pytest.raises(ValueError, match="No flow named 'nvp'"):
        flowvi.Prefixes("nvp").build(target())
    for guide_of in (flowvi.Prefixes("planar"), "prefixes"):
        with pytest.raises(ValueError, match="mean of their ELBOs: use elbo"):
            flowvi.fit(target(), guide_of, flowvi.iwelbo(8), progress=False)
    with pytest.raises(ValueError, match="layers must be at most 3"):
        guide().prefix(4)
    with pytest.raises(ValueError, match="A prefixes guide cannot be a block"):
        flowvi.fit(target(), flowvi.Blocks({"*": "prefixes"}), progress=False)
    with pytest.raises(ValueError, match="prefixes cannot be part of a mixture"):
        make_guide("mixture", 2, component="prefixes")
    with pytest.raises(ValueError, match="2 layers need 3 affine layers; got 1"):
        PrefixGuide(2, layers_of(FLOWS["planar"](2, depth=2)), [flowvi.flows.Triangular(2)])


def deepest(part):
    """The usual guide of all layers of a prefix, without those of fewer."""
    return FlowGuide(part.dim, part.flow, part.affine, part.base)


def correlated_in_three():
    normal = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, 0.0, -1.0]), torch.eye(3) + 0.3
    )
    return normal.log_prob
