"""Fits that integrate the latents of units: weights, files, and what bad units get."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from quick import quick
from torch import Tensor

import flowvi
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.runtime.files import CheckpointError
from flowvi.targets import ModelError
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure import MarginalTarget, structure
from flowvi.targets.structure.faults import faults

GROUPS, EACH = 12, 4
group = torch.arange(GROUPS).repeat_interleave(EACH)
Model = Callable[[], None]


def normal() -> Model:
    torch.manual_seed(1)
    y = 0.5 + 0.8 * torch.randn(GROUPS)[group] + torch.randn(len(group))

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", GROUPS):
            u = pyro.sample("u", dist.Normal(mu, tau))
        with pyro.plate("row", len(group)):
            pyro.sample("y", dist.Normal(u[group], 1.0), obs=y)

    return model


def normal_evidence(model: Model) -> float:
    """Exact log evidence of `normal` by quadrature over the two shared latents."""
    y = flowvi.from_pyro(model).observed["y"]
    mean = torch.as_tensor(y).double().view(GROUPS, EACH).mean(1).view(-1, 1, 1)
    within = (torch.as_tensor(y).double().view(GROUPS, EACH) - mean[..., 0]).square().sum()
    mu = torch.linspace(-3, 4, 1401, dtype=torch.float64).view(1, -1, 1)
    tau = torch.linspace(1e-6, 5, 2001, dtype=torch.float64).view(1, 1, -1)
    spread = (tau**2 + 1 / EACH).sqrt()
    units = -0.5 * ((mean - mu) / spread) ** 2 - spread.log() - 0.5 * math.log(2 * math.pi)
    rows = -0.5 * within - 0.5 * GROUPS * ((EACH - 1) * math.log(2 * math.pi) + math.log(EACH))
    prior = -0.5 * (mu[0] / 2) ** 2 - math.log(2) - 0.5 * tau[0] ** 2 + math.log(2)
    joint = units.sum(0) + prior - math.log(2 * math.pi)
    top = joint.max()
    inner = torch.trapezoid((joint - top).exp(), tau[0, 0], dim=1)
    return float(top + torch.trapezoid(inner, mu[0, :, 0]).log() + rows)


TRIALS = 8
successes = (torch.arange(GROUPS) * 5) % (TRIALS + 1)


def beta_binomial() -> None:
    m = pyro.sample("m", dist.Beta(2.0, 2.0))
    with pyro.plate("group", GROUPS):
        p = pyro.sample("p", dist.Beta(6 * m, 6 * (1 - m)))
        pyro.sample("y", dist.Binomial(TRIALS, p), obs=successes.to(m))


def beta_binomial_evidence() -> float:
    m = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    a, b, y = 6 * m, 6 * (1 - m), successes.double().view(-1, 1)

    def log_beta(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    choose = math.lgamma(TRIALS + 1) - torch.lgamma(y + 1) - torch.lgamma(TRIALS - y + 1)
    units = (choose + log_beta(a + y, b + TRIALS - y) - log_beta(a, b)).sum(0)
    joint = units + math.log(6) + m.log() + (1 - m).log()
    return float(joint.max() + torch.trapezoid((joint - joint.max()).exp(), m).log())


def structured(model: Model, **options: Any) -> StructuredFit:
    found = flowvi.fit(
        flowvi.from_pyro(model), "structured", progress=False, escalate=False, **options
    )
    assert isinstance(found, StructuredFit)
    return found


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws of a check."""
    quick(monkeypatch, evaluation_draws=500, check_draws=500)


@pytest.mark.parametrize("name", ["normal", "beta-binomial"])
def test_the_mean_weight_is_the_evidence(default: torch.dtype, name: str) -> None:
    model = normal() if name == "normal" else beta_binomial
    exact = normal_evidence(model) if name == "normal" else beta_binomial_evidence()
    fit = structured(model)
    draws = fit.draw(2000, seed=3)
    weight = np.exp(draws.log_weights.ravel() - exact)
    error = weight.std() / math.sqrt(weight.size)
    assert abs(weight.mean() - 1) < 4 * error + 1e-4, (weight.mean(), error)
    # Nor is the error so large that anything passes.
    assert error < 0.05
    if name == "normal":
        assert flowvi.diagnose(draws).verdict == "trust"
        assert not fit.units().bad.any()


def test_the_score_of_a_guide_is_that_of_its_draws() -> None:
    guide = structured(beta_binomial).guide
    z, log_q = guide.sample((3, 20))
    torch.testing.assert_close(guide.log_prob(z), log_q, rtol=1e-9, atol=1e-6)


