"""The structure that is found is there, and no structure is found that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from random_models import random_model
from torch import Tensor

import flowvi
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.structure import structure
from flowvi.targets.structure.terms import Terms

UNITS, ROWS = 12, 36
group = torch.arange(UNITS).repeat_interleave(ROWS // UNITS)
Tie = Callable[[Tensor, int, int], Tensor]


def captured(model: Callable[..., Any], *args: Any) -> GlobalTarget:
    """The target of a model of shared latents."""
    target = flowvi.from_pyro(model, *args)
    assert isinstance(target, GlobalTarget)
    return target


def terms_of(target: GlobalTarget) -> tuple[Tensor, Tensor]:
    """Sums of the terms, and the density, at random points."""
    generator = torch.Generator().manual_seed(1)
    z = 0.5 * torch.randn(5, target.dim, generator=generator, dtype=target.dtype)
    z = torch.cat([target.starts(generator), z])
    density = target.density.batched(z, *target._behind)
    terms = Terms(target.density.batched, (z[0], *target._behind))
    return terms(z, *target._behind).sum(-1), density


def assert_adds_up(target: GlobalTarget) -> None:
    total, density = terms_of(target)
    # Constants that the model computes in single precision are added in another order.
    eps = torch.finfo(torch.get_default_dtype()).eps
    torch.testing.assert_close(total, density.to(total), rtol=max(1e-10, 10 * eps), atol=1e-8)


def centred(tie: Tie | None = None, seed: int = 0) -> Callable[..., None]:
    """A normal hierarchy, whose units may be tied."""
    torch.manual_seed(seed)
    y, (i, j) = 1 + torch.randn(ROWS), torch.randperm(UNITS)[:2].tolist()

    def model() -> None:
        mu, tau = (
            pyro.sample("mu", dist.Normal(0.0, 1.0)),
            pyro.sample("tau", dist.Exponential(1.0)),
        )
        with pyro.plate("group", UNITS):
            u = pyro.sample("u", dist.Normal(mu, tau))
        if tie is not None:
            pyro.factor("tie", tie(u, i, j))
        with pyro.plate("row", ROWS):
            pyro.sample("y", dist.Normal(u[group], 1.0), obs=y)

    return model


@pytest.mark.parametrize("seed", range(6))
def test_terms_of_random_models_add_up(default: torch.dtype, seed: int) -> None:
    _, model, args = random_model(seed)
    assert_adds_up(captured(model, *args))


def scaled_and_masked(x: Tensor, y: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(torch.zeros(ROWS), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.poutine.scale(scale=2.5), pyro.plate("row", ROWS), pyro.poutine.mask(mask=x > 0):
        pyro.sample("y", dist.Normal(u, s), obs=y)


def discrete(x: Tensor, y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", ROWS):
        k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(u[k.long()], 1.0), obs=y)


def products(x: Tensor, y: Tensor) -> None:
    s = pyro.sample("s", dist.HalfNormal(1.0))
    u = pyro.sample("u", dist.Normal(torch.zeros(ROWS), 1.0).to_event(1))
    pyro.factor("dot", u @ x / s - (u**2).sum() * (1 + s) / 2)
    pyro.factor("mean", -s * (u - y).square().mean() - (u * s).sum() / (1 + s**2))
    pyro.factor("number", torch.tensor(0.25) - 2.0 * s)


@pytest.mark.parametrize("model", [scaled_and_masked, discrete, products])
def test_terms_of_special_densities_add_up(
    default: torch.dtype, model: Callable[..., None]
) -> None:
    target = captured(model, torch.randn(ROWS), torch.randn(ROWS))
    assert_adds_up(target)
    if model is not discrete:
        found = structure(target)
        assert (found.kind, found.units) == ("units", ROWS), str(found)


def test_terms_of_a_plain_density_add_up(default: torch.dtype) -> None:
    def density(v: dict[str, Tensor]) -> Tensor:
        u, s = v["u"], v["s"]
        return -0.5 * s**2 - 0.5 * ((u - s) ** 2 / (1 + s**2)).sum(-1) + u.exp().mean() * s

    sites = {"s": flowvi.Site(), "u": flowvi.Site((UNITS,))}
    target = flowvi.from_density(density, sites)
    assert isinstance(target, GlobalTarget)
    assert_adds_up(target)
    assert structure(target).units == UNITS


def loop() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("group", UNITS):
        u = pyro.sample(f"u_{i}", dist.Normal(mu, 1.0))
        v = pyro.sample(f"v_{i}", dist.Gamma(2.0, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(u, v), obs=torch.tensor(0.1 * i))


def event() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    u = pyro.sample("u", dist.Normal(mu * torch.ones(UNITS), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(u[group], 1.0).to_event(1), obs=torch.ones(ROWS))


def nested() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("school", UNITS, dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("class", 3, dim=-2):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Poisson(b.exp()), obs=torch.ones(3, UNITS))


def crossed() -> None:
    with pyro.plate("person", 20, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("item", 5, dim=-1):
        hard = pyro.sample("hard", dist.Normal(0.0, 1.0))
    with pyro.plate("person2", 20, dim=-2), pyro.plate("item2", 5, dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=ability - hard), obs=torch.ones(20, 5))


def slopes() -> None:
    factor = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    s = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("group", UNITS):
        b = pyro.sample(
            "b", dist.MultivariateNormal(torch.zeros(2), scale_tril=s[:, None] * factor)
        )
    eta = b[group, 0] + b[group, 1] * torch.linspace(-1, 1, ROWS)
    pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=(torch.arange(ROWS) % 2.0))


def one_hot() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    u = pyro.sample("u", dist.Normal(mu * torch.ones(UNITS), 1.0).to_event(1))
    design = torch.nn.functional.one_hot(group).to(mu)
    pyro.sample("y", dist.Poisson((design @ u).exp()).to_event(1), obs=torch.ones(ROWS))


@pytest.mark.parametrize(
    ("model", "units", "size", "shared"),
    [
        (centred(), UNITS, 1, 2),
        (loop, UNITS, 2, 1),
        (event, UNITS, 1, 1),
        (nested, UNITS, 4, 1),
        (crossed, 20, 1, 5),
        (slopes, UNITS, 2, 3),
        (one_hot, UNITS, 1, 1),
    ],
    ids=["plate", "loop", "event", "nested", "crossed", "slopes", "one-hot"],
)
def test_independent_units_are_found(
    default: torch.dtype, model: Callable[..., None], units: int, size: int, shared: int
) -> None:
    target = captured(model)
    found = structure(target)
    assert (found.kind, found.units, found.size, len(found.shared)) == (
        "units",
        units,
        size,
        shared,
    ), str(found)
    used = torch.cat([found.columns.flatten(), found.shared]).sort().values
    assert torch.equal(used, torch.arange(target.dim))
    assert str(units) in str(found)


def test_rows_belong_to_the_unit_that_they_index(default: torch.dtype) -> None:
    target = captured(centred())
    found = structure(target)
    # A row and a prior for each unit, and terms of the shared latents alone.
    counts = found.element.bincount(minlength=UNITS + 1)
    assert (counts[:UNITS] == 1 + ROWS // UNITS).all()


def chain(order: int) -> Callable[[], None]:
    def model() -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        h = pyro.sample("h", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        ahead = h[order:] - sum(h[order - k : -k] for k in range(1, order + 1)) * 0.4
        pyro.factor("walk", dist.Normal(0.0, s).log_prob(ahead).sum())
        pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=torch.ones(40))

    return model


@pytest.mark.parametrize("order", [1, 2])
def test_a_chain_is_found_with_its_order(default: torch.dtype, order: int) -> None:
    found = structure(captured(chain(order)))
    assert (found.kind, found.order, found.size) == ("chain", order, 40), str(found)


def test_a_field_is_found(default: torch.dtype) -> None:
    def model() -> None:
        a, n = pyro.sample("a", dist.HalfNormal(1.0)), 20
        x = torch.linspace(0, 5, n)
        k = a**2 * torch.exp(-0.5 * (x[:, None] - x) ** 2) + 1e-3 * torch.eye(n)
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(n), k))
        pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=torch.ones(n))

    found = structure(captured(model))
    assert (found.kind, found.size, len(found.shared)) == ("field", 20, 1), str(found)


def test_a_named_dim_of_a_density_is_a_plate(default: torch.dtype) -> None:
    def density(v: dict[str, Tensor]) -> Tensor:
        return (
            -0.5 * v["mu"] ** 2 - 0.5 * (v["u"] - v["mu"]).square().sum(-1) - v["u"].exp().sum(-1)
        )

    sites = {"mu": flowvi.Site(), "u": flowvi.Site((UNITS,), dims=("unit",))}
    target = flowvi.from_density(density, sites)
    assert isinstance(target, GlobalTarget)
    found = structure(target)
    assert (found.kind, found.plate, found.units) == ("units", "unit", UNITS), str(found)


# Each depends on u_i and u_j together: weakly, everywhere, or only beyond a threshold.
TIES: dict[str, Tie] = {
    "soft sum": lambda u, i, j: -50 * u.sum() ** 2,
    "two units": lambda u, i, j: -0.1 * (u[i] - u[j]) ** 2,
    "tiny": lambda u, i, j: 1e-6 * u[i] * u[j],
    "a shared row": lambda u, i, j: -0.5 * (u[group] + 1e-6 * u[j]).square().sum(),
    "relu": lambda u, i, j: torch.relu(u[i]) * u[j],
    "relu above three": lambda u, i, j: torch.relu(u[i] - 3) * u[j],
    "relu below three": lambda u, i, j: torch.relu(-3 - u[i]) * u[j],
    "where": lambda u, i, j: torch.where(u[i] > 0, u[j], 0 * u[j]),
    "where above three": lambda u, i, j: torch.where(u[i] > 3, u[j], 0 * u[j]),
    "largest": lambda u, i, j: -u.max(),
    "norm": lambda u, i, j: -u.norm(),
    "log sum": lambda u, i, j: -torch.logsumexp(u, 0),
    "spread": lambda u, i, j: -u.std(),
    "product": lambda u, i, j: 0.01 * torch.prod(torch.tanh(u)),
    "normal": lambda u, i, j: dist.MultivariateNormal(
        torch.zeros(UNITS), torch.eye(UNITS) + 0.3
    ).log_prob(u),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tie", TIES)
def test_units_with_a_hidden_tie_are_not_independent(tie: str, seed: int) -> None:
    found = structure(captured(centred(TIES[tie], seed)), seed)
    assert found.kind in ("chain", "field"), str(found)
    if found.kind == "field":
        assert "depend on each other" in found.reason


@pytest.mark.parametrize("tie", ["two units", "relu above three", "largest"])
def test_a_chain_has_no_tie_across_its_order(tie: str) -> None:
    def model() -> None:
        h = pyro.sample("h", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        pyro.factor("walk", -0.5 * (h[1:] - 0.9 * h[:-1]).square().sum())
        pyro.factor("tie", TIES[tie](h[::3][:UNITS], 1, 9))

    found = structure(captured(model))
    assert found.kind == "field", str(found)


def test_a_plate_of_one_unit_has_no_structure(default: torch.dtype) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", 1):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=torch.ones(1))

    found = structure(captured(model))
    assert not found
    assert "no plate and no axis holds several latents" in str(found)


def walking(times: int, tie: Tie | None = None) -> Callable[..., None]:
    """A walk whose increments are standard normal, seen at each time."""
    y = torch.zeros(40)

    def model() -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("time", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = s * z
        for _ in range(times):
            x = x.cumsum(-1)
        with pyro.plate("seen", 40):
            pyro.sample("y", dist.StudentT(4.0, x, 1.0), obs=y)
        if tie is not None:
            pyro.factor("tie", tie(z[::3][:UNITS], 1, 9))

    return model


@pytest.mark.parametrize("times", [1, 2])
def test_sums_of_increments_are_a_chain(times: int, default: torch.dtype) -> None:
    found = structure(captured(walking(times)))
    assert (found.kind, found.sums, found.order, found.size) == ("chain", times, times, 40)
    assert "40 sums of z are a chain" in str(found)


@pytest.mark.parametrize("tie", ["two units", "relu above three", "relu below three"])
def test_sums_of_tied_increments_are_no_chain(tie: str) -> None:
    found = structure(captured(walking(1, TIES[tie])))
    assert found.kind == "field", str(found)


def test_a_level_with_noise_beside_is_a_chain() -> None:
    def model() -> None:
        with pyro.plate("time", 40):
            h = pyro.sample("h", dist.Normal(0.0, 9.0))
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((h + noise).exp()), obs=torch.ones(40))
        pyro.factor("walk", -0.5 * (h[1:] - h[:-1]).square().sum())

    found = structure(captured(model))
    assert (found.kind, found.size, found.order) == ("chain", 80, 2), str(found)


def test_a_field_with_noise_beside_is_one_field() -> None:
    first, second = torch.triu_indices(20, 20, 1)

    def model() -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("cell", 20):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((h + s * noise).exp()), obs=torch.ones(20))
        pyro.factor("field", -0.5 * (h[first] - h[second]).square().sum())

    found = structure(captured(model))
    assert (found.kind, found.size, len(found.shared)) == ("field", 40, 1), str(found)
