"""The log evidence is bounded from both sides, and no estimate of it is praised without reason."""

import itertools
import math

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
from click.testing import CliRunner
from normal_weights import gaussian
from scipy.signal import lfilter
from torch.distributions import constraints

import flowvi
from flowvi.cli import main
from flowvi.compat.arviz_groups import make_groups
from flowvi.diagnostics import evidence
from flowvi.diagnostics.bridge_sampling import bridge_evidence, eubo
from flowvi.draws.sampling import draw
from flowvi.guides import MeanField
from flowvi.plots import plot_evidence

mpl.use("Agg")
TRUTH = 0.7


def guide_weights(scale, seed=0, draws=4000):
    return gaussian(np.random.default_rng(seed), scale=scale, draws=draws, evidence=TRUTH)[0]


def posterior_weights(scale, chains=4, draws=1000):
    """Log weights of N(0, scale^2 I) at draws of the target itself."""
    z = np.random.default_rng(1).normal(size=(chains, draws, 3))
    log_q = -0.5 * (z**2 / scale**2).sum(-1) - 3 * math.log(scale)
    return TRUTH - 0.5 * (z**2).sum(-1) - log_q


@pytest.mark.parametrize("scale", [0.9, 1.0, 1.5])
def test_the_ladder_is_in_order_and_holds_the_truth(scale):
    e = evidence(guide_weights(scale), posterior_weights(scale))

    bounds = [b.bound for b in e.bounds]
    assert e.reliable
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(bounds))
    assert e.certain < e.certain_parts < TRUTH
    for value, error in [
        (e.mean_weight, e.mean_weight_se),
        (e.smoothed, e.smoothed_se),
        (e.debiased, e.debiased_se),
        (e.bridge, e.bridge_se),
    ]:
        assert abs(value - TRUTH) <= 4 * error + 1e-9
    assert bounds[0] <= TRUTH + 1e-9 and e.eubo >= TRUTH - 4 * e.eubo_se - 1e-9


def test_certain_bounds_are_as_far_below_as_markov_says():
    """Of constant weights: log 20 for the mean of all, and a 20th of it for 20 parts."""
    e = evidence(np.full(4000, TRUTH))

    assert e.certain == pytest.approx(TRUTH - math.log(20))
    assert e.certain_parts == pytest.approx(TRUTH - math.log(20) / 20)


def test_debiasing_removes_the_leading_bias():
    """At K = 10 the bias of L_K is CV^2 / 20 and more; what is left is of order 1 / K^2."""
    e = evidence(guide_weights(1.5, draws=40_000), particles=(1, 10))

    assert e.bounds[1].bound < TRUTH - 4 * e.bounds[1].se
    assert abs(e.debiased - TRUTH) < 0.25 * (TRUTH - e.bounds[1].bound)


def test_the_certain_bounds_are_rarely_wrong_even_for_a_guide_that_is_hopeless():
    rng = np.random.default_rng(0)
    found = [
        evidence(gaussian(rng, scale=0.3, draws=100, evidence=TRUTH)[0], particles=(1,))
        for _ in range(100)
    ]

    assert sum(e.certain > TRUTH for e in found) <= 10
    assert sum(e.certain_parts > TRUTH for e in found) <= 10


def test_errors_that_rest_on_chains_allow_for_their_autocorrelation():
    """The mean squared standard error is the variance over repetitions, to 4.5 of its own."""
    rng, repetitions, draws, rho = np.random.default_rng(0), 200, 1500, 0.7
    steps = rng.normal(size=(repetitions, 2, draws))
    steps[..., 1:] *= math.sqrt(1 - rho**2)
    # Log weights N(1 / 2, 1) at draws of the posterior, which those N(-1 / 2, 1) of the guide have.
    chains = 0.5 + lfilter([1.0], [1.0, -rho], steps)
    guides = rng.normal(-0.5, size=(repetitions, 100))

    above = [eubo(chain) for chain in chains]
    middle = [bridge_evidence(log_w, chain) for log_w, chain in zip(guides, chains, strict=True)]

    for found in (above, middle):
        values, errors = np.transpose(found)
        ratio = np.mean(errors**2) / np.var(values)
        assert ratio == pytest.approx(1.0, abs=4.5 * math.sqrt(2 / repetitions))


def test_heavy_tails_are_not_relied_on():
    e = evidence(guide_weights(0.5))

    assert not e.reliable
    assert str(e).splitlines()[0].endswith("do not rely on it")
    assert "lower bounds hold" in str(e)


def test_posterior_draws_rescue_the_evidence_of_a_narrow_guide():
    e = evidence(guide_weights(0.6), posterior_weights(0.6))

    assert e.khat > 0.5
    assert e.reliable and e.log_evidence == e.bridge
    assert abs(e.bridge - TRUTH) < 4 * e.bridge_se < 0.2