def test_a_saved_fit_has_the_same_draws(tmp_path: Path) -> None:
    fit = structured(beta_binomial)
    fit.save(tmp_path / "fit")
    again = flowvi.load(tmp_path / "fit", flowvi.from_pyro(beta_binomial))
    one, two = fit.draw(50, seed=2), again.draw(50, seed=2)
    for name in ("z", "log_p", "log_q"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.slow
def test_a_resumed_fit_is_the_same(tmp_path: Path) -> None:
    whole = structured(beta_binomial).draw(50)
    first = structured(beta_binomial, checkpoint=tmp_path / "fit")
    with pytest.raises(CheckpointError, match="resume=True"):
        structured(beta_binomial, checkpoint=tmp_path / "fit")
    again = structured(beta_binomial, checkpoint=tmp_path / "fit", resume=True)
    for draws in (first.draw(50), again.draw(50)):
        np.testing.assert_array_equal(draws.z, whole.z)
        np.testing.assert_array_equal(draws.log_weights, whole.log_weights)


# Bad units


def without_rows() -> None:
    some = group[group != 5]
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.Normal(mu, 1.0))
    with pyro.plate("row", len(some)):
        pyro.sample("y", dist.Poisson(u[some].exp()), obs=some % 3)


def test_a_unit_without_rows_has_its_prior() -> None:
    fit = structured(without_rows)
    draws = fit.draw(2000)
    assert flowvi.diagnose(draws).verdict in ("trust", "trust the resampled draws")
    weight = np.exp(draws.log_weights.ravel() - draws.log_weights.max())
    away = draws["u"].reshape(-1, GROUPS)[:, 5] - draws["mu"].ravel()
    error = math.sqrt(np.sum(weight**2)) / weight.sum()
    assert abs(np.average(away, weights=weight)) < 4 * error
    assert abs(np.average(away**2, weights=weight) - 1) < 4 * math.sqrt(2) * error


def flat_without_rows() -> None:
    some = group[group != 5]
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("row", len(some)):
        pyro.sample("y", dist.Normal(u[some], s), obs=torch.linspace(-1, 1, len(some)))


def separable() -> None:
    y = torch.where(group == 5, 1.0, torch.arange(len(group)) % 2)
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.ImproperUniform(dist.constraints.real, (), ()))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(group)):
        eta = u[group] + slope * torch.linspace(-1, 1, len(group))
        pyro.sample("y", dist.Bernoulli(logits=eta), obs=y)


# Mean of each row of the unit with two modes, at its square or at its distance from zero.
FOUR = 4 + torch.linspace(-0.3, 0.3, len(group))


def squared() -> None:
    s = pyro.sample("s", dist.LogNormal(-1.0, 0.3))
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.Normal(0.5, 2.0))
    with pyro.plate("row", len(group)):
        mean = torch.where(group == 5, u[group] ** 2, u[group])
        pyro.sample("y", dist.Normal(mean, s + 0.1), obs=FOUR)


def squared_exactly() -> tuple[float, float]:
    """Log evidence of `squared`, and the probability that the fifth unit is above zero."""
    s = torch.exp(torch.linspace(-6.0, 1.0, 351, dtype=torch.float64))
    u = torch.linspace(-8, 10, 3001, dtype=torch.float64)
    prior = dist.Normal(0.5, 2.0).log_prob(u)
    total, above = torch.zeros_like(s), torch.zeros_like(s)
    for i, rows in enumerate(FOUR.double().view(GROUPS, EACH)):
        mean = u**2 if i == 5 else u
        normal = dist.Normal(mean, s.view(-1, 1, 1) + 0.1)
        joint = prior + normal.log_prob(rows.view(-1, 1)).sum(1)
        total += joint.logsumexp(1) + math.log(u[1] - u[0])
        if i == 5:
            above = joint[:, u > 0].logsumexp(1) - joint.logsumexp(1)
    total += dist.LogNormal(-1.0, 0.3).log_prob(s) + (s * math.log(s[1] / s[0])).log()
    return float(total.logsumexp(0)), float((total.softmax(0) * above.exp()).sum())


def test_a_unit_with_two_modes_gets_a_mixture(default: torch.dtype) -> None:
    evidence, above = squared_exactly()
    fit = structured(squared)
    assert len(fit.marginal.others) == 1
    draws = fit.draw(2000, seed=2)
    found = flowvi.diagnose(draws)
    assert found.verdict in ("trust", "trust the resampled draws"), found
    weight = np.exp(draws.log_weights.ravel() - evidence)
    error = weight.std() / math.sqrt(weight.size)
    assert abs(weight.mean() - 1) < 4 * error + 1e-4, (weight.mean(), error)
    assert error < 0.05
    share = np.average(draws["u"].reshape(-1, GROUPS)[:, 5] > 0, weights=weight)
    assert abs(share - above) < 4 * math.sqrt(above * (1 - above) / weight.size) + 4 * error


