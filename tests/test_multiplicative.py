"""A multiplicative guide is scored together with its multipliers, and its bounds stay bounds."""

import copy
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from conftest import brief
from families import ALPHAS, correlated, perturbed
from torch import nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close

import flowvi
from flowvi.guides import BlockGuide, MixtureGuide, Multiplicative, make_guide, multiplicative
from flowvi.guides.blocks import Block
from flowvi.guides.registry import multiplicative_guide
from flowvi.objectives import Renyi, elbo

# Two matrices of (3, 2) and (2, 2), an input and an output the unit, and one number beside them.
MATRICES = [[0, 3, 2, 1], [7, 2, 2, 0]]
DIM, UNITS = 11, 4


def built(std=0.3):
    guide = multiplicative_guide(DIM, 0, MATRICES, sizes={"depth": 2})
    guide.start(torch.linspace(-2.0, 3.0, DIM), torch.linspace(0.2, 1.0, DIM))
    return perturbed(guide, std)


def two():
    """Over the two coordinates of one unit."""
    guide = multiplicative_guide(2, 0, [[0, 2, 1, 1]], sizes={"depth": 2})
    guide.start(torch.tensor([1.0, -1.0]), torch.tensor([0.6, 0.6]))
    return guide


def test_units_are_inputs_and_filters():
    assert built().units.tolist() == [0, 1, 0, 1, 0, 1, UNITS, 2, 2, 3, 3]


def test_draws_are_normals_scaled_by_the_multipliers():
    """Given t, z is normal; both together have the density that `sample_with_score` hands on."""
    guide = built()
    both, log_q, _, _ = guide.sample_with_score((5,))
    z, t = both.split([DIM, UNITS], -1)
    factors = torch.cat([1 + guide.spread * t, torch.ones(5, 1)], -1)[:, guide.units]
    mean = factors * (guide.origin + guide.width * guide.shift)

    given = dist.Normal(mean, guide.width * guide.log_scale.exp()).log_prob(z).sum(-1)

    assert_close(log_q, guide.outer.log_prob(t) + given)


def test_the_score_is_the_gradient_of_the_joint_density():
    guide = built()
    both, log_q, _, score = guide.sample_with_score((4,))

    def joint(both):
        z, t = both.split([DIM, UNITS], -1)
        mean, scale = guide._normal(t)
        return guide.outer.log_prob(t) + dist.Normal(mean, scale).log_prob(z).sum(-1)

    fixed = both.detach().requires_grad_()
    (expected,) = torch.autograd.grad(joint(fixed).sum(), fixed)

    assert_close(joint(both), log_q)
    assert_close(score, expected)


def test_draws_and_scored_draws_are_the_same():
    guide = built()

    def after(call):
        torch.manual_seed(3)
        return call(), torch.randn(2)

    (drawn, a), (scored, b), (_, c) = (
        after(lambda m=method: m((4,)))
        for method in (guide.sample, guide.sample_with_score, guide.advance_rng)
    )

    assert torch.equal(a, b) and torch.equal(a, c)
    z, t = scored.z.split([DIM, UNITS], -1)
    assert torch.equal(z, drawn.z)
    assert_close(drawn.log_q, scored.log_q - guide.log_auxiliary(t, z))


def test_weights_average_to_the_evidence():
    """Whatever r is: within four standard errors."""
    guide = perturbed(two(), 0.15)
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0]), 0.15 * torch.eye(2))

    with torch.no_grad():
        z, log_q = guide.sample((40_000,))
    ratio = (target.log_prob(z) - log_q).exp()

    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


def test_the_auxiliary_density_is_exact_at_the_start():
    """The log density of a draw is then that of z alone, whatever multipliers it came with."""
    guide, scale = two(), torch.tensor([0.6, 0.6])
    z, log_q = guide.sample((6,))
    left = guide.width * guide.log_scale.exp()
    along = guide.spread * guide.origin
    covariance = left.square().diag() + torch.outer(along, along)

    assert_close(covariance.diagonal().sqrt(), scale)
    exact = dist.MultivariateNormal(guide.origin, covariance).log_prob(z)
    assert_close(log_q, exact)
    assert_close(guide.log_prob(z), exact)


