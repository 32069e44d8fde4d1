"""The importance-weighted bound is one, subsampled or not, and both of its gradients are right."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from torch.distributions import constraints

import flowvi
from flowvi import IWELBO

ROWS, BATCH = 40, 4


@pytest.fixture(autouse=True)
def silent(caplog):
    caplog.set_level(logging.WARNING, logger="pyro")


@pytest.fixture
def x():
    return torch.linspace(-2.5, 2.5, ROWS)


def model(x, size=None):
    """Each row has a latent of its own; the evidence is known."""
    with pyro.plate("row", ROWS, subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def guide(x, size=None):
    slope = pyro.param("slope", torch.tensor(0.2))
    scale = pyro.param("scale", torch.tensor(0.9), constraint=constraints.positive)
    with pyro.plate("row", ROWS, subsample_size=size) as i:
        pyro.sample("z", dist.Normal(slope * x[i], scale))


def truth(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()


def mean_and_error(draw, n):
    values = torch.stack([torch.as_tensor(draw()) for _ in range(n)])
    return values.mean(0), values.std(0) / n**0.5


def iw(particles, gradient="dreg", vectorise=True):
    return IWELBO(particles, gradient, vectorize_particles=vectorise, max_plate_nesting=1)


@pytest.mark.parametrize("vectorise", [False, True])
def test_a_subsample_gives_the_same_bound_below_the_evidence(x, vectorise):
    whole, whole_error = mean_and_error(lambda: -iw(500).loss(model, guide, x), 10)
    bound, error = mean_and_error(lambda: -iw(4, vectorise=vectorise).loss(model, guide, x), 100)
    n = 500 if vectorise else 100
    elbo = iw(4, vectorise=vectorise)
    part, part_error = mean_and_error(lambda: -elbo.loss(model, guide, x, BATCH), n)

    assert abs(whole - truth(x)) < 0.02 + 4 * whole_error
    assert bound < truth(x) - 4 * error
    assert abs(part - bound) < 4 * (error**2 + part_error**2) ** 0.5


def test_pyro_s_own_would_exceed_the_evidence(x):
    renyi = RenyiELBO(alpha=0.0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)

    found, error = mean_and_error(lambda: -renyi.loss(model, guide, x, BATCH), 100)

    assert found > truth(x) + 4 * error


@pytest.mark.parametrize("gradient", ["dreg", "total"])
@pytest.mark.parametrize("size", [None, BATCH])
def test_gradients_are_those_of_the_exact_bound(x, gradient, size):
    """By differences of the bound, on the same noise of many runs."""

    def of_parameters(slope, log_scale):
        torch.manual_seed(0)
        z = slope * x + log_scale.exp() * torch.randn(4000, 8, ROWS)
        log_q = dist.Normal(slope * x, log_scale.exp()).log_prob(z)
        log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q
        return torch.logsumexp(log_w, 1).mean(0).sum()

    start = (torch.tensor(0.2), torch.tensor(0.9).log())
    expected = torch.stack(torch.autograd.functional.jacobian(of_parameters, start))

    def one():
        pyro.clear_param_store()
        iw(8, gradient).loss_and_grads(model, guide, x, size)
        leaves = dict(pyro.get_param_store().named_parameters())
        return -torch.stack([leaves["slope"].grad, leaves["scale"].grad])

    found, error = mean_and_error(one, 120)

    # The reference has an error of its own, of about 0.03.
    assert ((found - expected).abs() < 4 * error + 0.15).all()


def test_the_gradient_vanishes_for_each_draw_where_the_guide_is_exact(x):
    def exact(x, size=None):
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5).sqrt(), constraint=constraints.positive)
        with pyro.plate("row", ROWS, subsample_size=size) as i:
            pyro.sample("z", dist.Normal(slope * x[i], scale))

    loss = iw(6).loss_and_grads(model, exact, x)
    leaves = dict(pyro.get_param_store().named_parameters())

    assert loss == pytest.approx(-truth(x))
    assert all(leaf.grad.abs() < 1e-10 for leaf in leaves.values())
    iw(6).loss_and_grads(model, exact, x, BATCH)
    assert all(leaf.grad.abs() < 1e-10 for leaf in leaves.values())


def joint(y, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def test_global_latents_have_one_weight(x):
    y = x[:6] + 0.5
    covariance = torch.eye(6) + torch.ones(6, 6)
    evidence = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(y).item()

    def wide(y, size=None):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    estimates, _ = mean_and_error(lambda: -iw(2000).loss(joint, wide, y), 20)
    bound, error = mean_and_error(lambda: -iw(5).loss(joint, wide, y), 400)

    assert estimates == pytest.approx(evidence, abs=0.02)
    assert bound < evidence - 4 * error


@pytest.mark.parametrize("vectorise", [False, True])
def test_global_latents_and_a_subsample_are_refused(x, vectorise):
    def one(y, size=None):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(flowvi.ModelError, match=r"plate 'row'.*site 'mu' lies outside"):
        iw(4, vectorise=vectorise).loss(joint, one, x, BATCH)
    assert iw(1).loss(joint, one, x, BATCH) > 0  # one particle makes the ELBO, which is one


def test_one_particle_is_the_elbo(x):
    torch.manual_seed(1)
    found = iw(1).loss(model, guide, x, BATCH)
    torch.manual_seed(1)
    expected = Trace_ELBO().loss(model, guide, x, BATCH)

    assert found == pytest.approx(expected)


def test_a_point_estimate_is_trained_by_the_whole_gradient():
    """It has no score to drop: DReG must not square its weights."""

    def mixed(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def point(y):
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("mu", dist.Delta(loc))
        with pyro.plate("row", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    y = torch.tensor([0.5, 1.5, -0.2])

    def one(gradient):
        pyro.clear_param_store()
        torch.manual_seed(one.seed)
        iw(6, gradient).loss_and_grads(mixed, point, y)
        (leaf,) = (p for _, p in pyro.get_param_store().named_parameters())
        return leaf.grad

    for one.seed in range(3):
        torch.testing.assert_close(one("dreg"), one("total"))


def test_user_s_scales_stay_inside(x):
    """A tempered likelihood is part of the density, unlike the N / B of a subsample."""

    def tempered(y, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), pyro.poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def wide(y, size=None):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    y = x[:5]
    precision = 1 + 0.5 * len(y)
    quadratic = 0.5 * (0.5 * y.sum()) ** 2 / precision - 0.25 * y.square().sum()
    constant = 0.25 * len(y) * math.log(2 * math.pi)
    expected = quadratic - constant - 0.5 * torch.tensor(precision).log()

    found, error = mean_and_error(lambda: -iw(2000).loss(tempered, wide, y), 20)

    assert abs(found - expected) < 0.02 + 4 * error


def test_it_trains_an_autoguide_and_a_flowvi_guide(x):
    auto = AutoNormal(model)
    svi = SVI(model, auto, Adam({"lr": 0.05}), iw(8))
    losses = [svi.step(x) for _ in range(30)]
    target = flowvi.from_pyro(joint, x)
    fitted = flowvi.PyroGuide(target, flowvi.MeanField(1))
    fitted.density.start(torch.ones(1), torch.eye(1))
    svi = SVI(joint, fitted, Adam({"lr": 0.05}), iw(8))
    others = [svi.step(x) for _ in range(30)]

    assert sum(losses[-10:]) < sum(losses[:10])
    assert sum(others[-10:]) < sum(others[:10])


def test_the_torch_interface_differentiates_the_same_loss(x):
    target = flowvi.from_pyro(joint, x)
    fitted = flowvi.PyroGuide(target, flowvi.MeanField(1))

    class Model(torch.nn.Module):
        def forward(self, *args):
            joint(*args)

    torch.manual_seed(2)
    loss = iw(4)(Model(), fitted)(x)
    loss.backward()
    gradients = [p.grad.clone() for p in fitted.parameters()]
    fitted.zero_grad()
    torch.manual_seed(2)
    value = iw(4).loss_and_grads(joint, fitted, x)

    assert value == pytest.approx(loss.item())
    assert all(map(torch.equal, gradients, (p.grad for p in fitted.parameters())))


def test_what_cannot_be_weighted_is_refused(x):
    def discrete(x, size=None):
        with pyro.plate("row", ROWS):
            pyro.sample("z", dist.Poisson(1.0))

    def counts(x, size=None):
        with pyro.plate("row", ROWS):
            z = pyro.sample("z", dist.Poisson(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(flowvi.ModelError, match=r"'z' has draws without a gradient \(Poisson\)"):
        iw(4).loss_and_grads(counts, discrete, x)
    missing = pytest.raises(flowvi.ModelError, match="'z' of the model is neither observed nor in")
    with missing, pytest.warns(UserWarning, match="in model but not guide"):
        IWELBO(4).loss(model, lambda x: None, x)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        IWELBO(0)
    with pytest.raises(ValueError, match="No gradient named 'stl'"):
        IWELBO(4, "stl")


def test_autodelta_makes_every_weight_equal(x):
    torch.manual_seed(0)
    auto = AutoDelta(joint)

    many, one = iw(5).loss(joint, auto, x), Trace_ELBO().loss(joint, auto, x)

    assert many == pytest.approx(one)
