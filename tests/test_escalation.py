"""A fit that is not to be trusted is followed by others, and the better one is kept."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from quick import quick

import flowvi
from flowvi.cli import main
from flowvi.diagnostics import VERDICTS
from flowvi.draws.sampling import draw
from flowvi.fitting import escalation, restart
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.escalation import better, extend
from flowvi.guides import make_guide
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.runtime.clock import Clock
from flowvi.samplers.nuts import NutsSettings
from flowvi.training import schedule
from flowvi.training.records import Evaluation
from flowvi.training.settings import Session, Settings

TRUST, _, DISTRUST = VERDICTS


def two_bumps(apart: float = 6.0) -> flowvi.Target:
    """Two normals of equal weight, at a distance that no single Gaussian start bridges."""

    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        x = v["x"]
        normal = dist.Normal(0.0, 1.0)
        left, right = (normal.log_prob(x - m).sum() for m in (-apart / 2, apart / 2))
        return torch.logaddexp(left, right) - math.log(2)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


HEAVY = """
import pyro, pyro.distributions as dist
def data():
    return ()
def tails():
    with pyro.plate("row", 3):
        pyro.sample("x", dist.StudentT(4.0))
model = tails
"""


def heavy() -> flowvi.Target:
    """Student t coordinates, whose tails a Gaussian's weights cannot reach."""
    names: dict[str, Any] = {}
    exec(HEAVY, names)
    return flowvi.from_pyro(names["model"])


@pytest.fixture
def short(monkeypatch):
    """Stages and chains as short as they can be."""
    chains = (NutsSettings(200, 400, 2),)
    quick(monkeypatch, steady_steps=60, most_stages=1, least_decay=60, chains=chains)


def judged(verdict: str, bound: float, khat: float) -> Candidate:
    draws = flowvi.diagnose(np.random.default_rng(0).normal(0, 0.1, 1000))
    diagnosis = dataclasses.replace(draws, verdict=verdict, khat=khat)
    guide = make_guide("meanfield", 2)
    return Candidate(
        guide, "meanfield", evaluation=Evaluation(bound, 0.01, 0.1), diagnosis=diagnosis
    )


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ((TRUST, -3.0, 0.6), (DISTRUST, -1.0, 0.9), True),
        ((DISTRUST, -1.0, 0.5), (TRUST, -3.0, 0.6), False),
        ((DISTRUST, -1.0, 0.9), (DISTRUST, -2.0, 0.8), True),
        ((DISTRUST, -1.05, 0.75), (DISTRUST, -1.0, 0.9), True),
        ((DISTRUST, -1.0, 0.9), (DISTRUST, -1.05, 0.91), False),
    ],
)
def test_verdict_then_bound_then_tail_decide(new, old, expected):
    assert better(judged(*new), judged(*old)) is expected


@pytest.mark.parametrize(
    "name, depths", [("realnvp", (4, 8)), ("skewed", (0, 3)), ("skewed", (2, 6))]
)
def test_a_deeper_flow_starts_as_the_shallower_one(name, depths):
    old, new = (make_guide(name, 5, depth=depth) for depth in depths)
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z = torch.randn(20, 5)

    extend(new, old)

    torch.testing.assert_close(new.log_prob(z), old.log_prob(z))


def test_modes_left_out_lead_to_a_mixture(short):
    fit = flowvi.fit(two_bumps(), progress=False)

    draws = fit.draw(2000)
    assert fit.meta["guide"] == "mixture"
    assert 0.4 < (draws["x"][..., 0] > 0).mean() < 0.6
    assert abs(flowvi.diagnose(draws).log_evidence) < 0.05
    assert any(line.startswith("A mixture with a component for each mode") for line in fit.log)
    # Whoever reads the mean of x has to know that it is one of two copies.
    said = [
        r for r in flowvi.diagnose(draws).reasons if r.startswith("By symmetry the sign of 'x'")
    ]
    assert said == fit.meta["copies"] and len(said) == 1


def test_nothing_is_tried_without_escalation(short):
    fit = flowvi.fit(two_bumps(), escalate=False, progress=False)

    assert fit.meta["guide"] == "fullrank"
    assert flowvi.diagnose(fit.draw(1000)).verdict == DISTRUST