def test_the_density_of_z_alone_is_estimated():
    """That over the multiplier by quadrature, within four errors, known by quadrature too."""
    guide = perturbed(two(), 0.1)
    z, _ = guide.sample((5,))
    grid = torch.linspace(-12, 12, 4001)
    mean, scale = guide._normal(grid[:, None])
    given = dist.Normal(mean, scale).log_prob(z[:, None]).sum(-1)
    joint = guide.outer.log_prob(grid[:, None]) + given
    exact = torch.logsumexp(joint, -1) + math.log(24 / 4000)
    log_r = guide.log_auxiliary(grid[:, None].expand(5, -1, 1), z[:, None].expand(-1, 4001, 2))
    second = torch.logsumexp(2 * (joint - exact[:, None]) - log_r, -1) + math.log(24 / 4000)
    error = ((second.exp() - 1) / multiplicative.DRAWS).sqrt()

    assert ((guide.log_prob(z) - exact).exp() - 1).abs().lt(4 * error).all()
    assert error.max() < 0.5 and torch.equal(guide.log_prob(z), guide.log_prob(z))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_dreg_lands(alpha):
    """Where the joint densities agree every draw gives the guide's q a zero gradient."""
    guide = built()
    fixed = copy.deepcopy(guide)

    def joint(both):
        z, t = both.split([DIM, UNITS], -1)
        mean, scale = fixed._normal(t)
        return fixed.outer.log_prob(t) + dist.Normal(mean, scale).log_prob(z).sum(-1)

    guide.joint_density = lambda log_p: joint
    bound, _ = Renyi(alpha, particles=3)(lambda z: z.sum(-1), guide, repeats=(2,))
    learned = [guide.shift, guide.log_scale, *guide.outer.parameters()]

    zero = torch.autograd.grad(bound.sum(), learned)

    assert all(g.abs().max() < 1e-9 for g in zero)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_dreg_is_unbiased(alpha):
    """Both estimators agree within four standard errors, also for the parameters of r."""
    target, guide = correlated(), perturbed(two())

    def one(kind):
        bound, _ = Renyi(alpha, 3, kind)(target.log_prob, guide, repeats=(500,))
        found = torch.autograd.grad(bound.mean(), list(guide.parameters()))
        return torch.cat([g.flatten() for g in found])

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    error = difference.std(0) / len(difference) ** 0.5

    # Of many parameters, the largest of so many standard normals.
    most = math.sqrt(2 * math.log(error.numel())) + 3
    assert (difference.mean(0).abs() < most * error + 1e-12).all()
    of_r = torch.cat([torch.zeros(0), *(p.flatten() for p in guide.inner.parameters())])
    assert len(of_r) and one("dreg")[-len(of_r) :].abs().max() > 0


def regression(bias=False):
    """A line through points with two inputs that are nearly the same, and its evidence."""
    x, noise = torch.randn(15, 2), 0.5
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    y = x @ torch.tensor([1.0, -1.5]) + noise * torch.randn(15)
    marginal = x @ x.mT / 2 + noise**2 * torch.eye(15)
    evidence = dist.MultivariateNormal(torch.zeros(15), marginal).log_prob(y)
    net = nn.Linear(2, 1, bias=bias)
    model = flowvi.bayesian(net, likelihood=lambda f: dist.Normal(f, noise))
    return flowvi.from_pyro(model, x, y), float(evidence)


@pytest.fixture(scope="module")
def fitted():
    target, evidence = regression()
    with pytest.MonkeyPatch.context() as patch:
        brief(patch)
        fits = [
            flowvi.fit(target, guide, steps=300, lr=1e-2, progress=False)
            for guide in ("meanfield", Multiplicative(sizes={"depth": 2}))
        ]
    return target, evidence, *fits


def test_the_bound_is_below_the_evidence_and_above_mean_field(fitted):
    _, evidence, plain, fit = fitted
    found = flowvi.diagnose(fit.draw(4000))

    assert found.elbo < evidence + 4 * found.elbo_se
    assert found.elbo > plain.bounds[0] + 0.3 * (evidence - plain.bounds[0])
    assert abs(found.log_evidence - evidence) < 4 * found.log_evidence_se
    assert found.khat < 0.7