def outlying() -> None:
    y = 3.0 * group - 15 + 0.1 * (torch.arange(len(group)) % 4)
    y[20:22] += 15
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(9.0))
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.Normal(mu, tau))
    with pyro.plate("row", len(group)):
        pyro.sample("y", dist.StudentT(2.0, u[group], 0.3), obs=y)


def test_a_unit_whose_rows_disagree_is_integrated_over_both_modes(default: torch.dtype) -> None:
    marginal = structured(outlying).marginal
    assert marginal.others
    centre = marginal.laplace.reference
    points = centre + torch.tensor([[0.0, 0.0], [0.5, 0.2]]).to(centre)
    u = torch.linspace(-40, 60, 100_001, dtype=torch.float64)
    rows = torch.as_tensor(marginal.observed["y"]).double().view(GROUPS, EACH, 1)
    likelihood = dist.StudentT(2.0, u, 0.3).log_prob(rows).sum(1)
    for theta in points:
        many = theta.expand(20_000, -1)
        found = list(marginal.corrected(many, torch.Generator().manual_seed(1)))
        mu, tau = (marginal.constrain(theta)[name].double() for name in ("mu", "tau"))
        exact = (dist.Normal(mu, tau).log_prob(u) + likelihood).logsumexp(-1)
        exact = exact + math.log(u[1] - u[0])
        ratio = (torch.cat([one.by_unit for one in found]).double() - exact).exp()
        error = ratio.std(0) / math.sqrt(len(ratio))
        # Estimates are unbiased, with a long tail: few lattices meet the narrow modes.
        assert ((ratio.mean(0) - 1).abs() < 4.5 * error + 1e-5).all(), ratio.mean(0)
        # Without the second mode the error is 0.008.
        assert error.max() < 0.001


def test_a_mixture_is_saved(tmp_path: Path) -> None:
    fit = structured(squared)
    fit.save(tmp_path / "fit")
    again = flowvi.load(tmp_path / "fit", flowvi.from_pyro(squared))
    assert np.array_equal(fit.draw(50, seed=2).z, again.draw(50, seed=2).z)


def squared_pairs() -> None:
    s = pyro.sample("s", dist.LogNormal(-1.0, 0.3))
    with pyro.plate("group", GROUPS):
        u = pyro.sample("u", dist.Normal(0.5, 2.0).expand([4]).to_event(1))
    with pyro.plate("row", len(group)):
        first, rest = u[group, 0], u[group, 1:].sum(-1)
        mean = torch.where(group == 5, first**2, first)
        pyro.sample("y", dist.Normal(mean + 0.1 * rest, s + 0.1), obs=FOUR)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (flat_without_rows, "group[5] is not determined"),
        pytest.param(separable, "group[5] is not determined", marks=pytest.mark.slow),
        (squared_pairs, "group[5] has a second mode"),
    ],
)
def test_a_bad_unit_is_named(model: Model, said: str) -> None:
    fit = structured(model)
    draws = fit.draw(100)
    assert draws.z.shape[1:] == (100, fit.target.dim)
    reasons = " ".join(flowvi.diagnose(draws).reasons)
    assert said in reasons, reasons
    assert flowvi.diagnose(draws).verdict == "do not trust"


@pytest.mark.parametrize("model", [normal(), beta_binomial, without_rows])
def test_good_units_have_no_faults(default: torch.dtype, model: Model) -> None:
    target = flowvi.from_pyro(model)
    assert isinstance(target, GlobalTarget)
    marginal = MarginalTarget(target, structure(target))
    theta = torch.zeros(4, marginal.dim, dtype=marginal.dtype)
    marginal.laplace.centre(theta[0])
    labels = [str(i) for i in range(GROUPS)]
    assert faults(marginal, theta, labels) == []


