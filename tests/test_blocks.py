"""A guide of blocks has the density of their product, and starts at the nearest Gaussian."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from families import make_guide, perturbed
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

import flowvi
from flowvi.flows import Kronecker
from flowvi.guides import BlockGuide, Blocks, FullRank, MeanField
from flowvi.guides.blocks import Block
from flowvi.guides.registry import block_guide, mixture

CHAIN = [
    {"columns": [[1, 3]], "guide": "realnvp", "sizes": {"depth": 2}},
    {"columns": [[0, 1], [4, 5]], "guide": "fullrank", "given": [0]},
    {"columns": [[3, 4]], "guide": "meanfield", "given": [0, 1]},
]


def model():
    a = pyro.sample("a", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(a.sum(), 1.0))
    pyro.sample("c", dist.LogNormal(b, 1.0))
    pyro.sample("y", dist.Normal(a.mean() + b, 0.5), obs=torch.tensor(1.0))


@pytest.fixture(scope="module")
def target():
    return flowvi.from_pyro(model)


def gaussian(dim):
    a = torch.randn(dim, dim)
    return MultivariateNormal(torch.randn(dim), a @ a.mT + torch.eye(dim))


def test_independent_blocks_multiply():
    parts = [perturbed(make_guide(name, 2)) for name in ("realnvp", "fullrank")]
    guide = BlockGuide([Block(parts[0], (2, 0)), Block(parts[1], (1, 3))])
    z = torch.randn(5, 4)

    expected = parts[0].log_prob(z[:, [2, 0]]) + parts[1].log_prob(z[:, [1, 3]])

    assert_close(guide.log_prob(z), expected)


def test_dependent_blocks_see_the_others():
    """The density is that of the second block given the first, by its own context."""
    first, second = perturbed(FullRank(2)), perturbed(make_guide("realnvp", 2, 2))
    guide = BlockGuide([Block(first, (0, 3)), Block(second, (1, 2), (0,))])
    z = torch.randn(5, 4)

    expected = first.log_prob(z[:, [0, 3]]) + second.log_prob(z[:, [1, 2]], z[:, [0, 3]])

    assert_close(guide.log_prob(z), expected)


def test_scores_are_the_gradients_of_the_density():
    guide = perturbed(block_guide(5, blocks=CHAIN))
    guide.start(torch.ones(5), gaussian(5).scale_tril)

    z, log_q, _, score = guide.sample_with_score((7,))
    fixed = z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(guide.log_prob(fixed).sum(), fixed)

    assert_close(guide.log_prob(z), log_q)
    assert_close(score, expected)


def test_draws_and_scored_draws_are_the_same():
    guide = perturbed(block_guide(5, blocks=CHAIN))

    torch.manual_seed(3)
    plain = guide.sample((4,)).z
    torch.manual_seed(3)
    scored = guide.sample_with_score((4,)).z
    torch.manual_seed(3)
    guide.advance_rng((4,))
    after = torch.randn(2)
    torch.manual_seed(3)
    guide.sample((4,))

    assert torch.equal(plain, scored) and torch.equal(after, torch.randn(2))


def test_a_chain_of_gaussians_starts_exactly():
    """Blocks in any order of columns, each given all those before it, are any Gaussian."""
    wanted = gaussian(5)
    kinds = [{**block, "guide": "fullrank", "sizes": {}} for block in CHAIN]
    guide = block_guide(5, blocks=kinds)

    guide.start(wanted.loc, wanted.scale_tril)

    z = wanted.sample((6,))
    assert_close(guide.log_prob(z), wanted.log_prob(z))


def test_independent_blocks_start_at_the_nearest_gaussian():
    """Nearest in KL(q || p): the divergence has no slope in a block's scales and means."""
    wanted = gaussian(3)
    guide = BlockGuide([Block(FullRank(2), (0, 2)), Block(MeanField(1), (1,))])
    guide.start(wanted.loc, wanted.scale_tril)

    def divergence(move):
        parts = [g.affine(torch.zeros(g.dim))[0] for g in guide.guides]
        scales = [jacobian(lambda x, g=g: g.affine(x)[0], torch.zeros(g.dim)) for g in guide.guides]
        order = [0, 2, 1]
        scale = torch.block_diag(*scales) @ (torch.eye(3) + move[:, :3].tril())
        back = torch.tensor(order).argsort()
        covariance = (scale @ scale.mT)[back][:, back]
        mean = (torch.cat(parts) + move[:, 3])[back]
        return kl_divergence(MultivariateNormal(mean, covariance), wanted)

    slope = jacobian(divergence, torch.zeros(3, 4))
    within = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]]).bool()

    assert_close(slope[within], torch.zeros(int(within.sum())), rtol=0, atol=1e-9)


