"""A fit is a Pyro guide: the same values and densities, in all that Pyro does with guides."""

import math

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.reparam import LocScaleReparam, NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites
from torch import nn
from torch.distributions import constraints

import flowvi
from flowvi.guides import make_guide
from flowvi.guides.registry import mixture

ROWS = 5


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau + 0.5))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def of_all_kinds(y, size=None):
    low = pyro.sample("low", dist.Exponential(1.0))
    pyro.sample("bounded", dist.Uniform(-low, low + 1.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("angle", dist.VonMises(0.0, 2.0))
    outer = pyro.plate("outer", 2, dim=-2)
    with outer, pyro.plate("inner", 3, dim=-1):
        pyro.sample("deep", dist.Normal(low, 1.0))
    with outer:
        pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pyro.plate("row", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Normal(low, 1.0), obs=y[i])


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, y=None):
        mean = self.layer(x).squeeze(-1) + self.shift
        with pyro.plate("row", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def process():
    x = torch.linspace(-1.0, 1.0, ROWS)
    kernel = gp.kernels.RBF(1)
    kernel.lengthscale = PyroSample(dist.LogNormal(torch.tensor(0.0), 0.5))
    kernel.variance = PyroSample(dist.LogNormal(torch.tensor(0.0), 0.5))
    return gp.models.GPRegression(x, x.sin(), kernel, noise=torch.tensor(0.1)).model


def learned(y):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


DATA = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
MODELS = {
    "plates": lambda: (schools, (DATA,)),
    "supports of all kinds": lambda: (of_all_kinds, (DATA,)),
    "reparam": lambda: (
        poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)}),
        (DATA,),
    ),
    "condition": lambda: (pyro.condition(schools, data={"mu": torch.tensor(0.5)}), (DATA,)),
    "do": lambda: (pyro.do(schools, data={"tau": torch.tensor(0.7)}), (DATA,)),
    "PyroModule": lambda: (Network(), (torch.randn(ROWS, 2), DATA)),
    "Gaussian process": lambda: (process(), ()),
    "pyro.param": lambda: (learned, (DATA,)),
}


def fitted(model, *args):
    """A fit of no steps, its guide moved off where it starts."""
    target = flowvi.from_pyro(model, *args)
    guide = make_guide("realnvp", target.dim, depth=2, hidden=8).to(target.dtype)
    for p in guide.parameters():
        nn.init.normal_(p, std=0.2)
    return flowvi.Fit(target, [guide], [0.0], {})


@pytest.fixture
def fit():
    return fitted(schools, DATA)


def bound(fit, shape=()):
    """Log weights of the fit's own draws."""
    z, log_q = fit.guide.sample(shape)
    return fit.target.log_prob(z) - log_q


@pytest.mark.parametrize("name", MODELS)
def test_pyro_s_elbo_is_that_of_the_fit(name):
    model, args = MODELS[name]()
    fit = fitted(model, *args)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -Trace_ELBO(3).loss(model, guide, *args)
    torch.manual_seed(1)
    expected = sum(bound(fit).item() for _ in range(3)) / 3

    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["plates", "supports of all kinds", "reparam"])
def test_particles_are_drawn_at_once(name):
    model, args = MODELS[name]()
    fit = fitted(model, *args)
    guide = flowvi.pyro_guide(fit)
    elbo = Trace_ELBO(7, vectorize_particles=True, max_plate_nesting=2)

    torch.manual_seed(1)
    found = -elbo.loss(model, guide, *args)
    torch.manual_seed(1)
    expected = bound(fit, (7, 1, 1)).mean().item()

    assert found == pytest.approx(expected, rel=1e-9)


