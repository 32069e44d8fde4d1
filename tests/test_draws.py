"""Draws hold what guide and target say of them; resampling them gives draws of the target."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import constraints
from torch.nn.utils import parameters_to_vector

import flowvi
from flowvi.draws.diagnose import bounds, diagnose, where
from flowvi.draws.resampling import resample
from flowvi.draws.sampling import draw
from flowvi.guides import Draw, MeanField
from flowvi.runtime.rng import derive_seed
from flowvi.targets import Site, from_density

LOG_EVIDENCE = 0.7


def lognormal_and_normals(values):
    """log s ~ N(0, 0.5) and x ~ N(1, I), scaled by e^0.7."""
    log_s, x = values["s"].log(), values["x"]
    constants = LOG_EVIDENCE - 1.5 * math.log(2 * math.pi) - math.log(0.5)
    return constants - 2 * log_s**2 - log_s - ((x - 1) ** 2).sum() / 2


@pytest.fixture
def target():
    sites = {"s": Site(support=constraints.positive), "x": Site(shape=(2,))}
    return from_density(lognormal_and_normals, sites)


def guide(shift=0.0, stretch=1.0):
    """The law of the target, moved by so many sds and stretched."""
    q = MeanField(3)
    scale = torch.tensor([0.5, 1.0, 1.0])
    q.start(torch.tensor([0.0, 1.0, 1.0]) + shift * scale, torch.diag(stretch * scale))
    return q


def test_chains_are_guides_and_arrays_agree(target):
    draws = draw(target, [guide(), guide(0.5)], 150)

    z = torch.as_tensor(draws.z)
    assert draws.z.shape == (2, 150, 3)
    assert draws["x"].shape == (2, 150, 2)
    assert len(draws) == 300
    np.testing.assert_allclose(draws.log_p, target.log_prob(z))
    np.testing.assert_allclose(draws.log_q[1], guide(0.5).log_prob(z[1]).detach())
    np.testing.assert_allclose(draws["s"], np.exp(draws.z[..., 0]))
    np.testing.assert_allclose(draws.log_weights[0], LOG_EVIDENCE)


def test_a_seed_fixes_the_draws(target):
    first = draw(target, [guide()], 100, seed=3)
    torch.randn(7)
    second = draw(target, [guide()], 100, seed=3)
    other = draw(target, [guide()], 100, seed=4)

    np.testing.assert_array_equal(first.z, second.z)
    assert (first.z != other.z).all()


def test_fewer_draws_are_evenly_spaced_rows_of_the_table(target):
    draws = draw(target, [guide(), guide(0.5)], 101)

    few = draws.thinned(11)

    assert draws.thinned(101) is draws
    for name in ("z", "log_p", "log_q"):
        np.testing.assert_array_equal(getattr(few, name), getattr(draws, name)[:, ::10])
    np.testing.assert_array_equal(few["x"], draws["x"][:, ::10])


def test_every_purpose_has_a_seed_of_its_own():
    purposes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    seeds = [derive_seed(seed, *purpose) for seed in (0, 1) for purpose in purposes]

    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == derive_seed(0)


def test_restarts_are_trained_by_numbers_of_their_own():
    target = from_density(lambda v: -v["x"].cosh(), {"x": Site()})

    fit = flowvi.fit(target, "fullrank", steps=2, restarts=2, escalate=False, progress=False)

    first, second = (parameters_to_vector(g.parameters()) for g in fit.guides)
    assert not torch.equal(first, second)


def test_drawing_leaves_the_callers_generator_alone(target):
    before = torch.get_rng_state()

    draw(target, [guide()], 100)

    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_do_not_show(target, monkeypatch):
    whole = draw(target, [guide()], 100)
    monkeypatch.setattr(type(target), "chunk", lambda self: 30)
    parts = draw(target, [guide()], 100)

    assert parts.z.shape == whole.z.shape
    np.testing.assert_allclose(parts.log_p, target.log_prob(torch.as_tensor(parts.z)))


class Leaky(MeanField):
    """A guide whose first draw of every call cannot be scored."""

    def sample(self, shape, context=None):
        z, log_q = super().sample(shape, context)
        log_q[0] = math.nan
        return Draw(z, log_q)


def test_draws_that_cannot_be_scored_weigh_nothing(target):
    draws = draw(target, [Leaky(3)], 200)

    assert draws.log_weights[0, 0] == -math.inf
    assert np.isfinite(draws.log_q).all()
    assert any("1 of 200 draws have weight zero" in reason for reason in diagnose(draws).reasons)


def test_no_draws_are_refused(target):
    with pytest.raises(ValueError, match="n must be a whole number of at least 1; got 0"):
        draw(target, [guide()], 0)


def test_unknown_names_are_answered_with_the_known(target):
    with pytest.raises(KeyError, match=r"No value named 'tau'.*Choose from s, x"):
        draw(target, [guide()], 100)["tau"]


def test_draws_can_be_read(target):
    meta = {"guide": "meanfield", "objective": "ELBO", "steps": 3}

    text = str(draw(target, [guide()], 100, meta=meta))

    assert "meanfield guide, ELBO, 3 steps" in text
    assert "1 x 100 draws in 3 dimensions" in text


def test_resampled_draws_have_the_moments_of_the_target(target):
    """Within four standard errors, from a guide that is half a sd off."""
    draws = draw(target, [guide(0.5, 1.2)], 20_000)

    better = resample(draws)

    # The weights' error, and that of the resampling.
    error = math.sqrt(1 / diagnose(draws).ess + 1 / len(better))
    x = better["x"].reshape(-1, 2)
    assert better["x"].shape == (1, 20_000, 2)
    assert abs(x.mean(0) - 1).max() < 4 * error
    assert abs(x.std(0) - 1).max() < 4 * error
    assert abs(np.log(better["s"]).mean() / 0.5) < 4 * error


def test_resampling_keeps_rows_together(target):
    draws = draw(target, [guide(0.5), guide(-0.5)], 500)

    better = resample(draws, n=300)

    rows = {
        tuple(z): log_p for z, log_p in zip(draws.z.reshape(-1, 3), draws.log_p.flat, strict=True)
    }
    assert better.z.shape == (1, 300, 3)
    assert all(rows[tuple(z)] == p for z, p in zip(better.z[0], better.log_p[0], strict=True))
    np.testing.assert_allclose(better["s"], np.exp(better.z[..., 0]))


def test_equal_weights_resample_every_draw_once(target):
    draws = draw(target, [guide()], 200)

    better = resample(draws)

    np.testing.assert_array_equal(np.sort(better["s"].ravel()), np.sort(draws["s"].ravel()))


def test_resampling_never_picks_a_draw_without_weight(target):
    draws = draw(target, [guide(0.3)], 500)
    draws.log_p[0, ::2] = -np.inf

    better = resample(draws, n=5000)

    assert np.isfinite(better.log_p).all()


def test_resampled_draws_keep_the_first_diagnosis(target):
    draws = draw(target, [guide(0.5)], 4000)

    better = resample(draws)

    assert diagnose(better) == diagnose(draws)
    assert diagnose(better).verdict == "trust the resampled draws"
    json.dumps(better.meta)


@pytest.mark.parametrize("again", [bounds, resample])
def test_resampled_draws_have_no_weights(target, again):
    better = resample(draw(target, [guide(0.5)], 1000))

    with pytest.raises(ValueError, match=f"{again.__name__} needs weights, and got resampled"):
        again(better)


def test_resampling_hopeless_draws_warns(target):
    with pytest.warns(UserWarning, match="no better than the guide"):
        resample(draw(target, [guide(6.0)], 1000))


def test_diagnosis_knows_the_fit(target):
    draws = draw(target, [guide()], 400, meta={"guide": "meanfield", "reasons": ["Interrupted."]})

    diagnosis = diagnose(draws)

    assert diagnosis.verdict == "trust"
    assert diagnosis.title == "lognormal_and_normals: meanfield guide"
    assert diagnosis.reasons[-1] == "Interrupted."
    assert diagnosis.log_evidence == pytest.approx(LOG_EVIDENCE)


def test_verdict_names_the_value_that_is_off(target):
    q = guide()
    q.start(torch.tensor([0.0, 1.0, 1.5]), torch.diag(torch.tensor([0.5, 1.0, 1.0])))

    diagnosis = diagnose(draw(target, [q], 4000))

    assert diagnosis.verdict == "trust the resampled draws"
    assert "mean of x[1]" in diagnosis.reasons[0]


def test_elements_are_named_by_the_labels_that_they_were_given(target):
    target.label({"x_dim_0": ["left", "right"]})
    q = guide()
    q.start(torch.tensor([0.0, 1.0, 1.5]), torch.diag(torch.tensor([0.5, 1.0, 1.0])))

    draws = draw(target, [q], 4000)

    assert "mean of x[right]" in diagnose(draws).reasons[0]
    assert {"x[left]", "unconstrained x[right]"} < {*where(draws).labels}
    target.label({"x_dim_0": ["side", "side"]})
    assert {"x[0]", "x[1]"} < {*where(draws).labels}


def test_verdict_names_the_coordinate_that_is_off(target):
    """A shift of log s that s shares: the larger one is named, and by its site."""
    q = guide()
    q.start(torch.tensor([-0.3, 1.0, 1.0]), torch.diag(torch.tensor([0.5, 1.0, 1.0])))

    diagnosis = diagnose(draw(target, [q], 4000))

    assert "mean of unconstrained s by" in diagnosis.reasons[0]


def test_arrays_are_as_good_as_draws(target):
    draws = draw(target, [guide(0.5)], 2000)

    assert bounds(draws.log_weights) == bounds(draws)
    assert diagnose(draws.log_weights).log_evidence == diagnose(draws).log_evidence


def test_bounds_lie_below_the_evidence(target):
    table = bounds(draw(target, [guide(0.5)], 4000))

    assert [row.particles for row in table] == [1, 10, 100, 1000]
    assert all(row.bound < LOG_EVIDENCE + 4 * row.se for row in table)


def test_improper_priors_have_no_bounds(target):
    target.improper = ("x",)
    draws = draw(target, [guide()], 400)

    assert math.isnan(diagnose(draws).log_evidence)
    with pytest.raises(ValueError, match="prior of 'x' is improper"):
        bounds(draws)
