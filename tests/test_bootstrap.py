"""Training on annealed draws: the guide comes to cover the target, and lands where it is there."""

import copy
import math

import pytest
import torch
from test_anneal import LOC, gaussian, started, two_modes

from flowvi.draws.diagnose import diagnose
from flowvi.draws.sampling import draw
from flowvi.flows import Chain, realnvp
from flowvi.guides import FlowGuide, FullRank, Guide, MixtureGuide
from flowvi.samplers.ais import AnnealedDraws, annealed_importance_sampling
from flowvi.training.fab import Buffer, refine_fab

PLACES = [-2.0, -2.0]


def narrow_mixture():
    """Two components, one at a mode and one on the way to the other."""
    guide = MixtureGuide([FullRank(2), FullRank(2)])
    guide.start_components(
        [(torch.tensor(loc), s * torch.eye(2)) for loc, s in ((PLACES, 1.0), ([0.0, 0.0], 1.5))]
    )
    return guide


GUIDES = {
    "flow": lambda: started(FlowGuide(2, realnvp(2, depth=4, hidden=16)), [-1.0, -1.0], 2.0),
    "mixture": narrow_mixture,
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_comes_to_cover_both_modes(name):
    target, guide = two_modes(), GUIDES[name]()
    before = diagnose(draw(target, [guide], 2000, seed=1))

    refine_fab(target, guide, rounds=60, batch=128, lr=1e-2, temperatures=4)
    after = diagnose(draw(target, [guide], 2000, seed=1))

    assert after.ess > 3 * before.ess
    assert after.khat < 0.7
    assert abs(after.log_evidence) < 4 * after.log_evidence_se
    assert after.log_evidence_se < 0.1


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_gaussian_guide_becomes_the_gaussian_target(power):
    target, guide = gaussian(0.7), started(FullRank(3), [0.0, 0.0, 0.0], 1.0)

    refine_fab(target, guide, rounds=80, batch=128, lr=2e-2, power=power)
    log_w = annealed_importance_sampling(target, guide, 1000, power=1.0, temperatures=0).log_w

    assert abs(float(log_w.mean()) - 3.0) < 0.02
    assert log_w.std() < 0.2


def test_the_gradient_has_no_mean_where_the_guide_is_the_target():
    """Small steps around the target stay there: what they move by averages out."""
    target, guide = gaussian(), started(FullRank(3), LOC, 1.0)

    refine_fab(target, guide, rounds=50, batch=256, lr=1e-3)
    log_w = annealed_importance_sampling(target, guide, 1000, power=1.0, temperatures=0).log_w

    assert log_w.std() < 0.05


def vector(guide):
    return torch.nn.utils.parameters_to_vector(guide.parameters()).detach().clone()


def test_a_seed_gives_the_same_guide_and_leaves_the_generators_alone():
    target, guide = gaussian(), FullRank(3)
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        new = copy.deepcopy(guide)
        refine_fab(target, new, rounds=5, batch=20, seed=seed)
        found.append(vector(new))

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad for p in guide.parameters())


def test_it_stops_when_told_that_it_is_over():
    target, guide, asked, said = gaussian(), FullRank(3), [], []
    before = vector(guide)

    def over():
        asked.append(None)
        return len(asked) > 3

    refine_fab(target, guide, rounds=100, batch=20, say=said.append, over=over)

    assert len(asked) == 4
    assert said == ["bootstrap: 3 rounds of 20 annealed draws, 0 steps skipped"]
    assert not torch.equal(vector(guide), before)


def annealed(log_w, log_q=0.0):
    n = len(log_w)
    z = torch.arange(float(n))[:, None]
    return AnnealedDraws(z, torch.tensor(log_w), z[:, 0], torch.full((n,), log_q), torch.zeros(0))


def test_the_buffer_keeps_the_latest_draws_that_have_weight():
    buffer = Buffer(3)
    buffer.add(annealed([0.0, -math.inf, 0.0]))
    buffer.add(annealed([0.0, math.nan, 0.0, 0.0]))

    assert buffer.z[:, 0].tolist() == [0.0, 2.0, 3.0]


def test_the_buffer_picks_in_proportion_to_the_weights():
    buffer = Buffer(10)
    buffer.add(annealed(torch.tensor([0.5, 0.3, 0.2]).log().tolist()))

    picked = torch.cat([buffer.pick(1) for _ in range(4000)])
    share = torch.bincount(picked, minlength=3) / len(picked)

    assert ((share - torch.tensor([0.5, 0.3, 0.2])).abs() < 0.03).all()
    assert sorted(buffer.pick(10).tolist()) == [0, 1, 2]


def test_weights_of_the_buffer_follow_the_guide():
    buffer = Buffer(10)
    buffer.add(annealed([0.0, 0.0, 0.0]))

    buffer.change(
        torch.tensor([1, 2]), torch.tensor([0.7, math.nan]), torch.tensor([-0.7, math.nan])
    )

    assert buffer.log_w.tolist() == [0.0, 0.7, -math.inf]
    assert buffer.pick(10).numel() == 2


def test_nothing_is_done_on_a_buffer_without_weight():
    buffer = Buffer(10)
    buffer.add(annealed([-math.inf]))

    assert buffer.pick(5).numel() == 0


def test_what_cannot_be_trained_is_refused():
    fixed = FlowGuide(3, Chain([])).requires_grad_(False)

    with pytest.raises(ValueError, match="no parameters to train"):
        refine_fab(gaussian(), fixed)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        refine_fab(gaussian(), Guide(), rounds=0)
