"""NUTS in a guide's space gives draws of the posterior, judged as Markov chains are."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.signal import lfilter

import flowvi
from flowvi.cli import main
from flowvi.cli.model_file import load_target
from flowvi.compat.arviz_stats import ess
from flowvi.diagnostics import diagnose_chains
from flowvi.fitting.result import Fit
from flowvi.guides import make_guide

MODELS = Path(__file__).parents[1] / "models"
# Draws for which a fast test has the time.
WARMUP, DRAWS, CHAINS = 150, 300, 4


def reference():
    return runpy.run_path(str(MODELS / "eight_schools.py"))["reference"]()


@pytest.fixture(scope="module")
def schools():
    """A Gaussian fit of eight schools, and chains in its space."""
    torch.manual_seed(0)
    target = load_target(MODELS / "eight_schools.py", None)
    fit = flowvi.fit(target, guide="fullrank", steps=60, progress=False)
    before = torch.get_rng_state()
    mcmc = flowvi.neutra(fit, warmup=WARMUP, draws=DRAWS, chains=CHAINS, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    return fit, mcmc


def errors(mcmc, name):
    """Distance of each mean from its reference, in Monte Carlo standard errors."""
    known = reference()
    values = mcmc[name].reshape(-1, *mcmc[name].shape[2:])
    effective = flowvi.diagnose(mcmc).ess
    error = np.array(known["sd"][name]) / math.sqrt(effective)
    return np.abs(values.mean(0) - np.array(known["mean"][name])) / error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mu", "tau", "theta"])
def test_eight_schools_has_the_known_means(schools, name):
    assert np.all(errors(schools[1], name) < 4)


@pytest.mark.slow
def test_the_chains_of_eight_schools_agree(schools):
    diagnosis = flowvi.diagnose(schools[1])

    assert diagnosis.rhat < 1.02 and diagnosis.divergences == 0
    # They are judged by themselves, not by what the check of the guide's own draws found.
    assert not any("judged as a whole" in reason for reason in diagnosis.reasons)
    assert math.isnan(diagnosis.khat) and math.isnan(diagnosis.log_evidence)
    assert "R-hat" in str(diagnosis) and "effective draws" in str(diagnosis)


@pytest.mark.slow
def test_log_q_is_the_guide_s_density(schools):
    fit, mcmc = schools

    with torch.no_grad():
        expected = fit.guide.log_prob(torch.as_tensor(mcmc.z))

    np.testing.assert_allclose(mcmc.log_q, expected.numpy(), rtol=1e-8, atol=1e-8)


def test_the_evidence_lies_between_elbo_and_eubo(schools):
    fit, mcmc = schools
    truth = reference()["log_evidence"]

    e = flowvi.evidence(fit.draw(4000), mcmc)

    assert e.bounds[0].bound <= truth + 3 * e.bounds[0].se
    assert e.eubo >= truth - 3 * e.eubo_se
    assert abs(e.bridge - truth) < 4 * e.bridge_se < 0.15


def test_saved_chains_serve_the_command(schools, tmp_path):
    fit, mcmc = schools
    files = {"posterior.nc": fit.draw(1000), "mcmc.nc": mcmc}
    for name, draws in files.items():
        idata = flowvi.to_inference_data(draws, log_likelihood=False)
        idata.to_netcdf(str(tmp_path / name), engine="h5netcdf")

    done = CliRunner().invoke(
        main, ["evidence", str(tmp_path), "--mcmc", str(tmp_path / "mcmc.nc")]
    )

    assert done.exit_code == 0, done.output
    assert "EUBO (upper bound)" in done.stdout


def test_chains_go_to_arviz_with_their_statistics(schools, tmp_path):
    idata = flowvi.to_inference_data(schools[1])
    idata.to_netcdf(str(tmp_path / "mcmc.nc"), engine="h5netcdf")

    stats = idata["sample_stats"]
    assert {"diverging", "tree_depth", "n_steps", "log_p", "log_q"} <= set(stats)
    assert "log_weight" not in stats
    assert stats["diverging"].shape == (CHAINS, DRAWS)
    assert idata["posterior"]["theta"].shape == (CHAINS, DRAWS, 8)


def test_chains_have_no_weights(schools):
    with pytest.raises(ValueError, match="got MCMC draws, which have no weights"):
        flowvi.resample(schools[1])
    with pytest.raises(ValueError, match="MCMC draws, which have no weights"):
        flowvi.evidence(schools[1])


@pytest.mark.slow
def test_a_funnel_is_sampled_to_its_tip():
    def log_density(v):
        normal = torch.distributions.Normal
        return (
            normal(0.0, 2.0).log_prob(v["v"])
            + normal(0.0, (v["v"] / 2).exp()).log_prob(v["x"]).sum()
        )

    target = flowvi.from_density(log_density, {"v": flowvi.Site(), "x": flowvi.Site(shape=(2,))})
    flow = flowvi.FLOWS["realnvp"](3, depth=4)
    fit = flowvi.fit(target, flowvi.FlowGuide(3, flow), steps=300, progress=False)

    mcmc = flowvi.neutra(fit, warmup=WARMUP, draws=DRAWS, chains=2, progress=False)

    diagnosis = flowvi.diagnose(mcmc)
    v = mcmc["v"]
    assert diagnosis.rhat < 1.05
    assert abs(v.mean()) < 4 * 2 / math.sqrt(diagnosis.ess)
    assert abs(math.log(v.std() / 2)) < 4 / math.sqrt(2 * diagnosis.ess)


def normal_fit(guide):
    target = flowvi.from_density(
        lambda v: -0.5 * (v["x"] ** 2).sum(), {"x": flowvi.Site(shape=(2,))}
    )
    return Fit(target, [guide], [0.0], {})


def test_one_seed_gives_one_result():
    fit = normal_fit(make_guide("meanfield", 2))

    one, same, other = (flowvi.neutra(fit, 100, 100, 2, seed=s) for s in (1, 1, 2))

    np.testing.assert_array_equal(one.z, same.z)
    assert not np.array_equal(one.z, other.z)


@pytest.mark.parametrize(
    ("guide", "options", "message"),
    [
        ("mixture", {}, "best guide is a MixtureGuide"),
        ("meanfield", {"chains": 1}, "chains must be a whole number of at least 2"),
        ("meanfield", {"draws": 10}, "draws must be a whole number of at least 100"),
        ("meanfield", {"target_accept": 1.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(guide, options, message):
    with pytest.raises(ValueError, match=message):
        flowvi.neutra(normal_fit(make_guide(guide, 2)), **options)


def chains(shift=0.0, draws=1000):
    x = np.random.default_rng(0).normal(size=(4, draws))
    x[0] += shift
    return {"x": x}, np.zeros((4, draws), dtype=bool)


def test_good_chains_are_trusted():
    assert diagnose_chains(*chains()).verdict == "trust"


@pytest.mark.parametrize(
    ("values", "diverging", "word"),
    [
        (*chains(shift=0.5), "R-hat"),
        (*chains(draws=90), "effective draws of x"),
        (chains()[0], np.random.default_rng(0).random((4, 1000)) < 0.01, "diverged"),
    ],
)
def test_bad_chains_are_not_trusted(values, diverging, word):
    diagnosis = diagnose_chains(values, diverging)

    assert diagnosis.verdict == "do not trust"
    assert word in diagnosis.reasons[0]


def test_the_tails_count_where_they_are_known_worse_than_the_bulk():
    """Independent signs, and sizes that change slowly."""
    rng, rho = np.random.default_rng(0), 0.95
    sizes = lfilter([1.0], [1.0, -rho], math.sqrt(1 - rho**2) * rng.normal(size=(4, 1000)))
    x = rng.normal(size=(4, 1000)) * np.exp(sizes)
    bulk, tail = (ess(x, method) for method in ("bulk", "tail"))

    found = diagnose_chains({"x": x}, np.zeros((4, 1000), dtype=bool))

    assert tail < bulk / 4
    assert found.ess == tail