def test_a_diagonal_start_makes_no_matrix():
    guide = block_guide(4000, blocks=[{"columns": [[0, 4000]], "guide": "meanfield"}])

    guide.start(torch.ones(4000), 2 * torch.ones(4000))

    z, log_q = guide.sample((3,))
    assert_close(log_q, torch.distributions.Normal(1.0, 2.0).log_prob(z).sum(-1))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_kronecker_normals_are_multivariate_normals(rows):
    layer = perturbed(Kronecker(6, rows=rows))
    layer.set_(torch.randn(6), torch.rand(6) + 0.5)
    perturbed(layer)
    left, right = layer._factors()
    covariance = torch.kron(left @ left.mT, right @ right.mT)
    covariance = layer.width[:, None] * covariance * layer.width
    mean = layer(torch.zeros(6))[0]
    x = torch.randn(5, 6)

    y, ladj = layer(x)

    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj
    assert_close(log_q, MultivariateNormal(mean, covariance).log_prob(y))


def test_rows_have_to_divide():
    with pytest.raises(ValueError, match="rows must divide D = 6; got 4"):
        Kronecker(6, rows=4)


def test_patterns_become_columns(target):
    guide = Blocks({"a": "kronecker", "[bc]": "realnvp"}, given={"[bc]": "a"}).build(target)

    assert guide.spec["blocks"] == [
        {"guide": "kronecker", "given": [], "sizes": {"rows": 2}, "columns": [[0, 6]]},
        {"guide": "realnvp", "given": [0], "sizes": {}, "columns": [[6, 7], [7, 8]]},
    ]


def test_blocks_are_fitted_saved_and_loaded(target, tmp_path):
    guide = Blocks({"a": "kronecker", "*": "realnvp"}, {"*": "a"}, {"*": {"depth": 2}})

    fit = flowvi.fit(target, guide, steps=30, progress=False)
    fit.save(tmp_path)
    loaded = flowvi.load(tmp_path, target)

    assert fit.meta["guide"] == "blocks"
    draws, same = fit.draw(200), loaded.draw(200)
    np.testing.assert_array_equal(draws.log_q, same.log_q)
    # All of it is normal but the scale of c, which is log-normal: a chain of Gaussians fits.
    assert flowvi.diagnose(draws).khat < 0.7


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (Blocks({"a": "meanfield"}), "Site 'b' of model fits no pattern"),
        (Blocks({"*": "meanfield", "a": "realnvp"}), "No site of model is left for pattern 'a'"),
        (Blocks({"*": "meanfield"}, given={"x": "*"}), "No block 'x'; the blocks are "),
        (
            Blocks({"a": "meanfield", "*": "meanfield"}, given={"a": "*"}),
            "can only be given blocks before it",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_named(target, blocks, message):
    with pytest.raises(ValueError, match=message):
        blocks.build(target)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"cover the columns 0 \.\.\. 1, each once"):
        BlockGuide([Block(MeanField(1), (0,)), Block(MeanField(1), (0,))])
    with pytest.raises(ValueError, match="A mixture cannot be a block"):
        BlockGuide([Block(mixture(2), (0, 1))])
    with pytest.raises(ValueError, match="can only be given blocks before it"):
        BlockGuide([Block(MeanField(1, 1), (0,), (1,)), Block(MeanField(1), (1,))])
