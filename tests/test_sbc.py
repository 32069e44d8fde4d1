"""Right posteriors have uniform ranks, and wrong ones are found out."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import brief

import flowvi
from flowvi.diagnostics import calibration
from flowvi.plots import plot_sbc

mpl.use("Agg")
SHORT = {"guide": "fullrank", "steps": 2, "draws": 300, "levels": 63}
LEVELS = 99


def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module", autouse=True)
def short_fits():
    with pytest.MonkeyPatch.context() as patch:
        brief(patch)
        yield


@pytest.fixture(scope="module")
def calibrated():
    """The conjugate normal model, for which the Gaussian guide is exact."""
    torch.manual_seed(0)
    return flowvi.sbc(model, torch.zeros(5, dtype=torch.float64), fits=20, **SHORT)


def closed_form(stretch=1.0, shift=0.0, fits=1000):
    """Ranks and probabilities of the same model, whose posterior is known; faults planted in it."""
    rng = np.random.default_rng(1)
    mu = rng.normal(size=(fits, 2))
    total = 5 * mu + np.sqrt(5) * rng.normal(size=mu.shape)
    loc, sd = total / 6, 1 / np.sqrt(6)
    noise = rng.normal(size=(LEVELS, fits, 2))
    draws = loc + sd * (shift + stretch * noise)
    ranks = np.stack([calibration.rank(draws[:, i], mu[i], rng) for i in range(fits)])
    return ranks, (ranks + 0.5) / (LEVELS + 1)


def test_a_right_fit_is_calibrated(calibrated):
    assert min(*calibrated.uniform.values(), calibrated.symmetric) > 0.01
    assert calibrated.plain.shape == (20, 1) and not calibrated.failures


@pytest.mark.parametrize(
    ("fits", "stretch", "head"),
    [
        (
            4,
            1.0,
            "Too few fits to decide: there is no evidence against the plain and resampled draws,",
        ),
        (99, 1.0, "Too few fits to decide"),
        (100, 1.0, "The plain and resampled draws are calibrated, by 100 fits"),
        (30, 0.2, "Not calibrated, by 30 fits"),
    ],
)
def test_few_fits_are_said_to_tell_nothing_but_faults(fits, stretch, head):
    ranks, probabilities = closed_form(stretch, fits=fits)

    verdicts = ("trust",) * fits
    found = calibration.Calibration(("a", "b"), LEVELS, ranks, ranks, probabilities, verdicts)

    assert str(found).startswith(head)
    assert ("At least 100" in str(found)) is head.startswith("Too few")
    assert found.enough is (fits >= 100)


def test_the_truth_is_where_the_draws_are(calibrated):
    """Ranks of data sets that were not the ones fitted would be extreme."""
    assert calibrated.labels == ("mu",)
    extreme = (calibrated.plain == 0) | (calibrated.plain == calibrated.levels)
    assert extreme.mean() < 0.2


def test_closed_form_ranks_pass():
    ranks, probabilities = closed_form()

    assert calibration.adjusted(*calibration.uniformity(ranks, LEVELS)) > 0.01
    assert calibration.adjusted(calibration.symmetry(probabilities)) > 0.01


@pytest.mark.parametrize("stretch", [0.8, 0.9, 1.2])
def test_a_wrong_width_is_caught_and_is_symmetric(stretch):
    ranks, probabilities = closed_form(stretch=stretch)

    ks, width = calibration.uniformity(ranks, LEVELS)
    assert calibration.adjusted(ks, width) < 0.01
    assert width.min() < ks.min()
    assert calibration.adjusted(calibration.symmetry(probabilities)) > 0.01


def test_a_shift_is_caught_by_both():
    ranks, probabilities = closed_form(shift=0.2)

    assert calibration.adjusted(*calibration.uniformity(ranks, LEVELS)) < 0.01
    assert calibration.adjusted(calibration.symmetry(probabilities)) < 0.01


def test_false_alarms_are_as_rare_as_they_should_be():
    rng = np.random.default_rng(0)
    alarms = [
        calibration.adjusted(*calibration.uniformity(rng.integers(0, 64, (50, 3)), 63)) < 0.05
        for _ in range(200)
    ]

    assert np.mean(alarms) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 200)


def test_ties_are_broken_at_random():
    rng = np.random.default_rng(0)

    ranks = [calibration.rank(np.zeros((9, 1)), np.zeros(1), rng)[0] for _ in range(500)]

    assert set(ranks) == set(range(10))


def run(file=None, **options):
    settings = {"fits": 3, "file": file, **SHORT, **options}
    return flowvi.sbc(model, torch.zeros(5, dtype=torch.float64), **settings)


def test_finished_fits_are_read_and_not_repeated(tmp_path, monkeypatch):
    file = tmp_path / "sbc.npz"
    whole = run(file)

    monkeypatch.setitem(flowvi.sbc.__globals__, "fit", None)
    again = run(file)

    np.testing.assert_array_equal(again.plain, whole.plain)
    np.testing.assert_array_equal(again.probabilities, whole.probabilities)
    with pytest.raises(ValueError, match="fits of another calibration"):
        run(file, seed=1)


def test_an_interrupted_calibration_goes_on(tmp_path, monkeypatch):
    file, done, fit = tmp_path / "sbc.npz", [], flowvi.fit

    def interrupted(*args, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return fit(*args, **options)

    monkeypatch.setitem(flowvi.sbc.__globals__, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(file)
    monkeypatch.setitem(flowvi.sbc.__globals__, "fit", fit)

    np.testing.assert_array_equal(run(file).plain, run().plain)


def test_fits_can_run_in_an_executor():
    with ThreadPoolExecutor(1) as executor:
        np.testing.assert_array_equal(run(executor=executor).plain, run().plain)


def test_the_caller_can_simulate():
    def simulate(seed):
        rng = np.random.default_rng(seed)
        mu = rng.normal()
        return (torch.as_tensor(mu + rng.normal(size=4)),), {"mu": np.array(mu)}

    found = flowvi.sbc(model, simulate=simulate, fits=2, **SHORT)

    assert found.labels == ("mu",) and found.plain.shape == (2, 1)


def test_failed_fits_are_counted(monkeypatch):
    calls, fit = [], flowvi.fit

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("The bound is not finite.")
        return fit(*args, **options)

    monkeypatch.setitem(flowvi.sbc.__globals__, "fit", failing)
    found = run()

    assert len(found.plain) == 2
    assert "1 fits failed" in str(found) and "not finite" in str(found)


def test_resampled_draws_are_ranked_by_their_weights(monkeypatch):
    """Guides that are shifted by an sd have low truths among their draws, and not resampled."""
    right = flowvi.fit

    def shifted(*args, **options):
        found = right(*args, **options)
        z = torch.as_tensor(found.draw(1000).z[0])
        found.guide.start(z.mean(0) + z.std(0), torch.diag(1.2 * z.std(0)))
        return found

    monkeypatch.setitem(flowvi.sbc.__globals__, "fit", shifted)
    found = run(fits=16)

    share = (found.resampled - found.plain).reshape(-1) / SHORT["levels"]
    assert share.mean() > 4 * share.std() / len(share) ** 0.5
    assert share.mean() > 0.1


def test_a_model_without_data_is_refused():
    def prior_only():
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(flowvi.ModelError, match="observes nothing"):
        flowvi.sbc(prior_only, fits=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fits": 1}, "fits must be a whole number of at least 2"),
        ({"draws": 10}, "draws must be a whole number of at least 100"),
        ({"levels": 0}, "levels must be a whole number of at least 1"),
        ({"draws": 100, "levels": 101}, "levels must be at most draws"),
        ({"stpes": 5}, r"sbc\(\) has no argument 'stpes'. Did you mean 'steps'"),
    ],
)
def test_wrong_sizes_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        run(**options)


def test_ranks_are_drawn(calibrated):
    before = dict(mpl.rcParams)

    axes = plot_sbc(calibrated)

    axes[0, 0].figure.canvas.draw()
    assert axes.shape == (2, 1) and axes[0, 0].get_title(loc="left") == "mu"
    plt.close("all")
    assert dict(mpl.rcParams) == before
