"""A guide that can be mean field does not end below it."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, constraints

import flowvi
from flowvi.guides.registry import guide_names
from flowvi.training.schedule import Schedule

# Draws that compare two guides, and standard errors that are allowed between them.
DRAWS, ERRORS = 4000, 4.0
PLACE, CORRELATION = 12.0, 0.9995
SPLIT = flowvi.Blocks({"a": "realnvp", "b": "meanfield"}, sizes={"a": {"depth": 2}})


def bound(fit):
    """ELBO on fresh draws, and its standard error."""
    log_w = torch.as_tensor(fit.draw(DRAWS, seed=9).log_weights).flatten()
    return float(log_w.mean()), float(log_w.std() / DRAWS**0.5)


def assert_not_below(found, plain):
    (level, error), (least, other) = bound(found), bound(plain)
    assert level > least - ERRORS * (error**2 + other**2) ** 0.5


@pytest.fixture(scope="module")
def two_modes():
    """Two thirds of the mass on two latents that are all but equal, the others elsewhere."""
    joint = CORRELATION * torch.ones(2, 2) + (1 - CORRELATION) * torch.eye(2)
    equal = MultivariateNormal(torch.zeros(2), joint)
    alone = MultivariateNormal(torch.full((2,), PLACE), torch.eye(2))

    def log_density(v):
        z = torch.stack([v["a"], v["b"]], -1)
        parts = [equal.log_prob(z) + torch.tensor(2 / 3).log()]
        parts.append(alone.log_prob(z) + torch.tensor(1 / 3).log())
        return torch.logsumexp(torch.stack(parts), 0)

    sites = {name: flowvi.Site(support=constraints.real) for name in "ab"}
    return flowvi.from_density(log_density, sites)


@pytest.fixture(scope="module")
def two_modes_plain(two_modes):
    return flowvi.fit(two_modes, "meanfield", steps=5, progress=False)


def test_blocks_start_where_mean_field_does(two_modes, two_modes_plain):
    """At the mode of equal latents blocks that are independent would lose three nats."""
    found = flowvi.fit(two_modes, SPLIT, steps=5, progress=False)

    assert_not_below(found, two_modes_plain)
    assert any("guide at mean field" in line for line in found.log)


def test_blocks_that_hold_the_correlations_start_with_them():
    """Blocks of full rank each given those before it are no poorer than one of full rank."""
    chained = flowvi.guides.make_guide("blocks", 4)
    halves = flowvi.guides.registry.block_guide(
        4, blocks=[{"columns": [[i, i + 2]], "guide": "fullrank"} for i in (0, 2)]
    )

    assert not chained.partial
    assert halves.partial


@pytest.mark.parametrize("start", [None, "fit"])
def test_blocks_keep_what_holds_within_a_block(start):
    """Where correlations lie within the blocks, the Gaussian of full rank is the better start."""
    joint = MultivariateNormal(
        torch.zeros(4), torch.block_diag(*2 * [torch.full((2, 2), 0.9) + 0.1 * torch.eye(2)])
    )
    sites = {name: flowvi.Site((2,), support=constraints.real_vector) for name in "ab"}
    target = flowvi.from_density(lambda v: joint.log_prob(torch.cat([v["a"], v["b"]], -1)), sites)
    earlier = flowvi.fit(target, "meanfield", steps=1, progress=False) if start else None

    found = flowvi.fit(
        target, flowvi.Blocks({"*": "fullrank"}), steps=1, start=earlier, progress=False
    )
    both = flowvi.Blocks({"a": "fullrank", "b": "fullrank"})
    split = flowvi.fit(target, both, steps=1, start=earlier, progress=False)

    assert abs(bound(found)[0]) < 0.05
    assert abs(bound(split)[0]) < 0.05


@pytest.fixture(scope="module")
def network():
    """A classifier of nine weights, of eight rows, and mean field fitted to it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.randn(8, 2)
    y = (x[:, 0] * x[:, 1] > 0).to(x)
    target = flowvi.from_pyro(flowvi.bayesian(net, likelihood="bernoulli"), x, y)
    return target, flowvi.fit(target, "meanfield", seed=1, escalate=False, progress=False)


RECIPES = {
    "blocks of the layers": flowvi.Blocks({"2.*": "realnvp", "*": "meanfield"}),
    "blocks that follow the last": flowvi.Blocks(
        {"2.*": "realnvp", "*": "meanfield"}, {"*": "2.*"}, {"2.*": {"depth": 2}}
    ),
    "multipliers of the inputs": flowvi.Multiplicative(),
}


# One of each kind, for every run of the tests; the others, but flows of images, by hand.
FEW = ["fullrank", "kronecker", "lowrank", "multiplicative", "realnvp", *RECIPES]
MANY = sorted(n for n in guide_names() if n not in FEW and not n.startswith("image"))


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MANY)])
def test_no_guide_ends_below_mean_field(network, name):
    """Every guide has mean field in it; begun at it, few steps suffice."""
    target, plain = network
    brief = Schedule(evaluation_draws=1000, check_draws=1000)

    found = flowvi.fit(
        target,
        RECIPES.get(name, name),
        steps=10,
        seed=2,
        start=plain,
        schedule=brief,
        compile=False,
        progress=False,
    )

    assert_not_below(found, plain)
