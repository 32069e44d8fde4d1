"""Short chains find what is wrong with draws, and leave draws of the posterior alone."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import arviz
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowvi
from flowvi.cli import main
from flowvi.diagnostics import Estimate, log_evidence, with_bridge
from flowvi.diagnostics.drift import DENSITY, DIRECTION, MEAN, SD, TAIL, Chains, measure, opinion
from flowvi.draws.sampling import draw, tabulate
from flowvi.fitting import escalation
from flowvi.fitting import opinion as fitted
from flowvi.guides import FullRank
from flowvi.samplers.short_chains import LONG, SHORT, second_opinion
from flowvi.targets.structure import MarginalTarget, structure

DIM, RHO = 3, 0.95
COVARIANCE = torch.eye(DIM, dtype=torch.float64)
COVARIANCE[0, 1] = COVARIANCE[1, 0] = RHO
PRECISION = COVARIANCE.inverse()


def log_density(v):
    x = v["x"]
    return -0.5 * x @ PRECISION.to(x) @ x


@pytest.fixture
def target(default):
    return flowvi.from_density(log_density, {"x": flowvi.Site((DIM,))})


def exact(n=4000, seed=0):
    root = torch.linalg.cholesky(COVARIANCE).numpy()
    return np.random.default_rng(seed).normal(size=(n, DIM)) @ root.T


def table(target, z, log_q=None):
    points = torch.as_tensor(z, dtype=target.dtype)
    log_q = points.new_zeros(len(z)) if log_q is None else torch.as_tensor(log_q).to(points)
    return tabulate(target, len(z), [[(points, log_q)]])


def cut(z):
    kept = z[z[:, 2] > np.quantile(z[:, 2], 0.02)]
    return np.concatenate([kept, kept[: len(z) - len(kept)]])


def narrow_one(z):
    poor = z.copy()
    width = 1 / math.sqrt(PRECISION[0, 0])
    poor[:, 0] = width * np.random.default_rng(1).normal(size=len(z))
    return poor


def uncorrelated(z):
    poor = z.copy()
    poor[:, 0] = np.random.default_rng(1).permutation(z[:, 0])
    return poor


FAULTS = {
    "narrow": (lambda z: 0.8 * z, "the sd of"),
    "shifted": (lambda z: z + np.array([0, 0, 0.2]), "the mean of unconstrained x[2]"),
    "cut": (cut, "the mass below"),
    "mean field": (narrow_one, "the sd of unconstrained x[0]"),
    "uncorrelated": (uncorrelated, "a combination of unconstrained x"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_faults_are_found(target, name, lengths):
    plant, words = FAULTS[name]
    said = second_opinion(table(target, plant(exact())), None, seed=3, lengths=lengths)
    assert said.moved
    assert any(words in drift for drift in said.drifts), said.reason
    assert said.reason.startswith(f"{lengths.chains} short Markov chains from these draws drift")


@pytest.mark.parametrize("seed", range(5))
def test_draws_of_the_posterior_are_left_alone(target, seed):
    said = second_opinion(table(target, exact(seed=seed)), None, seed=seed)
    assert not said.drifts and said.moved and not said.slow
    assert "stay there" in said.reason
    assert "Modes that no draw visits remain unseen." in said.reason


def test_few_chains_are_noise(target):
    few = LONG._replace(chains=40, kept=3)
    said = [second_opinion(table(target, exact(400, i)), None, False, i, few) for i in range(5)]
    assert max(one.shift for one in said) > 0.15
    assert not any(one.drifts for one in said)


def test_errors_of_drifts_are_those_of_repeated_draws():
    rng = np.random.default_rng(0)
    ratios = {kind: [] for kind in (MEAN, SD, DIRECTION, DENSITY)}
    shares = []
    repeats = 200
    for _ in range(repeats):
        z, start = rng.normal(size=(800, 2)), None
        start = z[np.r_[0:100:2, 1:101:2]]
        # Chains that keep a part of where they start.
        noise = rng.normal(size=(4, len(start), 2))
        path = 0.6 * start + 0.8 * noise
        log_p = [-0.5 * (x**2).sum(-1) for x in (z, start, path)]
        weights = np.full(len(z), 1 / len(z))
        moves, _ = measure(Chains(z, log_p[0], weights, start, log_p[1], path, log_p[2]), "ab")
        for move in moves:
            if move.kind in ratios:
                ratios[move.kind].append(move.drift / move.se)
            elif move.kind == TAIL:
                shares.append(move.drift > move.least)
    for kind, values in ratios.items():
        spread = np.mean(np.square(values))
        assert abs(spread - 1) < 4 * math.sqrt(2 / repeats), (kind, spread)
    assert np.mean(shares) < 0.05


def test_draws_are_judged_as_their_weights_have_them(target):
    rng = np.random.default_rng(2)
    z = exact(8000, 5)
    # Draws of a normal that is wide in one coordinate, with their weights.
    z[:, 2] = rng.normal(0.0, 1.5, len(z))
    log_q = np.array([log_density({"x": torch.as_tensor(x)}) for x in z])
    log_q = log_q + 0.5 * z[:, 2] ** 2 - 0.5 * (z[:, 2] / 1.5) ** 2 - math.log(1.5)
    draws = table(target, z, log_q)
    assert second_opinion(draws, None, resampled=False).drifts
    assert not second_opinion(draws, None, resampled=True).drifts


def test_chains_that_do_not_move_are_no_opinion():
    z = exact(400)
    log_p = -0.5 * (z**2).sum(-1)
    path, path_log_p = np.stack([z[:100]] * 3), np.stack([log_p[:100]] * 3)
    weights = np.full(400, 1 / 400)
    said = opinion(Chains(z, log_p, weights, z[:100], log_p[:100], path, path_log_p), "abc", 0.8)
    assert not said.moved and not said.drifts
    assert "hardly moved" in said.reason and "no second opinion" in said.reason


def test_one_coordinate_that_does_not_move_is_named():
    z = np.random.default_rng(0).normal(size=(400, 2))
    path = np.random.default_rng(1).normal(size=(3, 100, 2))
    path[..., 1] = z[:100, 1]
    log_p = [-0.5 * (x**2).sum(-1) for x in (z, z[:100], path)]
    weights = np.full(400, 1 / 400)
    chains = Chains(z, log_p[0], weights, z[:100], log_p[1], path, log_p[2])
    said = opinion(chains, ["quick", "slow"], 0.8)
    assert said.slow == "slow" and "slow hardly moved" in said.reason


def test_a_mode_that_no_draw_visits_is_not_seen():
    def two(v):
        apart = torch.stack([v["x"], v["x"] - 12.0])
        return torch.logsumexp(-0.5 * apart.square(), 0)

    target = flowvi.from_density(two, {"x": flowvi.Site(())})
    said = second_opinion(table(target, np.random.default_rng(0).normal(size=(2000, 1))), None)
    assert not said.drifts


def test_chains_move_in_the_space_of_a_guide(target):
    guide = FullRank(DIM).to(target.dtype)
    one = torch.eye(DIM, dtype=target.dtype)
    guide.start(0 * one[0], one)
    draws = table(target, exact())
    assert not second_opinion(draws, guide).drifts
    assert second_opinion(draws, guide) != second_opinion(draws, None)
    assert all(p.requires_grad for p in guide.parameters())


def test_the_caller_keeps_its_random_numbers(target):
    draws = table(target, exact(1000))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    said = [second_opinion(draws, None, seed=1) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert said[0] == said[1]


def test_diagnose_asks_chains(target):
    narrow = table(target, 0.8 * exact())
    good = table(target, exact())
    # Weights that are all alike: they say nothing against either.
    narrow, good = (replace(d, log_q=d.log_p.copy()) for d in (narrow, good))
    assert flowvi.diagnose(narrow).verdict == flowvi.diagnose(good).verdict == "trust"
    found = flowvi.diagnose(narrow, chains=True)
    assert found.verdict == "do not trust" and "drift away" in found.reasons[0]
    found = flowvi.diagnose(good, chains=True)
    assert found.verdict == "trust" and "stay there" in found.reasons[-1]


def test_diagnose_refuses_draws_at_which_no_chain_can_start(target):
    draws = table(target, exact(500))
    with pytest.raises(ValueError, match="resampled: pass those of the fit"):
        flowvi.diagnose(flowvi.resample(replace(draws, log_q=draws.log_p.copy())), chains=True)
    with pytest.raises(TypeError, match="draws must be the draws of a fit"):
        flowvi.diagnose(np.zeros(100), chains=True)
    with pytest.raises(ValueError, match="a bound or an estimate"):
        flowvi.diagnose(replace(draws, log_p=draws.log_p - 5.0), chains=True)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        flowvi.diagnose(draws, chains=True, seed=-1)


def test_a_default_fit_asks_and_says_so(target):
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    (reason,) = fit.meta["reasons"]
    assert "short Markov chains from these draws stay there" in reason
    assert f"second opinion: {reason}" in fit.log
    found = flowvi.diagnose(fit.draw(1000))
    assert found.verdict == "trust" and reason in found.reasons
    again = flowvi.diagnose(fit.draw(1000), chains=True)
    assert reason not in again.reasons and "stay there" in again.reasons[-1]


def test_a_fit_from_which_chains_drift_is_not_trusted(target, monkeypatch):
    said = []

    def drifting(draws, *rest):
        said.append(replace(second_opinion(draws, *rest), drifts=("the mean of x by +0.3 sd",)))
        return said[-1]

    monkeypatch.setattr(fitted, "second_opinion", drifting)
    monkeypatch.setattr(escalation, "ATTEMPTS", escalation.ATTEMPTS[:1])
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    assert len(said) == 1
    assert fit.meta["missed"] == [said[0].reason] and not fit.meta["reasons"]
    found = flowvi.diagnose(fit.draw(1000))
    assert found.verdict == "do not trust" and found.reasons[0] == said[0].reason


def test_drifting_chains_lead_to_other_guides(target, monkeypatch):
    asked, tried = [], []

    def drifting(draws, *rest):
        asked.append(second_opinion(draws, *rest))
        return replace(asked[-1], drifts=("the mean of x by +0.3 sd",) if len(asked) == 1 else ())

    def another(restart, candidate):
        tried.append(candidate)
        return replace(candidate, opinion="", drifts=False, diagnosis=None)

    monkeypatch.setattr(fitted, "second_opinion", drifting)
    attempts = (("another", another), ("a third", another))
    monkeypatch.setattr(escalation, "ATTEMPTS", attempts)
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    assert len(asked) == 2 and len(tried) == 1
    assert flowvi.diagnose(fit.draw(1000)).verdict == "trust"


def test_a_fit_without_time_says_that_it_did_not_ask(target, monkeypatch):
    monkeypatch.setattr("flowvi.fitting.pace.Pace.has_time_for", lambda self, gradients: False)
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    assert fit.meta["reasons"] == ["No second opinion by short chains: the time budget is spent."]


def test_a_density_that_is_no_whole_one_is_not_asked_about():
    def log_density(v):
        groups = -0.5 * ((v["x"] - v["m"]) ** 2).sum() - 0.5 * ((v["x"] - 1.0) ** 2).sum()
        return groups - 0.5 * v["m"].square()

    sites = {"m": flowvi.Site(()), "x": flowvi.Site((4,))}
    whole = flowvi.from_density(log_density, sites)
    session = SimpleNamespace(clock=None)
    restart = SimpleNamespace(target=MarginalTarget(whole, structure(whole)), session=session)
    assert "Laplace's formula" in fitted._why_not(restart)


def test_the_command_checks_again(tmp_path):
    model = tmp_path / "line.py"
    model.write_text(
        "import pyro, torch\n"
        "import pyro.distributions as dist\n"
        "def data():\n"
        "    return (torch.tensor([0.3, 1.2, 0.8]),)\n"
        "def model(y):\n"
        "    mu = pyro.sample('mu', dist.Normal(0.0, 2.0))\n"
        "    with pyro.plate('row', len(y)):\n"
        "        pyro.sample('y', dist.Normal(mu, 1.0), obs=y)\n"
    )
    run, out = CliRunner(), tmp_path / "out"
    done = run.invoke(main, ["fit", str(model), "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "short Markov chains from these draws stay there" in done.output
    written = run.invoke(main, ["check", str(out)])
    fresh = run.invoke(main, ["check", str(out), "--model", str(model), "--seed", "3"])
    for found in (written, fresh):
        assert found.exit_code == 0, found.output
        assert "Verdict: trust" in found.output
        assert found.output.count("short Markov chains") == 1
    assert "400 short Markov chains" in fresh.output
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run.invoke(main, ["check", str(empty)]).exit_code == 2


def heavy_target():
    """A t density in the plane, whose evidence is 0, and a normal guide that is too light."""
    t = torch.distributions.StudentT(torch.tensor(5.0, dtype=torch.float64))
    return flowvi.from_density(
        lambda v: t.log_prob(v["x"].double()).sum(), {"x": flowvi.Site((2,))}
    )


def test_the_bridge_by_short_chains_sees_what_weights_leave_out():
    target = heavy_target()
    guide = FullRank(2).to(target.dtype)
    one = torch.eye(2, dtype=target.dtype)
    guide.start(0 * one[0], 1.25 * one)
    weights, bridges = [], []
    repeats = 20
    for seed in range(repeats):
        draws = draw(target, [guide], 2000, seed)
        said = second_opinion(draws, guide, seed=seed)
        assert said.mixed
        weights.append(log_evidence(draws.log_weights.ravel()).value)
        bridges.append(said.bridge)
    values, errors = np.array(bridges).T
    spread = values.std(ddof=1)
    # The weights have no variance, and neither has the error of their mean.
    assert np.abs(values).mean() < np.abs(weights).mean() / 2
    # The mean is right, and the stated error is the scatter, within the noise of 20 repeats.
    assert abs(values.mean()) < 4 * spread / math.sqrt(repeats)
    assert abs(errors.mean() / spread - 1) < 4 / math.sqrt(2 * repeats)


def test_the_error_of_the_evidence_has_what_chains_add():
    weights, bridge = Estimate(-1.0, 0.01), Estimate(-0.9, 0.02)
    value, error = with_bridge(weights, bridge)
    assert value == -0.9 and error == pytest.approx(math.hypot(0.02, 0.1))


def test_the_evidence_of_a_fit_has_its_bridge(target, tmp_path):
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    bridge = Estimate(*fit.meta["bridge"])
    exact = 0.5 * math.log(2 * math.pi) * DIM + 0.5 * math.log(1 - RHO**2)
    draws = fit.draw(4000)
    saved = tmp_path / "draws.nc"
    flowvi.to_inference_data(draws).to_netcdf(saved, engine="h5netcdf")
    for found in (
        flowvi.diagnose(draws),
        flowvi.evidence(draws),
        flowvi.evidence(arviz.from_netcdf(saved)),
    ):
        assert found.log_evidence == pytest.approx(bridge.value, abs=1e-12)
        assert found.log_evidence_se >= bridge.se
    assert abs(bridge.value - exact) < 5 * max(bridge.se, 1e-5)


def test_mass_that_only_annealing_finds_is_said(target, monkeypatch):
    said = "Annealing from a wide start finds about 2.0 times the mass that the guide covers."
    monkeypatch.setattr("flowvi.fitting.restart.mass_beyond_guide", lambda *args: said)
    monkeypatch.setattr(escalation, "ATTEMPTS", ())
    fit = flowvi.fit(target, seed=0, compile=False, progress=False)
    assert fit.meta["missed"] == [said]
    assert flowvi.diagnose(fit.draw(1000)).verdict == "do not trust"


def test_the_number_of_chains_is_no_choice() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"chains must be True or False.*got an int"):
        flowvi.diagnose(np.zeros(100), chains=wrong)