def test_an_attempt_that_fails_loses_nothing(short, monkeypatch):
    def broken(run: restart.Restart, kept: Candidate) -> Candidate:
        raise RuntimeError("no luck")

    monkeypatch.setattr(escalation, "ATTEMPTS", (("Something that breaks", broken),))

    fit = flowvi.fit(two_bumps(), progress=False)

    assert "Something that breaks: failed, no luck" in fit.log
    assert math.isfinite(fit.bounds[0])


def test_an_interrupted_attempt_leaves_what_there_was(short, monkeypatch):
    def pressed(run: restart.Restart, kept: Candidate) -> Candidate:
        raise KeyboardInterrupt

    attempts = (("Ctrl-C", pressed), *escalation.ATTEMPTS)
    monkeypatch.setattr(escalation, "ATTEMPTS", attempts)

    fit = flowvi.fit(two_bumps(), progress=False)

    assert fit.meta["interrupted"] and fit.meta["guide"] == "fullrank"


@pytest.mark.slow
def test_modes_along_the_axes_are_found_from_a_flat_density(monkeypatch):
    """Two wells on each of four axes: sixteen modes, of which searches see a few."""
    quick(monkeypatch, most_stages=1, steady_steps=300)
    monkeypatch.setattr(escalation, "ATTEMPTS", (("Splines", escalation.tempered),))
    grid = torch.linspace(-4, 4, 8001)
    wells = (-(grid**4) + 6 * grid**2).exp()
    log_z = 4 * torch.trapezoid(wells, grid).log().item()

    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        return (-(v["x"] ** 4) + 6 * v["x"] ** 2).sum()

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((4,))})

    fit = flowvi.fit(target, progress=False)

    diagnosis = flowvi.diagnose(fit.draw(4000))
    assert fit.meta["guide"] == "marginals"
    assert abs(diagnosis.log_evidence - log_z) < 4 * diagnosis.log_evidence_se + 0.02


def test_restarts_in_different_modes_are_joined(short):
    target = two_bumps(10.0)
    settings = Settings(flowvi.elbo(), None, 1e-3, escalate=True, schedule=schedule.DEFAULT)
    runs = [restart.Restart(target, settings, Session(), i, "auto", None) for i in range(2)]
    for one, side in zip(runs, (-5.0, 5.0), strict=True):
        guide = one.to_target(make_guide("fullrank", 2))
        guide.start(torch.full((2,), side), torch.eye(2))
        one.best = GaussianApproximation(torch.full((2,), side), torch.eye(2), "a side")
        one.candidate = Candidate(
            guide, "fullrank", lr=1e-3, evaluation=one.stages(guide).evaluate()
        )

    whole = escalation.joined(runs)

    assert whole is not None and whole.sizes["parts"] == [{"name": "fullrank"}] * 2
    z = whole.guide.sample((2000,)).z
    assert 0.45 < (z[:, 0] > 0).double().mean() < 0.55
    torch.testing.assert_close(whole.evaluation.bound, 0.0, atol=0.02, rtol=0.0)


def test_good_weights_that_are_few_for_many_dimensions_are_looked_at_again():
    """Of 4000 draws of a guide that is too wide in each of 85 dimensions, 290 are effective."""
    dim = 85
    normal = flowvi.from_density(lambda v: -v["x"].square().sum() / 2, {"x": flowvi.Site((dim,))})
    settings = Settings(flowvi.elbo(), None, 1e-3)
    one = restart.Restart(normal, settings, Session(), 0, "auto", None)
    guide = one.to_target(make_guide("meanfield", dim))
    guide.start(torch.zeros(dim), 1.15 * torch.eye(dim))
    few = flowvi.diagnose(draw(normal, [guide], 4000))
    assert few.verdict == DISTRUST and few.khat < few.khat_threshold

    kept = Candidate(guide, "meanfield", evaluation=one.stages(guide).evaluate())
    one.check(kept)

    assert kept.diagnosis is not None and kept.diagnosis.draws == 16_000
    assert kept.diagnosis.verdict == VERDICTS[1]


def test_restarts_that_agree_are_left_alone(short, monkeypatch):
    quick(monkeypatch, nothing_left=math.inf)
    normal = flowvi.from_density(lambda v: -v["x"].square().sum(), {"x": flowvi.Site((2,))})

    fit = flowvi.fit(normal, restarts=2, progress=False)

    assert len(fit.guides) == 2


