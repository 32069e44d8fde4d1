"""Every guide scores what it samples, and becomes the Gaussian it is told to start from."""

import copy

import pytest
import torch
from families import FLOWS, GUIDES, make_guide, perturbed
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, kl_divergence

from flowvi import guides
from flowvi.flows import Diagonal
from flowvi.guides import FlowGuide, FullRank, Guide, MeanField

CONTEXT = 3
NAMES = [*GUIDES, *FLOWS]
# What starts at the nearest diagonal Gaussian.
DIAGONAL = ("meanfield", "lowrank", "kronecker")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_sample_and_log_prob_agree(name, dim, dtype):
    guide = perturbed(make_guide(name, dim)).to(dtype)

    z, log_q = guide.sample((6, 4))

    assert z.shape == (6, 4, dim) and log_q.shape == (6, 4) and z.dtype == log_q.dtype == dtype
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(guide.log_prob(z), log_q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_conditional_guides_draw_for_every_row(name):
    guide = perturbed(make_guide(name, 2, CONTEXT))
    context = torch.randn(7, 5, CONTEXT)

    z, log_q = guide.sample((4,), context)

    assert z.shape == (4, 7, 5, 2) and log_q.shape == (4, 7, 5)
    torch.testing.assert_close(guide.log_prob(z, context), log_q)
    torch.testing.assert_close(guide.log_prob(z[:, 6, 1], context[6, 1]), log_q[:, 6, 1])


@pytest.mark.parametrize("name", NAMES)
def test_densities_integrate_to_one(name):
    """Importance sampling of the density from a wide proposal, within four standard errors."""
    guide = perturbed(make_guide(name, 2), std=0.2)
    proposal = MultivariateNormal(torch.zeros(2), 9 * torch.eye(2))
    z = proposal.sample((20_000,))

    with torch.no_grad():
        ratio = (guide.log_prob(z) - proposal.log_prob(z)).exp()

    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.fixture
def gaussian():
    loc = torch.tensor([100.0, -2.0, 0.5])
    a = torch.randn(3, 3) * torch.tensor([[1e-3], [1.0], [1e3]])
    return MultivariateNormal(loc, covariance_matrix=a @ a.T + torch.diag(a.diagonal() ** 2))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in DIAGONAL])
def test_start_is_exact_where_it_can_be(name, gaussian):
    guide = make_guide(name, 3)

    guide.start(gaussian.loc, gaussian.scale_tril)
    z = gaussian.sample((10,))

    torch.testing.assert_close(guide.log_prob(z), gaussian.log_prob(z))


def test_mean_field_starts_at_the_nearest_diagonal_gaussian():
    """Nearest in KL(q || p): no other scales give a smaller divergence."""
    target = MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.2], [1.2, 1.0]]))
    guide = MeanField(2)
    guide.start(target.loc, target.scale_tril)

    def divergence(factor):
        scale = jacobian(lambda x: guide.affine(x)[0], torch.zeros(2))
        guess = MultivariateNormal(guide.affine(torch.zeros(2))[0], scale_tril=scale * factor)
        return kl_divergence(guess, target)

    slope = jacobian(divergence, torch.ones(2, 1))

    torch.testing.assert_close(slope, torch.zeros(2, 1), rtol=0, atol=1e-12)


def test_start_undoes_earlier_training_of_the_affine_layer():
    guide = perturbed(FullRank(2))

    guide.start(torch.zeros(2), torch.eye(2))

    z, log_q = guide.sample((5,))
    torch.testing.assert_close(log_q, MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(z))


def test_full_rank_is_a_multivariate_normal():
    guide = perturbed(FullRank(3))
    scale_tril = jacobian(lambda x: guide.affine(x)[0], torch.zeros(3))
    expected = MultivariateNormal(guide.affine(torch.zeros(3))[0], scale_tril=scale_tril)
    z = torch.randn(10, 3)

    torch.testing.assert_close(guide.log_prob(z), expected.log_prob(z))


def test_a_flow_guide_takes_another_affine_layer():
    guide = FlowGuide(2, FLOWS["planar"](2), Diagonal(2))

    assert isinstance(guide.affine, Diagonal)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_saved_states_agree(name):
    guide = perturbed(make_guide(name, 2, CONTEXT))
    guide.start(torch.ones(2), 2 * torch.eye(2))
    z, context = torch.randn(4, 2), torch.randn(CONTEXT)

    loaded = make_guide(name, 2, CONTEXT)
    loaded.load_state_dict(guide.state_dict())
    expected = guide.log_prob(z, context)

    torch.testing.assert_close(loaded.log_prob(z, context), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(guide).log_prob(z, context), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_states_hold_every_tensor_once(name):
    """Formats without pickle refuse tensors that share memory."""
    state = make_guide(name, 3).state_dict()

    assert len({t.data_ptr() for t in state.values()}) == len(state)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_draws(name):
    guide = make_guide(name, 2)

    first, second = ((torch.manual_seed(3), guide.sample((4,)))[1].z for _ in range(2))

    assert torch.equal(first, second)


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match="z has 9 columns but the guide has D = 10"):
        MeanField(10).log_prob(torch.zeros(4, 9))


def test_unknown_guides_list_the_choices():
    with pytest.raises(ValueError, match=r"No guide named 'nvp'.*Choose from .*meanfield.*realnvp"):
        guides.make_guide("nvp", 2)


def test_the_contract_is_abstract():
    guide = Guide()
    for call in (lambda: guide.sample(()), lambda: guide.log_prob(torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize(
    "name, depth, least", [("realnvp", -1, 1), ("iaf", 1.5, 1), ("skewed", -1, 0)]
)
def test_a_depth_that_is_none_is_refused(name, depth, least):
    with pytest.raises(ValueError, match=f"depth must be a whole number of at least {least}"):
        guides.make_guide(name, 3, depth=depth)
