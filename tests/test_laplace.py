"""Laplace's formula for local latents, and the weights that correct it, against exact values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import flowvi
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure import MarginalTarget, derivatives, laplace, structure
from flowvi.targets.structure.correction import Correction
from flowvi.targets.structure.factors import Banded, Dense, Factor, Small
from flowvi.targets.structure.noise import WIDTH, normal_noise, wide_log_density, wide_noise
from flowvi.targets.structure.shape import Shape

GROUPS, EACH = 10, 4
group = torch.arange(GROUPS).repeat_interleave(EACH)


def marginal_of(model: Callable[..., Any], *args: Any) -> MarginalTarget:
    target = flowvi.from_pyro(model, *args)
    assert isinstance(target, GlobalTarget)
    found = structure(target)
    assert found, str(found)
    return MarginalTarget(target, found)


def intercepts(kind: str, level: float = 0.0) -> Callable[[], None]:
    """Intercepts of groups, with data of a likelihood; `level` moves the data far away."""
    torch.manual_seed(3)
    eta = 0.3 + 0.8 * torch.randn(GROUPS)[group]
    noise = torch.randn(len(group))
    y = {
        "normal": eta + noise,
        "poisson": torch.poisson(eta.exp()),
        "bernoulli": torch.bernoulli(torch.sigmoid(eta)),
        "student": eta + noise.sign() * noise.abs() ** 3,
    }[kind] + level

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", GROUPS):
            u = pyro.sample("u", dist.Normal(mu, tau))
        likelihoods = {
            "normal": lambda: dist.Normal(u[group], 1.0),
            "poisson": lambda: dist.Poisson(u[group].exp()),
            "bernoulli": lambda: dist.Bernoulli(logits=u[group]),
            "student": lambda: dist.StudentT(3.0, u[group], 0.3),
        }
        with pyro.plate("row", len(group)):
            pyro.sample("y", likelihoods[kind](), obs=y)

    return model


def slopes() -> None:
    factor = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    s = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("group", GROUPS):
        b = pyro.sample(
            "b", dist.MultivariateNormal(torch.zeros(2), scale_tril=s[:, None] * factor)
        )
    eta = b[group, 0] + b[group, 1] * torch.linspace(-1, 1, len(group))
    y = (torch.arange(len(group)) % 3 == 0).to(eta)
    pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)


def walk() -> None:
    s = pyro.sample("s", dist.HalfNormal(1.0))
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    h = pyro.sample("h", dist.Normal(torch.zeros(24), 3.0).to_event(1))
    pyro.factor("walk", dist.Normal(phi * h[:-1], s).log_prob(h[1:]).sum())
    y = torch.linspace(-2, 2, 24)
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def process() -> None:
    a, n = pyro.sample("a", dist.HalfNormal(1.0)), 12
    x = torch.linspace(0, 5, n)
    k = a**2 * torch.exp(-0.5 * (x[:, None] - x) ** 2) + 1e-2 * torch.eye(n)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(n), k))
    pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=torch.arange(n) % 4.0)


MODELS: dict[str, Callable[[], None]] = {
    "normal": intercepts("normal"),
    "poisson": intercepts("poisson"),
    "bernoulli": intercepts("bernoulli"),
    "slopes": slopes,
    "chain": walk,
    "field": process,
}


def theta_of(target: MarginalTarget, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.3 * torch.randn(n, target.dim, generator=generator, dtype=target.dtype)


# Factors


def positive(dim: int, count: int = 6) -> Tensor:
    root = torch.randn(2, count, dim, dim + 2, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)


def assert_agrees(factor: Factor, dense: Tensor, atol: float = 1e-9) -> None:
    """A factor against linear algebra of dense matrices, (S, G, d, d)."""
    dim = dense.shape[-1]
    x = torch.randn(*dense.shape[:-1], dtype=torch.float64)
    inverse = torch.linalg.inv(dense)
    assert factor.ok.all()
    torch.testing.assert_close(factor.log_det, torch.logdet(dense), rtol=1e-9, atol=atol)
    expected = (inverse @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(factor.solve(x), expected, rtol=1e-8, atol=atol)
    noise = torch.eye(dim, dtype=torch.float64).view(dim, 1, 1, dim)
    root = factor.spread(noise.expand(dim, *dense.shape[:-1])).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, inverse, rtol=1e-8, atol=atol)
    many = torch.randn(4, *dense.shape[:-1], dtype=torch.float64)
    torch.testing.assert_close(factor.whiten(factor.spread(many)), many, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("kind", [Small, Dense])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
def test_blocks_agree_with_linear_algebra(kind: type[Small] | type[Dense], dim: int) -> None:
    dense = positive(dim)
    factor = kind(dense)
    assert_agrees(factor, dense)
    inverse = factor.inverse().permute(0, 2, 3, 1)
    torch.testing.assert_close(inverse, torch.linalg.inv(dense), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [Small, Dense])
@pytest.mark.parametrize("dim", [1, 3])
def test_blocks_that_are_not_positive_definite_are_marked(
    kind: type[Small] | type[Dense], dim: int
) -> None:
    dense = positive(dim)
    dense[1, 2] -= 100 * torch.eye(dim, dtype=torch.float64)
    dense[0, 4] = 0.0
    factor = kind(dense)
    wrong = (~factor.ok).nonzero().tolist()
    assert wrong == [[0, 4], [1, 2]]
    assert factor.log_det.isfinite().all()


def banded(order: int, n: int = 9) -> tuple[Tensor, Tensor]:
    """Bands in LAPACK's form, and the matrices, (S, 1, n, n)."""
    bands = 0.4 * torch.randn(2, order + 1, n, dtype=torch.float64)
    bands[:, 0] = 2 * order + torch.rand(2, n, dtype=torch.float64)
    dense = torch.diag_embed(bands[:, 0])
    for k in range(1, order + 1):
        bands[:, k, n - k :] = 0.0
        below = torch.diag_embed(bands[:, k, : n - k], -k)
        dense = dense + below + below.mT
    return bands, dense.unsqueeze(1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bands_agree_with_linear_algebra(order: int) -> None:
    bands, dense = banded(order)
    colours = 2 * order + 1
    factor = Banded(bands, colours)
    assert_agrees(factor, dense)
    found, inverse = factor.inverse(), torch.linalg.inv(dense)[:, 0]
    for t in range(9):
        for s in range(max(0, t - order), min(9, t + order + 1)):
            torch.testing.assert_close(found[:, t % colours, 0, s], inverse[:, t, s])


def test_bands_that_are_not_positive_definite_are_marked() -> None:
    bands, _ = banded(2)
    bands[1, 0, 4] = -1.0
    assert Banded(bands, 5).ok.tolist() == [[True], [False]]


# Newton's method and Laplace's formula


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_agrees_with_dense_matrices(default: torch.dtype, name: str) -> None:
    target = marginal_of(MODELS[name])
    theta = theta_of(target)
    target.laplace.centre(theta[0])
    found = target.laplace.at(theta)
    values = target.evaluate(theta)
    local = target.laplace.columns.flatten()
    for s in range(len(theta)):

        def joint(u: Tensor, s: int = s) -> Tensor:
            z = found.z[s].index_put((local,), u)
            (value,) = target.whole.density.batched(z.unsqueeze(0), *target.whole._behind)
            return value

        u = found.z[s, local]
        hessian = -torch.autograd.functional.hessian(joint, u)
        gradient = torch.autograd.functional.jacobian(joint, u)
        # The mode is one: what Newton's method would still gain is rounding.
        assert float(gradient @ torch.linalg.solve(hessian, gradient)) < 1e-6
        expected = joint(u) + 0.5 * (len(u) * math.log(2 * math.pi) - torch.logdet(hessian))
        torch.testing.assert_close(values[s], expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_agrees_with_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Differences need modes to rounding.
    monkeypatch.setattr(laplace, "CONVERGED", 1e-14)
    target = marginal_of(MODELS[name])
    theta = theta_of(target)
    target.laplace.centre(theta[0])
    _, gradient = target.value_and_gradient(theta)
    step = 1e-4 * torch.eye(target.dim, dtype=target.dtype)
    around = [(target.evaluate(theta + d) - target.evaluate(theta - d)) / 2e-4 for d in step]
    scale = gradient.abs().max().item()
    torch.testing.assert_close(
        gradient, torch.stack(around, -1), rtol=1e-5, atol=1e-6 * (1 + scale)
    )


def test_the_formula_is_exact_for_normal_conditionals(default: torch.dtype) -> None:
    target = marginal_of(intercepts("normal"))
    theta = theta_of(target)
    y = target.whole.observed["y"]
    target.laplace.centre(theta[0])
    found = target.laplace.at(theta)
    mu, tau = theta[:, :1], theta[:, 1:].exp()
    precision = EACH + tau**-2
    data = torch.as_tensor(y).to(theta).view(GROUPS, EACH).sum(-1)
    torch.testing.assert_close(
        found.mode[..., 0], (data + mu / tau**2) / precision, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.factor.log_det, precision.log().expand(-1, GROUPS))


@pytest.mark.parametrize(
    ("kind", "level", "start"),
    [
        ("normal", 1e4, 0.0),
        ("poisson", 0.0, -30.0),
        ("poisson", 0.0, 30.0),
        ("bernoulli", 0.0, 40.0),
        ("student", 0.0, 15.0),
        ("student", 50.0, 0.0),
    ],
)
def test_newton_reaches_a_mode_from_far_away(
    default: torch.dtype, kind: str, level: float, start: float
) -> None:
    target = marginal_of(intercepts(kind, level))
    target.laplace.mode += start
    theta = target.laplace.reference.expand(2, -1) + torch.tensor([[0.0], [0.5]])
    found = target.laplace.at(theta.to(target.dtype))
    assert found.definite.all()
    assert float(found.left.max()) < 1e-6, found.left


def test_modes_do_not_depend_on_the_other_values(default: torch.dtype) -> None:
    target = marginal_of(intercepts("poisson"))
    theta = theta_of(target, 8)
    target.laplace.centre(theta[0])
    together = target.evaluate(theta)
    alone = torch.cat([target.evaluate(one) for one in theta.split(1)])
    # A mode is found to a small share of a nat.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# The cubic map and the noise


def bent() -> Shape:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(4, 6, 2, generator=generator, dtype=torch.float64)
    coefficients = Shape.from_moments(
        0.2 * noise[0], 1 + 0.2 * noise[1].tanh(), 1.5 * noise[2], noise[3].abs() * 3
    )
    coefficients[:, 0] = Shape.identity(coefficients[0])[:, 0]
    return Shape(coefficients)


def test_the_cubic_map_is_monotone_and_its_inverse_is_exact() -> None:
    shape = bent()
    noise = torch.linspace(-12, 12, 2001, dtype=torch.float64).view(-1, 1, 1).expand(-1, 6, 2)
    x, log_density = shape.forward(noise)
    assert (x.diff(dim=0) > 0).all()
    back, same = shape.inverse(x)
    torch.testing.assert_close(back, noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(same, log_density, rtol=1e-7, atol=1e-7)


def test_the_density_of_the_cubic_map_has_mass_one() -> None:
    coefficients = bent().coefficients[..., :1]
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    _, log_density = Shape(coefficients).inverse(x.view(-1, 1, 1).expand(-1, 6, 1))
    mass = torch.trapezoid(log_density.exp(), x, dim=0)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-6, atol=0)


def test_the_moments_of_the_cubic_map_are_near_those_asked_for() -> None:
    asked = [torch.full((1, 1), v, dtype=torch.float64) for v in (0.1, 0.9, 0.4, 0.6)]
    noise = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    x, _ = Shape(Shape.from_moments(*asked)).forward(noise.view(-1, 1, 1))
    x = x.flatten().numpy()
    found = [x.mean(), x.std(), stats.skew(x), stats.kurtosis(x)]
    np.testing.assert_allclose(found[:2], [0.1, 0.9], atol=2e-3)
    # The map has the third and fourth moments to first order.
    np.testing.assert_allclose(found[2:], [0.4, 0.6], rtol=0.8)


@pytest.mark.parametrize(("particles", "dim"), [(1, 1), (4, 1), (4, 2), (16, 3), (5, 9)])
def test_noise_is_normal_even_and_independent_between_units(particles: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(4)
    like = torch.zeros((), dtype=torch.float64)
    count = 3000
    noise = normal_noise(particles, (count, 2, dim), generator, like)
    assert noise.shape == (particles, count, 2, dim)
    tests = [
        stats.kstest(noise[k, :, 0, j].numpy(), "norm").pvalue
        for k in range(particles)
        for j in range(dim)
    ]
    assert min(tests) * len(tests) > 1e-3
    # E exp(x) for a normal x, and that of a product over units.
    for power in (noise[..., 0].exp(), (noise[:, :, 0] * noise[:, :, 1]).sum(-1)):
        mean = power.mean(0)
        exact = math.exp(0.5) if power is not None and mean.dim() == 2 else 0.0
        error = (mean.mean(0) - exact) / (mean.std(0) / math.sqrt(count))
        assert (error.abs() < 4).all(), error
    first, second = noise.exp().mean(0)[..., 0].unbind(1)
    correlation = np.corrcoef(first.numpy(), second.numpy())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(count)


@pytest.mark.parametrize(("particles", "dim"), [(8, 1), (34, 2), (89, 3)])
def test_wide_noise_is_students_t_with_its_density(particles: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(5)
    like = torch.zeros((), dtype=torch.float64)
    noise, log_density = wide_noise(particles, (2000, 2, dim), generator, like)
    t = stats.t(2, scale=WIDTH[dim - 1] / math.sqrt(2))
    exact = t.logpdf(noise.numpy()).sum(-1)
    np.testing.assert_allclose(log_density.numpy(), exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(wide_log_density(noise).numpy(), exact, rtol=1e-6, atol=1e-6)
    tests = [
        stats.kstest(noise[k, :, g, j].numpy(), t.cdf).pvalue
        for k in range(0, particles, 7)
        for g in range(2)
        for j in range(dim)
    ]
    assert min(tests) * len(tests) > 1e-3


@pytest.mark.parametrize(("particles", "dim"), [(8, 1), (12, 1), (34, 2), (89, 3)])
def test_lattices_of_wide_noise_integrate_skewed_conditionals(particles: int, dim: int) -> None:
    # Each latent is the log of a gamma variable with shape 5, standardised at its mode.
    generator = torch.Generator().manual_seed(6)
    like = torch.zeros((), dtype=torch.float64)
    noise, log_q = wide_noise(particles, (4000, 1, dim), generator, like)
    eta = noise / math.sqrt(5)
    log_p = (5 * eta - 5 * eta.exp() - math.lgamma(5) + 5 * math.log(5) - 0.5 * math.log(5)).sum(-1)
    mean = (log_p - log_q).exp().mean(0)
    error = mean.std()
    assert abs(mean.mean() - 1) < 4 * error / math.sqrt(len(mean))
    independent = (log_p - log_q).exp().std() / math.sqrt(particles)
    assert error < (0.02 if dim < 3 else 0.1) * independent


# The correction


def exact_log_p(target: MarginalTarget, theta: Tensor) -> Tensor:
    """The log density of theta by quadrature over the latent of each unit, (S)."""
    found = target.laplace.at(theta)
    nodes = torch.linspace(-14, 14, 1401, dtype=torch.float64).to(theta)
    width = (-0.5 * found.factor.log_det).exp().unsqueeze(-1)
    grid = found.mode + nodes.view(-1, 1, 1, 1) * width
    points = target.laplace.points(theta.expand(len(nodes), -1, -1), grid)
    parts = target.laplace.derivatives.by_unit(points)
    step = math.log(float(nodes[1] - nodes[0]))
    units = torch.logsumexp(parts[..., :-1], 0) + step + width[..., 0].log()
    return parts[0, :, -1] + units.sum(-1)


@pytest.mark.parametrize("kind", ["poisson", "bernoulli"])
@pytest.mark.parametrize("particles", [1, 4])
def test_the_correction_is_unbiased(default: torch.dtype, kind: str, particles: int) -> None:
    target = marginal_of(intercepts(kind))
    theta = theta_of(target, 2)
    target.laplace.centre(theta[0])
    exact = exact_log_p(target, theta)
    skew = torch.full((GROUPS, 1), 0.3, dtype=target.dtype)
    one = torch.ones_like(skew)
    shape = Shape(Shape.from_moments(0.1 * skew, one, -skew, skew))
    generator = torch.Generator().manual_seed(7)
    repeats = 1500
    many = theta.repeat_interleave(repeats, 0)
    found = torch.cat(
        [
            Correction(target.laplace, shape)(some, particles, generator).log_p
            for some in many.split(200)
        ]
    )
    ratio = (found.view(2, repeats) - exact.unsqueeze(1)).exp()
    error = (ratio.mean(1) - 1) / (ratio.std(1) / math.sqrt(repeats))
    assert (error.abs() < 4).all(), error


def test_picked_latents_have_the_conditional_of_the_posterior(default: torch.dtype) -> None:
    target = marginal_of(intercepts("poisson"))
    theta = theta_of(target, 1)
    target.laplace.centre(theta[0])
    generator = torch.Generator().manual_seed(9)
    many = theta.expand(2000, -1)
    plain = Shape(Shape.identity(target.laplace.mode))
    found = Correction(target.laplace, plain)(many, 4, generator)
    # (theta, u) with the weight of theta is properly weighted, unit by unit.
    weight = (found.by_unit - torch.logsumexp(found.by_unit, 0)).exp()
    u = found.z[:, target.laplace.columns[:, 0]]
    mean = (weight * u).sum(0)
    at = target.laplace.at(theta)
    width = (-0.5 * at.factor.log_det).exp().unsqueeze(-1)
    nodes = torch.linspace(-14, 14, 1401, dtype=torch.float64).to(theta)
    grid = at.mode + nodes.view(-1, 1, 1, 1) * width
    parts = target.laplace.derivatives.by_unit(
        target.laplace.points(theta.expand(len(nodes), -1, -1), grid)
    )[:, 0, :-1]
    density = torch.softmax(parts, 0)
    exact = (density * grid[:, 0, :, 0]).sum(0)
    error = (mean - exact) / (weight.square() * (u - exact) ** 2).sum(0).sqrt()
    assert (error.abs() < 4).all(), error
    second = (weight * u.square()).sum(0)
    exact_second = (density * grid[:, 0, :, 0].square()).sum(0)
    error = (second - exact_second) / (weight * (u.square() - exact_second)).square().sum(0).sqrt()
    assert (error.abs() < 4).all(), error


@pytest.mark.parametrize("name", MODELS)
def test_estimates_and_densities_of_draws_are_one(name: str) -> None:
    target = marginal_of(MODELS[name])
    theta = theta_of(target)
    target.laplace.centre(theta[0])
    correction = target.correction
    z, log_q = correction.draw(theta, torch.Generator().manual_seed(1))
    again = correction.log_density(z)
    torch.testing.assert_close(again, log_q, rtol=1e-9, atol=1e-7)
    found = correction(theta, 3, torch.Generator().manual_seed(1))
    density = target.whole.log_prob(found.z)
    torch.testing.assert_close(found.log_joint, density, rtol=1e-10, atol=1e-8)


def test_the_programs_of_the_latest_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "PROGRAMS_KEPT", 2)
    target = flowvi.from_density(
        lambda v: -0.5 * ((v["u"] - v["m"]).square().sum() + v["m"].square()),
        {"m": flowvi.Site(), "u": flowvi.Site((4,))},
    )
    found = derivatives.Derivatives(target, structure(target))
    for points in (1, 100, 200):
        found.by_unit(torch.zeros(points, target.dim, dtype=target.dtype))
    assert len(found._programs) == 2
    assert ("units", 1) not in found._programs


def test_few_programs_serve_all_numbers_of_points() -> None:
    target = flowvi.from_density(
        lambda v: -0.5 * ((v["u"] - v["m"]).square().sum() + v["m"].square()),
        {"m": flowvi.Site(), "u": flowvi.Site((4,))},
    )
    found = derivatives.Derivatives(target, structure(target))
    z = torch.randn(40, target.dim, dtype=target.dtype)
    whole = found.curvature(z)
    for count in (1, 3, 17, 39):
        for one, all_ in zip(found.curvature(z[:count]), whole, strict=True):
            torch.testing.assert_close(one, all_[:count])
    assert len(found._programs) <= 2


def test_a_saddle_is_left() -> None:
    target = flowvi.from_density(
        lambda v: -0.5 * ((v["u"].square() - 4).square().sum() + v["m"].square()),
        {"m": flowvi.Site(), "u": flowvi.Site((4,))},
    )
    found = MarginalTarget(target, structure(target)).laplace
    # Newton's method starts at zero, where the gradient is zero.
    assert not found.mode.any()
    at = found.at(torch.zeros(2, 1, dtype=target.dtype))
    assert at.definite.all()
    # What is left to gain is 1e-9 nats, where a standard deviation is a quarter.
    torch.testing.assert_close(at.mode.abs(), torch.full_like(at.mode, 2.0), rtol=0, atol=1e-4)