def test_draws_are_of_the_weights_alone(fitted):
    """Their z has the columns of the target, and their density is the target's."""
    target, _, _, fit = fitted
    draws = fit.draw(300)

    assert draws.z.shape == (1, 300, target.dim) and set(draws.values) == {"weight"}
    assert_close(torch.as_tensor(draws.log_p[0]), target.log_prob(torch.as_tensor(draws.z[0])))
    assert flowvi.predict(draws, torch.randn(3, 2)).mean("output").shape == (3,)


def test_the_law_of_the_weights_is_correlated(fitted):
    """As the posterior's is; the normals that it starts from are independent."""
    *_, plain, fit = fitted

    independent, learnt = (
        np.corrcoef(f.draw(2000)["weight"][0, :, 0].T)[0, 1] for f in (plain, fit)
    )

    assert abs(independent) < 0.1 and learnt < -0.5


def test_one_multiplier_for_several_weights_is_no_normal():
    """With a wide multiplier the squares of weights of one unit are correlated, and heavy."""
    guide = multiplicative_guide(2, 0, [[0, 2, 1, 1]], sizes={"depth": 2})
    guide.start(torch.ones(2), torch.full((2,), 0.1))
    with torch.no_grad():
        # A flow that widens t where t is large.
        perturbed(guide.outer, 1.0)
        guide.spread.fill_(1.0)
        z, _ = guide.sample((20_000,))
    w = (z - z.mean(0)) / z.std(0)

    assert np.corrcoef(z.mT.numpy())[0, 1] > 0.5
    assert (w.pow(3).mean(0).abs() > 5 * math.sqrt(6 / len(w))).all()


def test_fits_are_saved_and_loaded_by_name(fitted, tmp_path):
    target, *_, fit = fitted
    fit.save(tmp_path)

    loaded = flowvi.load(tmp_path, target)

    assert fit.meta["guide"] == "multiplicative"
    np.testing.assert_array_equal(fit.draw(50).log_q, loaded.draw(50).log_q)


def test_the_name_alone_builds_it_and_minibatches_train(brief):
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 1))
    target = flowvi.from_pyro(flowvi.bayesian(net, batch=5), torch.randn(10, 1, 3), torch.randn(10))

    fit = flowvi.fit(target, "multiplicative", steps=5, progress=False)

    # A unit for each filter of the convolution, and for each input of the last layer.
    assert fit.guide.many == 2 + 4
    assert math.isfinite(fit.bounds[0])


def test_a_compiled_step_would_be_the_same():
    """The step is one graph of plain operations, with the noise of the eager one."""
    from flowvi.training.compiling.graph import Bound, trace

    guide = built()
    bound = Bound([guide], lambda: elbo()(lambda z: -z.square().sum(-1), guide).bound)
    graph = trace(bound)
    flat = nn.utils.parameters_to_vector(list(bound.trained().values())).detach()

    torch.manual_seed(1)
    value, _ = graph.module(flat, *graph.draw())
    torch.manual_seed(1)

    assert_close(value, bound().detach())


def test_what_cannot_be_is_refused(brief):
    target, _ = regression()
    with pytest.raises(ValueError, match=r"No site of bayesian Linear with two axes .* weight \(1"):
        Multiplicative("head.*").build(target)
    with pytest.raises(ValueError, match="No flow named 'nvp'; choose from"):
        Multiplicative(flow="nvp").build(target)
    with pytest.raises(ValueError, match="takes no context; got context_dim=2"):
        make_guide("multiplicative", 3, 2)
    with pytest.raises(ValueError, match="A multiplicative guide cannot be a block"):
        BlockGuide([Block(two(), (0, 1))])
    with pytest.raises(ValueError, match="cannot be part of a mixture"):
        MixtureGuide([two(), two()])
    with pytest.raises(ValueError, match="z has 3 columns but the guide has D = 2"):
        two().log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="a guide that pushes noise through a map"):
        flowvi.neutra(flowvi.fit(target, "multiplicative", steps=1, progress=False))


def test_the_marginals_at_the_start_are_those_of_the_gaussian():
    guide = multiplicative_guide(3)
    loc, scale = torch.tensor([0.0, 5.0, -1.0]), torch.tensor([1.0, 0.1, 2.0])

    guide.start(loc, scale)

    mean, left = guide._normal(torch.zeros(3))
    slope = jacobian(lambda t: guide._normal(t)[0], torch.zeros(3))
    assert_close(mean, loc)
    assert_close((left.square() + slope.square().sum(-1)).sqrt(), scale)
