"""Parameters of a model in single precision are trained in double, and stay single for their owner.

They end where the same parameters in double do.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import flowvi
from flowvi.guides import Draw, Guide, make_guide
from flowvi.runtime.clock import Clock
from flowvi.targets import from_pyro
from flowvi.training.compiling.graph import trace
from flowvi.training.draw_gradient import DrawGradient
from flowvi.training.flat import Finest
from flowvi.training.settings import Settings

Y = [1.2, 0.4, 2.9, 1.7, 0.8]
# Of a trained number: it is rounded once, and steps follow the rounded one.
ROUNDING = 1e-5


def rows(y, loc):
    th = pyro.sample("th", dist.Normal(loc, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(th, 1.0), obs=y)


def tensor():
    return lambda y: rows(y, pyro.param("loc", torch.tensor(0.5)))


def lazy():
    return lambda y: rows(y, pyro.param("loc", lambda: torch.full((), 0.5)))


def number():
    return lambda y: rows(y, pyro.param("loc", 0.5))


def outside():
    start = torch.tensor(0.5)
    return lambda y: rows(y, pyro.param("loc", start, constraint=constraints.positive))


class Held(PyroModule):
    """A learned and a frozen parameter, an integer buffer, and a batch norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))
        self.width = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.register_buffer("count", torch.tensor(1))
        self.norm = nn.BatchNorm1d(1, affine=False).eval()

    def forward(self, y):
        zero = self.norm(self.width.new_zeros(2, 1)).sum()
        rows(y, (self.loc + zero) * self.width * self.count)


class Constrained(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, y):
        rows(y, self.loc)


def network():
    net = nn.Linear(1, 1)
    net.weight.data.fill_(0.1)
    net.bias.data.fill_(0.5)

    def model(y):
        pyro.module("net", net)
        rows(y, net(net.bias.new_ones(1))[0])

    return model


KINDS = [tensor, lazy, number, outside, Held, Constrained, network]


def value_of(target):
    """The prior mean that was learned, from the parameters as their owner has them."""
    total = 0.0
    for leaf, constraint in target.parameters_of_model.values():
        total += float(torch.distributions.transform_to(constraint)(leaf.detach()).double().sum())
    return total


def trained(make, dtype, data=None, steps=60, **settings):
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    y = torch.tensor(Y) if data is None else data
    target = from_pyro(make(), y)
    fit = flowvi.fit(
        target, "fullrank", steps=steps, lr=0.1, progress=False, compile=False, **settings
    )
    return target, fit


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__.lower())
def test_they_are_trained_as_those_in_double(make, brief):
    target, fit = trained(make, torch.float32)
    exact, expected = trained(make, torch.float64)

    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    assert target.dtype == torch.float64 and fit.meta["precision"] == "float64"
    assert abs(value_of(target) - 0.5) > 0.5
    assert value_of(target) == pytest.approx(value_of(exact), rel=ROUNDING)
    # What is reported is of the parameters as their owner has them.
    np.testing.assert_allclose(fit.bounds, expected.bounds, rtol=ROUNDING)
    again = target.log_prob(torch.as_tensor(fit.draw(50).z[0])).detach().numpy()
    np.testing.assert_allclose(fit.draw(50).log_p[0], again, rtol=1e-12)


def test_a_callback_sees_them_as_they_are_after_its_step(brief):
    seen = {torch.float32: [], torch.float64: []}
    for dtype, values in seen.items():
        torch.set_default_dtype(dtype)
        target = from_pyro(tensor(), torch.tensor(Y))

        def note(step, target=target, values=values):
            values.append(value_of(target))

        flowvi.fit(target, "fullrank", steps=5, lr=0.1, callback=note, progress=False)

    assert abs(seen[torch.float32][0] - 0.5) > 0.01
    np.testing.assert_allclose(*seen.values(), rtol=ROUNDING)


def test_they_reach_the_maximum_of_the_evidence(brief):
    """Of y ~ N(loc, 2) with equal correlations, loc is the mean of the data."""
    target, fit = trained(tensor, torch.float32, steps=300)

    mean, n = np.mean(Y), len(Y)
    # A step has 64 draws of the posterior's width; the last steps average some ten of them.
    error = (1 / (n + 1)) ** 0.5 / (64 * 10) ** 0.5
    assert abs(value_of(target) - mean) < 4 * error
    covariance = np.eye(n) + 1
    away = np.array(Y) - mean
    evidence = -0.5 * (
        away @ np.linalg.solve(covariance, away)
        + np.linalg.slogdet(covariance)[1]
        + n * np.log(2 * np.pi)
    )
    assert fit.bounds[0] == pytest.approx(evidence, abs=1e-3)


def test_data_in_double_leave_them_single(brief):
    """Whoever passes arrays of numpy has parameters of the type that they were made in."""
    target, _ = trained(tensor, torch.float32, np.array(Y))
    exact, _ = trained(tensor, torch.float64)

    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert value_of(target) == pytest.approx(value_of(exact), rel=ROUNDING)


def test_steps_too_small_for_them_add_up():
    coarse, fine = torch.ones(2), torch.ones(3, dtype=torch.float64)
    finest = Finest([coarse, fine])

    for _ in range(1000):
        finest.tensors[0] += 1e-9
        finest.follow()

    assert finest.tensors[1] is fine
    assert {t.dtype for t in finest.tensors} == {torch.float64}
    torch.testing.assert_close(coarse, torch.full((2,), 1 + 1e-6), rtol=1e-7, atol=0.0)
    assert not torch.equal(coarse, torch.ones(2))