def test_gradients_are_those_of_the_total_elbo(fit):
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    Trace_ELBO().differentiable_loss(schools, guide, DATA).backward()
    torch.manual_seed(1)
    z, log_q = fit.guide.sample(())
    expected = torch.autograd.grad(log_q - fit.target.log_prob(z), list(fit.guide.parameters()))

    for p, gradient in zip(guide.density.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_further_training_improves_the_bound_and_leaves_the_fit_alone():
    fit = fitted(schools, DATA)
    guide = flowvi.pyro_guide(fit)
    before = [p.clone() for p in fit.guide.parameters()]
    svi = SVI(schools, guide, Adam({"lr": 0.03}), Trace_ELBO(20, vectorize_particles=True))

    losses = [svi.step(DATA) for _ in range(40)]

    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0
    assert all(map(torch.equal, before, fit.guide.parameters()))


def test_two_guides_do_not_share_parameters(fit):
    one, two = flowvi.pyro_guide(fit), flowvi.pyro_guide(fit)
    svi = SVI(schools, one, Adam({"lr": 0.1}), Trace_ELBO())

    svi.step(DATA)
    two(DATA)

    assert not all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_simulates_data(fit, parallel):
    def free(n, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("school", n):
            theta = pyro.sample("theta", dist.Normal(mu, tau + 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    draws = Predictive(free, guide=flowvi.pyro_guide(fit), num_samples=6, parallel=parallel)(ROWS)

    assert draws["y"].shape == draws["theta"].shape == (6, ROWS)
    assert draws["mu"].numel() == 6
    assert (draws["tau"] > 0).all()


def test_subsampled_rows_leave_the_elbo_unbiased():
    guide = flowvi.pyro_guide(fitted(of_all_kinds, DATA, 2))

    def loss(size, seed):
        torch.manual_seed(seed)
        return Trace_ELBO().loss(of_all_kinds, guide, DATA, size)

    gaps = torch.tensor([loss(2, seed) - loss(None, seed) for seed in range(100)])

    assert gaps.abs().max() > 0.1
    assert gaps.mean().abs() < 4 * gaps.std() / len(gaps) ** 0.5


def test_data_in_single_precision_are_met_by_values_of_theirs():
    torch.set_default_dtype(torch.float32)
    y = DATA.float()
    guide = flowvi.pyro_guide(fitted(schools, y))

    trace = poutine.trace(guide).get_trace(y)
    loss = Trace_ELBO().loss(schools, guide, y)

    assert {trace.nodes[name]["value"].dtype for name in ("mu", "tau", "theta")} == {torch.float32}
    assert loss == loss


def test_a_trace_holds_every_site_once_in_its_plate(fit):
    trace = poutine.trace(flowvi.pyro_guide(fit)).get_trace(DATA)

    sites = dict(prune_subsample_sites(trace).iter_stochastic_nodes())
    frames = {name: [f.name for f in s["cond_indep_stack"]] for name, s in sites.items()}
    latent = [name for name in frames if name.endswith("_latent")]
    assert frames == {latent[0]: [], "mu": [], "tau": [], "theta": ["school"]}


def test_neutra_samples_the_same_posterior(fit):
    guide = flowvi.pyro_guide(fit)
    neutra = NeuTraReparam(guide)
    moved = poutine.reparam(schools, config=lambda _: neutra)
    eps = torch.randn(fit.target.dim)

    trace = poutine.trace(pyro.condition(moved, {"mu_shared_latent": eps})).get_trace(DATA)
    z, ladj = fit.guide.transport(eps)

    # The noise itself is masked, so that the density is that of the model in its place.
    expected = fit.target.log_prob(z) + ladj
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    torch.testing.assert_close(guide.get_transform().inv(z), eps)

    chain = MCMC(NUTS(moved, max_tree_depth=3), 5, 5, disable_progbar=True)
    chain.run(DATA)
    draws = neutra.transform_sample(chain.get_samples()["mu_shared_latent"].unsqueeze(-2))
    assert draws["theta"].shape == (5, ROWS)


@pytest.mark.parametrize("case", ["mixture", "support"])
def test_neutra_is_refused_where_it_does_not_apply(case, fit):
    if case == "mixture":
        guide, model = flowvi.PyroGuide(fit.target, mixture(fit.target.dim)), schools
    else:
        guide, model = flowvi.pyro_guide(fitted(of_all_kinds, DATA)), of_all_kinds
    neutra = NeuTraReparam(guide)

    with pytest.raises(ValueError, match="NeuTraReparam only supports"):
        poutine.reparam(model, config=lambda _: neutra)(DATA)


def test_a_mixture_trains_by_the_score():
    """Weights of components have no path through the draws: their gradient is the score's."""
    target = flowvi.from_pyro(learned, DATA)
    guide = flowvi.PyroGuide(target, mixture(1, components=2, component="meanfield"))
    guide.density.start_components(
        [(torch.tensor([-0.5]), torch.eye(1)), (torch.tensor([1.0]), torch.eye(1))]
    )
    elbo = Trace_ELBO(300, vectorize_particles=True, max_plate_nesting=1)

    def one():
        loss = elbo.differentiable_loss(learned, guide, DATA)
        (found,) = torch.autograd.grad(loss, guide.density.logits.value)
        bound = flowvi.elbo(300, "total")(target.log_prob, guide.density).bound
        (expected,) = torch.autograd.grad(-bound, guide.density.logits.value)
        return found - expected

    differences = torch.stack([one() for _ in range(40)])

    assert not guide.get_posterior().has_rsample
    assert (differences.mean(0).abs() < 4 * differences.std(0) / len(differences) ** 0.5).all()


def test_enumerated_sites_are_summed_out():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)

    fit = fitted(model, DATA)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, DATA)
    torch.manual_seed(1)
    expected = bound(fit).item()

    assert found == pytest.approx(expected, rel=1e-6)


def test_parameters_start_where_the_fit_left_them():
    fit = fitted(learned, DATA)
    (leaf,) = (p for p, _ in fit.target.parameters_of_model.values())
    with torch.no_grad():
        leaf.add_(0.5)

    Trace_ELBO().loss(learned, flowvi.pyro_guide(fit), DATA)

    assert pyro.param("scale").item() == pytest.approx(2.0 * math.exp(0.5))


def test_parameters_of_another_training_are_refused():
    fit = fitted(learned, DATA)
    pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)

    with pytest.raises(flowvi.ModelError, match=r"another value of 'scale'.*clear_param_store"):
        flowvi.pyro_guide(fit)


def test_what_is_no_fit_is_refused(fit):
    with pytest.raises(TypeError, match=r"needs what flowvi.fit returned; got a FlowGuide"):
        flowvi.pyro_guide(fit.guide)


def test_a_plain_density_has_no_sites():
    target = flowvi.from_density(lambda v: -(v["x"] ** 2), {"x": flowvi.Site()})

    with pytest.raises(flowvi.ModelError, match="no Pyro sites"):
        flowvi.PyroGuide(target, flowvi.MeanField(1))


class Amortised(nn.Module):
    """A guide written by hand: a flow whose context is made of each row."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.flow = flowvi.FlowGuide(2, flowvi.FLOWS["realnvp"](2, 2, depth=2, hidden=8))

    def forward(self, x):
        pyro.module("amortised", self)
        with pyro.plate("row", len(x)):
            pyro.sample("z", flowvi.GuideDistribution(self.flow, self.encoder(x)))


def decoder(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = torch.stack([z[..., 0], z[..., 1], z.sum(-1)], -1)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("vectorised", [False, True])
def test_a_flow_serves_in_a_guide_written_by_hand(vectorised):
    x, guide = torch.randn(6, 3), Amortised()
    elbo = Trace_ELBO(4, vectorize_particles=vectorised, max_plate_nesting=1)
    svi = SVI(decoder, guide, Adam({"lr": 0.02}), elbo)

    losses = [svi.step(x) for _ in range(40)]

    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_distribution_scores_its_draws_and_other_values():
    guide = flowvi.FlowGuide(3, flowvi.FLOWS["realnvp"](3))
    for p in guide.parameters():
        nn.init.normal_(p, std=0.3)
    density = flowvi.GuideDistribution(guide).expand((4, 5))

    z = density.rsample()

    assert z.shape == (4, 5, 3)
    assert density.log_prob(z).shape == (4, 5)
    torch.testing.assert_close(density.log_prob(z), density.log_prob(z.clone()))
    assert not density.sample().requires_grad
    with_graph = density.log_prob(density.sample())
    assert with_graph.requires_grad  # drawn without a graph, scored with one