def test_chains_that_miss_a_part_are_found_out():
    """The guide is right; the posterior draws are of its central part only."""
    e = evidence(guide_weights(1.2), posterior_weights(1.2)[:, :100] * 0 + 0.2)

    assert not e.reliable
    assert "chains leave out" in str(e)
    assert e.log_evidence == e.mean_weight


def test_untrusted_chains_leave_the_estimate_to_the_weights():
    e = evidence(guide_weights(1.2), posterior_weights(1.2), trusted=False)

    assert e.reliable and e.log_evidence == e.mean_weight
    assert "chains are not trusted" in str(e)


def test_a_failed_restart_does_not_lower_the_estimate():
    chains = np.stack([guide_weights(1.2), guide_weights(1.2, seed=1) - 50])

    e = evidence(chains)

    assert abs(e.log_evidence - TRUTH) < 4 * e.log_evidence_se
    assert e.certain < e.log_evidence - math.log(20) - 0.6  # over all draws, half of no weight


def test_modes_that_are_known_to_be_missing_forbid_reliance():
    assert not evidence(guide_weights(1.2), doubts=["Another mode was seen."]).reliable


def target(**sites):
    return flowvi.from_density(lambda v: -0.5 * sum((x**2).sum() for x in v.values()), sites)


def drawn(model, scale=1.2, n=400):
    guide = MeanField(model.dim)
    guide.start(torch.zeros(model.dim), scale * torch.eye(model.dim))
    return draw(model, [guide], n)


def test_a_file_says_the_same_as_the_draws(tmp_path):
    draws = drawn(target(x=flowvi.Site(), y=flowvi.Site(shape=(2,))))
    flowvi.to_inference_data(draws).to_netcdf(str(tmp_path / "d.nc"), engine="h5netcdf")

    saved = flowvi.evidence(az.from_netcdf(str(tmp_path / "d.nc")))

    assert str(saved) == str(flowvi.evidence(draws))
    assert saved.log_evidence == pytest.approx(1.5 * math.log(2 * math.pi), abs=0.1)


@pytest.mark.parametrize("saved", [False, True])
def test_an_improper_prior_has_no_evidence(saved):
    def model(y):
        mu = pyro.sample("mu", pyro.distributions.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", pyro.distributions.Normal(mu, 1.0), obs=y)

    draws = drawn(flowvi.from_pyro(model, torch.tensor(0.5)))

    with pytest.raises(ValueError, match="prior of 'mu' is improper"):
        flowvi.evidence(flowvi.to_inference_data(draws) if saved else draws)


@pytest.mark.parametrize("saved", [False, True])
def test_resampled_draws_have_no_weights_to_tell_from(saved):
    draws = flowvi.resample(drawn(target(x=flowvi.Site())))

    with pytest.raises(ValueError, match="resampled draws, which have no weights"):
        flowvi.evidence(flowvi.to_inference_data(draws) if saved else draws)


def test_other_libraries_draws_are_refused():
    x = az.convert_to_dataset({"x": np.zeros((1, 100))})

    with pytest.raises(ValueError, match="no log_p and log_q"):
        flowvi.evidence(make_groups({"posterior": x}))


@pytest.fixture
def folder(tmp_path):
    """Saves draws of a guide as `flowvi fit` does."""

    def save(scale):
        idata = flowvi.to_inference_data(drawn(target(x=flowvi.Site(shape=(3,))), scale, 1000))
        idata.to_netcdf(str(tmp_path / "posterior.nc"), engine="h5netcdf")
        return tmp_path

    return save


@pytest.mark.parametrize(("scale", "code"), [(1.2, 0), (0.3, 3)])
def test_the_command_prints_the_judgement_first_and_draws_it(folder, scale, code):
    results = folder(scale)

    done = CliRunner().invoke(main, ["evidence", str(results)])

    assert done.exit_code == code
    assert done.stdout.startswith("Log evidence ")
    assert (results / "evidence.png").stat().st_size > 10_000


def test_the_command_says_what_it_cannot_read(tmp_path):
    missing = CliRunner().invoke(main, ["evidence", str(tmp_path)])
    (tmp_path / "posterior.nc").write_text("not NetCDF")
    broken = CliRunner().invoke(main, ["evidence", str(tmp_path)])

    assert missing.exit_code == 2 and "There is no" in missing.output
    assert broken.exit_code == 1 and "cannot be read" in broken.output


def test_the_ladder_is_drawn_on_the_axes_it_is_given():
    _, ax = plt.subplots()

    assert plot_evidence(evidence(guide_weights(1.2, draws=300)), ax) is ax
    ax.figure.canvas.draw()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "ELBO" and "$L_{1000}$" not in names and "EUBO" not in names
    plt.close("all")