def test_missing_data_are_named_by_row(default: torch.dtype) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", GROUPS):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
        with pyro.plate("row", len(group)):
            y = torch.where(torch.arange(len(group)) == 21, math.nan, 1.0)
            pyro.sample("y", dist.Normal(u[group], 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'y'.*first at \[21\]"):
        flowvi.from_pyro(model)


@pytest.mark.parametrize("units", [1, GROUPS])
def test_units_that_are_tied_or_single_are_fitted_together(units: int, hasty: None) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", units):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=torch.ones(units))
        pyro.factor("tie", -(u.sum() ** 2))

    fit = flowvi.fit(flowvi.from_pyro(model), budget=10, progress=False)
    assert not isinstance(fit, StructuredFit)
    if units == 1:
        with pytest.raises(ValueError, match="no plate and no axis holds several latents"):
            flowvi.fit(flowvi.from_pyro(model), "structured", progress=False)


@pytest.mark.parametrize("budget", [10, pytest.param(None, marks=pytest.mark.slow)])
def test_an_integral_that_takes_too_long_leaves_the_other_guides(
    budget: float | None, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setattr("flowvi.fitting.fit_structured.FEWEST_UNITS", 2)
    monkeypatch.setattr("flowvi.fitting.fit_structured.EVALUATIONS", 10**9)
    target = flowvi.from_pyro(beta_binomial)
    fit = flowvi.fit(target, budget=budget, steps=None, progress=False)
    assert not isinstance(fit, StructuredFit)
    limit = "5" if budget else "1,800"
    assert re.match(
        r"no structured guide of .*1,000,000,000 evaluations would take about [\d,]+ s, more than "
        + limit,
        fit.log[0],
    )


def test_an_integral_that_fails_leaves_the_other_guides(
    monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite.")

    monkeypatch.setattr(MarginalTarget, "evaluate", fails)
    monkeypatch.setattr("flowvi.fitting.fit_structured.FEWEST_UNITS", 2)
    target = flowvi.from_pyro(beta_binomial)
    with pytest.raises(ValueError, match="cannot be integrated"):
        flowvi.fit(target, "structured", progress=False)
    fit = flowvi.fit(target, budget=10, progress=False)
    assert not isinstance(fit, StructuredFit)
    assert "no structured guide" in fit.log[0]


def test_one_point_of_scalar_latents_has_scalar_values():
    target = flowvi.from_pyro(normal())
    marginal = MarginalTarget(target, structure(target))
    z = torch.zeros(marginal.dim, dtype=marginal.dtype)

    values = marginal.constrain(z)

    assert {name: value.shape for name, value in values.items()} == {"mu": (), "tau": ()}
    for name, value in marginal.constrain(z.expand(2, 3, -1)).items():
        torch.testing.assert_close(value, values[name].expand(2, 3))


def test_a_walk_of_increments_has_its_exact_evidence() -> None:
    torch.manual_seed(3)
    steps = 60
    y = 0.5 * torch.randn(steps).cumsum(0) + torch.randn(steps)

    def model() -> None:
        with pyro.plate("time", steps):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("seen", steps):
            pyro.sample("y", dist.Normal((0.5 * z).cumsum(-1), 1.0), obs=y)

    fit = structured(model)
    assert fit.marginal.structure.sums == 1
    draws = fit.draw(400)
    walk = 0.5 * torch.ones(steps, steps, dtype=torch.float64).tril()
    covariance = walk @ walk.T + torch.eye(steps, dtype=torch.float64)
    seen = dist.MultivariateNormal(torch.zeros_like(covariance[0]), covariance)
    # The conditional is normal: every weight is the evidence.
    exact = np.full(draws.log_weights.shape, float(seen.log_prob(y.double())))
    np.testing.assert_allclose(draws.log_weights, exact, rtol=1e-6)
    z = torch.as_tensor(draws.z[0])
    np.testing.assert_allclose(fit.target.log_prob(z), draws.log_p[0], rtol=1e-6)
    log_q = fit.guide.log_prob(z.to(fit.target.dtype))
    np.testing.assert_allclose(log_q, draws.log_q[0], rtol=1e-5)
    mean = torch.linalg.solve(covariance, y.double()) @ walk
    sd = (1 - (walk * torch.linalg.solve(covariance, walk)).sum(0)).sqrt()
    assert (((z.mean(0) - mean) / sd).abs() < 4.5 / 20).all()


@pytest.mark.parametrize(
    "place",
    [
        "flowvi.initialization.marginal._ascend",
        "flowvi.initialization.marginal.curvature",
        "flowvi.fitting.conditionals.check_units",
    ],
)
def test_an_interrupt_within_a_start_or_a_check_leaves_a_result(
    place: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def pressed(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    # What a shell started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with monkeypatch.context() as patch:
        patch.setattr(place, pressed)
        fit = structured(beta_binomial)
    assert "interrupted" in fit.log[-1]
    draws = fit.draw(20)
    assert np.isfinite(draws.z).all() and np.isfinite(draws.log_weights).all()


def test_what_torch_cannot_do_leads_to_a_guide_of_all_latents(
    monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no second derivatives")

    monkeypatch.setattr(MarginalTarget, "evaluate", fails)
    monkeypatch.setattr("flowvi.fitting.fit_structured.FEWEST_UNITS", 2)
    fit = flowvi.fit(flowvi.from_pyro(beta_binomial), budget=10, progress=False)
    assert fit.log[0].startswith("no structured guide of")
    assert fit.log[0].endswith("no second derivatives")
    with pytest.raises(ModelError, match=r"cannot be integrated .* no second derivatives"):
        structured(beta_binomial)