@pytest.fixture(scope="module")
def ended_in_chains():
    """A Gaussian fit of heavy tails whose last resort were chains."""
    with pytest.MonkeyPatch.context() as patch:
        chains = (NutsSettings(warmup=200, draws=500),)
        numbers = {"most_stages": 1, "polish_steps": 90, "chains": chains}
        quick(patch, nothing_left=math.inf, **numbers)
        attempts = tuple(one for one in escalation.ATTEMPTS if one[1] is escalation.sampled)
        patch.setattr(escalation, "ATTEMPTS", attempts)
        return flowvi.fit(heavy(), progress=False)


@pytest.mark.slow
def test_chains_are_the_last_resort(ended_in_chains):
    draws = ended_in_chains.draw(4000, seed=1)

    assert draws.mcmc and draws.z.shape[0] == 4 and draws.z.shape[1] == 500
    assert draws.weighted is not None and draws.weighted.z.shape == (1, 4000, 3)
    assert any(line.startswith("NUTS in the space of the flow") for line in ended_in_chains.log)


def test_draws_of_chains_come_with_the_evidence(ended_in_chains):
    draws = ended_in_chains.draw(4000, seed=1)

    diagnosis, evidence = flowvi.diagnose(draws), flowvi.evidence(draws)

    assert abs(diagnosis.log_evidence) < 4 * diagnosis.log_evidence_se + 0.02
    assert evidence.eubo > evidence.log_evidence > evidence.bounds[0].bound
    assert "R-hat" in str(diagnosis) and "log evidence" in str(diagnosis)
    assert [b.particles for b in flowvi.bounds(draws)] == [1, 10, 100, 1000]


def test_fewer_draws_of_chains_are_thinned(ended_in_chains):
    few, all_ = (ended_in_chains.draw(n) for n in (50, 4000))

    assert few.z.shape == (4, 50, 3)
    assert np.array_equal(few.z[:, -1], all_.z[:, -1])
    assert few.stats["diverging"].shape == (4, 50)


def test_few_draws_of_chains_are_judged_by_all_of_them(ended_in_chains):
    few, all_ = (flowvi.diagnose(ended_in_chains.draw(n)) for n in (100, 4000))

    assert few.verdict == all_.verdict and few.draws == 400
    (reason,) = few.reasons
    assert reason.startswith("These are 400 of 2000 draws of Markov chains")
    assert reason.endswith("fit.draw(500).")


def test_chains_are_saved_with_the_fit(ended_in_chains, tmp_path: Path):
    ended_in_chains.save(tmp_path)

    again = flowvi.load(tmp_path, heavy())

    before, after = ended_in_chains.draw(300), again.draw(300)
    np.testing.assert_array_equal(after.z, before.z)
    np.testing.assert_allclose(after.log_p, before.log_p)
    assert flowvi.diagnose(after).rhat == pytest.approx(flowvi.diagnose(before).rhat, rel=1e-3)


def test_the_command_line_writes_chains_and_guide(ended_in_chains, monkeypatch, tmp_path: Path):
    model = tmp_path / "tails.py"
    model.write_text(HEAVY)
    monkeypatch.setattr("flowvi.fitting.fit.fit", lambda *args, **options: ended_in_chains)

    fitted = CliRunner().invoke(main, ["fit", str(model), "--out", str(tmp_path / "out")])
    judged = CliRunner().invoke(main, ["evidence", str(tmp_path / "out")])

    assert "guide.nc" in fitted.output, fitted.output
    assert "EUBO (upper bound)" in judged.output, judged.output


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_a_positive_number(budget):
    with pytest.raises(ValueError, match="budget must be a positive number of seconds"):
        flowvi.fit(heavy(), budget=budget)


# What the same fit takes without a budget, by the clock of this test.
UNLIMITED = 116


@pytest.mark.parametrize("budget", [5.0, 20.0])
def test_a_budget_is_kept_and_leaves_a_finished_fit(budget, monkeypatch):
    """By a clock that goes by evaluations: of a start, of training and of attempts."""
    target, calls = two_bumps(), []
    evaluate = target.log_prob

    def counted(z, batch=None):
        calls.append(len(z))
        return evaluate(z, batch)

    monkeypatch.setattr(target, "log_prob", counted)
    monkeypatch.setattr(Clock, "local_seconds", property(lambda clock: len(calls) / 20))

    fit = flowvi.fit(target, budget=budget, progress=False)

    # The start at one point, the choice of an iterate and a check are finished: 1200 calls. What
    # would not be is not begun.
    assert 0.6 * budget < fit.meta["seconds"] < budget + 60 < UNLIMITED
    assert math.isfinite(fit.bounds[0])
    assert np.isfinite(fit.draw(100).log_p).all()