def test_a_fit_goes_on_with_their_exact_values(brief, tmp_path):
    """A resumed fit has the bits of one that was not cut off."""

    def cut(step):
        if step.step == 20:
            raise KeyboardInterrupt

    whole, fit = trained(tensor, torch.float32)
    half, cut_off = trained(tensor, torch.float32, checkpoint=tmp_path, callback=cut)
    rest, resumed = trained(tensor, torch.float32, checkpoint=tmp_path, resume=True)

    assert cut_off.meta["interrupted"] and value_of(half) != value_of(whole)
    assert value_of(rest) == value_of(whole)
    np.testing.assert_array_equal(resumed.history["bound"], fit.history["bound"])
    assert resumed.bounds == fit.bounds


def test_a_saved_fit_has_them_in_their_type(brief, tmp_path):
    target, fit = trained(tensor, torch.float32, steps=10)
    fit.save(tmp_path)

    fresh = from_pyro(tensor(), torch.tensor(Y))
    loaded = flowvi.load(tmp_path, fresh)

    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert value_of(fresh) == value_of(target) != 0.5
    np.testing.assert_array_equal(loaded.draw(20).log_p, fit.draw(20).log_p)
    assert flowvi.to_inference_data(loaded.draw(20)).posterior["th"].dtype == np.float64


def test_a_compiled_step_takes_the_values_that_are_trained():
    """Its graph has the bound and the gradient of the eager step, in one vector of doubles."""
    torch.set_default_dtype(torch.float32)
    target = from_pyro(network(), torch.tensor(Y))
    guide = make_guide("realnvp", 1).to(torch.float64)
    settings = Settings(flowvi.elbo(1), 1, 1e-3, 8, compile=False)
    made = DrawGradient(target, guide, settings, Clock(), lambda line: None)
    assert {t.dtype for t in made.trained} == {torch.float64}
    with torch.no_grad():
        made.trained[-1] += 0.25

    graph = trace(made.fast.module, (), made.trained[0].dtype)

    torch.manual_seed(0)
    value, gradient = made.fast.eager(8, [])
    torch.manual_seed(0)
    flat = nn.utils.parameters_to_vector(made.trained).detach()
    found = graph.module(flat, *graph.draw())
    torch.testing.assert_close(found[0], value, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found[1], gradient, rtol=1e-12, atol=1e-12)
    assert any(torch.equal(p.detach(), torch.tensor([0.75])) for p in target.parameters())


class Own(Guide):
    """A guide of the user's own, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 1
        self.loc, self.log_width = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def sample(self, shape, context=None):
        noise = torch.randn(*shape, 1, dtype=self.loc.dtype)
        z = self.loc + self.log_width.exp() * noise
        return Draw(z, self.log_prob(z))

    def log_prob(self, z, context=None):
        return dist.Normal(self.loc, self.log_width.exp()).log_prob(z).sum(-1)

    def start(self, loc, scale_tril):
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_width.copy_(scale_tril.diagonal().log())


def test_a_guide_of_one_s_own_becomes_double_and_the_one_given_stays(brief):
    torch.set_default_dtype(torch.float32)
    target, own = from_pyro(tensor(), torch.tensor(Y)), Own()

    fit = flowvi.fit(target, own, steps=20, lr=0.1, progress=False)

    assert fit.guide.loc.dtype == torch.float64 and own.loc.dtype == torch.float32
    assert own.loc.item() == 0.0 and value_of(target) != 0.5


def of_rows(x):
    width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, width))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shared(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(m, width))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def of_all_rows(model, default, x, fitted):
    torch.set_default_dtype(default)
    target = from_pyro(model, x, local="row")
    # Guides begin with the same random numbers.
    torch.set_default_dtype(torch.float64)
    return target, fitted(target)


def test_fits_of_rows_have_the_precision_of_the_data():
    """Single parameters beside data in double are trained as double ones are."""
    x = np.random.default_rng(0).normal(size=30)

    def fitted(target):
        return flowvi.fit(target, "meanfield", epochs=3, lr=5e-3, progress=False)

    target, fit = of_all_rows(of_rows, torch.float32, x, fitted)
    exact, _ = of_all_rows(of_rows, torch.float64, x, fitted)
    single, plain = of_all_rows(of_rows, torch.float32, torch.tensor(x).float(), fitted)

    assert [p.dtype for t in (target, exact, single) for p in t.parameters()] == [
        torch.float32,
        torch.float64,
        torch.float32,
    ]
    assert (fit.meta["precision"], plain.meta["precision"]) == ("float64", "float32")
    assert "float64" in str(fit).splitlines()[0]
    assert abs(value_of(target) - 1.0) > 0.001
    assert value_of(target) == pytest.approx(value_of(exact), rel=ROUNDING)
    assert value_of(single) != 1.0
    assert fit.draw(5).z.dtype == np.float64


def test_nested_fits_have_the_precision_of_the_data():
    x = np.random.default_rng(0).normal(size=10)

    def fitted(target):
        return flowvi.nested(target, inner="meanfield", steps=10, particles=2)

    target, fit = of_all_rows(shared, torch.float32, x, fitted)
    exact, _ = of_all_rows(shared, torch.float64, x, fitted)

    assert fit.meta["precision"] == "float64" and fit.draw(5).log_p.dtype == np.float64
    assert [p.dtype for p in target.parameters()] == [torch.float32]
    assert value_of(target) == pytest.approx(value_of(exact), rel=1e-3) != 1.0
