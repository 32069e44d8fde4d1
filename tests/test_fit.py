"""A fit is reproducible, is never worse than its Gaussian start, and keeps what was computed."""

import math
import re
from pathlib import Path

import families
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from quick import quick
from torch.distributions import MultivariateNormal

import flowvi
from flowvi.guides import Guide
from flowvi.initialization import candidates
from flowvi.initialization import gaussian as gaussians
from flowvi.training import schedule, trainer
from flowvi.training.averaging import Average
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import decayed


def correlated_normal() -> flowvi.Target:
    """A normal with standard deviations from 1e-3 to 1e3 and log evidence 0.7."""
    scale = torch.tensor([1e-3, 1.0, 1e3])
    correlation = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, -0.3], [0.0, -0.3, 1.0]])
    q = MultivariateNormal(torch.tensor([5.0, 0.0, -2e3]), correlation * scale * scale[:, None])
    return flowvi.from_density(lambda v: q.log_prob(v["x"]) + 0.7, {"x": flowvi.Site((3,))})


def banana() -> flowvi.Target:
    def log_prob(values: dict[str, torch.Tensor]) -> torch.Tensor:
        x, y = values["x"]
        return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x**2, 0.3).log_prob(y)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def test_the_gaussian_start_is_exact_for_a_normal_on_six_decades():
    target = correlated_normal()

    found = candidates.best_gaussian(target, 0, False, lambda line: None).best

    assert found.elbo == pytest.approx(0.7, abs=1e-6)
    assert found.loc[2].item() == pytest.approx(-2e3, abs=1.0)


@pytest.mark.parametrize("guide", ["auto", "fullrank", "realnvp", "spline"])
def test_a_fit_of_a_normal_has_its_evidence(guide):
    fit = flowvi.fit(correlated_normal(), guide, steps=30, progress=False)

    diagnosis = flowvi.diagnose(fit.draw(1000))

    assert diagnosis.elbo == pytest.approx(0.7, abs=1e-4)
    assert diagnosis.verdict == "trust"


@pytest.mark.parametrize("name", [*families.GUIDES, *families.FLOWS])
def test_every_guide_is_at_least_as_good_as_its_gaussian_start(name, brief):
    """By draws of the trained guide and of the same one as it began; and flows have learnt."""
    target, guide = banana(), families.make_guide(name, 2)

    fit = flowvi.fit(target, guide, steps=30, lr=1e-2, progress=False)

    guide.start(fit.start.loc, fit.start.scale_tril)
    gain = log_weights(target, fit.guide) - log_weights(target, guide)
    mean, error = gain.mean().item(), gain.std().item() / len(gain) ** 0.5
    assert mean > -4.5 * error - 1e-6
    if name in LEARNERS:
        assert mean > 4.5 * error


# Flows that bend a normal into a banana within thirty steps.
LEARNERS = {"planar", "realnvp", "realnvp_clamped"}


def log_weights(target: flowvi.Target, guide: Guide) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        z, log_q = guide.sample((4000,))
        return target.log_prob(z) - log_q


def test_a_flow_fits_what_a_gaussian_cannot():
    target = banana()

    gaussian = flowvi.fit(target, "fullrank", steps=50, progress=False)
    flow = flowvi.fit(target, steps=250, lr=3e-3, progress=False)

    assert gaussian.bounds[0] < -0.5
    assert -0.05 < flow.bounds[0] < 0.02


@pytest.mark.slow
def test_many_skewed_dimensions_take_skews_on_a_gaussian_that_is_held():
    """Of 310 Gumbel variables, log Z = 0; the networks of a flow would have to learn each skew."""

    def gumbel(v):
        return -(v["x"] + (-v["x"]).exp()).sum()

    target = flowvi.from_density(gumbel, {"x": flowvi.Site((310,))})
    fit = flowvi.fit(target, steps=200, progress=False)

    start = flowvi.diagnose(fit.draw_start(1000))
    assert start.gap > 10
    assert fit.meta["guide"] == "skewed"
    assert fit.bounds[0] > -3
    assert fit.bounds[0] < 0


SHORT = {"steady_steps": 20, "few_steps": 20, "most_stages": 1, "least_decay": 20}


@pytest.mark.slow
@pytest.mark.parametrize("further, expected", [(0.2, "skewed"), (1e3, "realnvp")])
def test_skews_are_added_to_couplings_where_they_get_further(further, expected, brief, monkeypatch):
    """Student's t in every coordinate; and the same where the couplings are to be far behind."""
    quick(monkeypatch, steady_steps=20, most_stages=1, further=further, least_decay=20)

    def density(v):
        return -1.5 * (1 + v["x"].square() / 2).log().sum()

    target = flowvi.from_density(density, {"x": flowvi.Site((20,))})
    fit = flowvi.fit(target, escalate=False, progress=False)

    assert fit.meta["guide"] == expected
    assert sum(line.startswith("learning rate") for line in fit.log) == 2
    assert sum("more steps" in line for line in fit.log) == 2
    assert f"guide: {expected}, the better of these trials" in fit.log


def test_training_begins_where_the_best_trial_of_a_step_size_led(brief, monkeypatch):
    quick(monkeypatch, **SHORT, convincing=math.inf)

    fit = flowvi.fit(banana(), "realnvp", progress=False)

    (trials,) = (line for line in fit.log if line.startswith("learning rate"))
    (stage,) = (line for line in fit.log if line.startswith("stage 1"))
    tried = {float(lr): float(bound) for lr, bound in re.findall(r"([\d.]+): (-?[\d.]+)", trials)}
    assert set(tried) == set(schedule.DEFAULT.rates)
    assert float(re.search(r"start (-?[\d.]+)", stage)[1]) == max(tried.values())
    assert fit.meta["lr"] == [max(tried, key=lambda lr: tried[lr])]


def test_trials_of_step_sizes_keep_to_their_share_of_the_budget(brief, monkeypatch):
    """Of none at all, each ends after its first step."""
    quick(monkeypatch, **SHORT, trial_share=0.0)
    taken, step = [], trainer.Trainer._step
    monkeypatch.setattr(
        trainer.Trainer, "_step", lambda self, *args: taken.append(1) or step(self, *args)
    )

    fit = flowvi.fit(banana(), "realnvp", progress=False, budget=1000)

    assert len(taken) - fit.meta["steps"] == len(schedule.DEFAULT.rates)


@pytest.mark.parametrize("objective", ["elbo", "iwelbo", "renyi"])
def test_every_objective_fits_by_name(objective, brief):
    fit = flowvi.fit(banana(), objective=objective, steps=20, progress=False)

    assert math.isfinite(fit.bounds[0])
    assert len(fit.history["bound"]) == 20


def test_given_draws_are_fitted_by_forward_kl(brief):
    z = torch.randn(500, 2) * torch.tensor([1.0, 2.0])
    objective = flowvi.OBJECTIVES["forward_kl"](z)

    fit = flowvi.fit(banana(), "meanfield", objective, steps=600, lr=0.1, progress=False)

    torch.testing.assert_close(
        torch.as_tensor(fit.draw(4000).z[0].std(0)), z.std(0), rtol=0.05, atol=0.0
    )


def test_a_seed_gives_the_same_bits_and_leaves_the_callers_generator_alone(brief):
    target = banana()
    before = torch.get_rng_state()

    first, second = (flowvi.fit(target, steps=20, progress=False, seed=3) for _ in range(2))

    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first.draw(50).z, second.draw(50).z)
    assert np.array_equal(first.history["bound"], second.history["bound"])


def test_restarts_are_chains(brief):
    fit = flowvi.fit(banana(), steps=10, restarts=3, progress=False)

    draws = fit.draw(20)

    assert draws.z.shape == (3, 20, 2)
    assert list(np.unique(fit.history["restart"])) == [0, 1, 2]
    assert not np.array_equal(draws.z[0], draws.z[1])


def test_an_interrupt_returns_what_there_is(brief):
    def interrupt(step: flowvi.Step) -> None:
        if step.step == 7:
            raise KeyboardInterrupt

    fit = flowvi.fit(banana(), steps=500, progress=False, callback=interrupt)

    assert fit.meta["interrupted"]
    assert len(fit.history["bound"]) == 7
    assert np.isfinite(fit.draw(10).log_p).all()


def test_a_callback_sees_every_step_and_can_stop(brief):
    seen = []

    def stop_at_five(step: flowvi.Step) -> bool:
        seen.append(step.step)
        return step.step == 5

    fit = flowvi.fit(banana(), steps=500, progress=False, callback=stop_at_five)

    assert seen == [1, 2, 3, 4, 5]
    assert any("callback" in line for line in fit.log)


def test_a_mode_that_the_search_saw_and_the_guide_left_out_is_no_secret():
    def log_prob(values: dict[str, torch.Tensor]) -> torch.Tensor:
        a, b = values["x"]
        return -(a**4) + 12 * a**2 - 0.5 * b**2

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})

    diagnosis = flowvi.diagnose(flowvi.fit(target, "fullrank", steps=100, progress=False).draw())

    assert diagnosis.verdict == "do not trust"
    assert "found another mode that the guide leaves out" in diagnosis.reasons[0]


def test_components_that_collapse_are_reported(brief):
    target = flowvi.from_density(lambda v: -0.5 * v["x"].square().sum(), {"x": flowvi.Site((2,))})

    fit = flowvi.fit(target, "mixture", steps=5, progress=False)

    assert any("collapsed onto each other" in line for line in fit.log)


def test_parameters_of_the_model_are_trained(brief):
    """Empirical Bayes: y = theta + noise, so the best prior mean is the mean of y."""
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def model() -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("row", 4):
            theta = pyro.sample("theta", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    target = flowvi.from_pyro(model)

    flowvi.fit(target, "fullrank", steps=400, lr=0.05, progress=False)

    (mean,) = target.parameters()
    assert mean.item() == pytest.approx(2.5, abs=0.05)


def test_restarts_that_would_share_the_models_parameters_are_refused():
    def model() -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        theta = pyro.sample("theta", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"parameters of its own.*restarts must be 1, got 2"):
        flowvi.fit(flowvi.from_pyro(model), restarts=2, progress=False)


def test_minibatches_reach_the_posterior_of_all_rows(brief):
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(200, generator=generator) + 1.5

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("row", 200, subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    target = flowvi.from_pyro(model)

    draws = flowvi.fit(target, "fullrank", steps=300, progress=False).draw(4000)

    sd = 1 / math.sqrt(200 + 0.01)
    mean = float(y.sum()) * sd**2
    exact = MultivariateNormal(torch.zeros(200), torch.eye(200) + 100 * torch.ones(200, 200))
    found = flowvi.diagnose(draws)
    weights = np.exp(draws.log_weights - draws.log_weights.max()).reshape(-1)
    weights /= weights.sum()
    effective, mu = 1 / np.square(weights).sum(), draws["mu"].reshape(-1)
    # Weights are of all rows: they make exact what noise of minibatches has left.
    assert found.verdict == "trust" and effective > 2000
    rounding = 1e-10
    error = abs(found.log_evidence - float(exact.log_prob(y)))
    assert error < 4.5 * found.log_evidence_se + rounding
    assert abs(weights @ mu - mean) < 4.5 * sd / effective**0.5
    spread = math.sqrt(weights @ np.square(mu - mean))
    assert abs(spread / sd - 1) < 4.5 / math.sqrt(2 * effective)


def test_an_importance_weighted_bound_on_a_subsampled_plate_is_refused():
    y = torch.ones(10)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 10, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match=r"'row' is subsampled.*not be a bound"):
        flowvi.fit(flowvi.from_pyro(model), objective=flowvi.iwelbo(5), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guide": "nvp"}, "No guide named 'nvp'.*Choose from .*realnvp"),
        ({"objective": "elb"}, "No objective named 'elb'.*Choose from .*elbo"),
        ({"objective": "forward_kl"}, "forward_kl needs draws"),
        ({"objective": 3}, "objective must be one such as elbo"),
        ({"steps": 0}, "steps must be .* at least 1; got 0"),
        ({"particles": 0}, "particles must be .* at least 1; got 0"),
        ({"restarts": -1}, "restarts must be .* at least 1; got -1"),
        ({"lr": float("nan")}, "lr must be a positive number; got nan"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"seed": -5}, "seed must be .* at least 0; got -5"),
        ({"guide": flowvi.MeanField(7)}, "D = 7 but .* has D = 2"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        flowvi.fit(banana(), **arguments, progress=False)


def test_a_wall_of_infinite_density_is_skipped_and_counted():
    def log_prob(values: dict[str, torch.Tensor]) -> torch.Tensor:
        x = values["x"]
        return torch.where(x < 2.5, dist.Normal(0.0, 1.0).log_prob(x), -torch.inf)

    fit = flowvi.fit(
        flowvi.from_density(log_prob, {"x": flowvi.Site()}), "fullrank", steps=50, progress=False
    )

    assert fit.meta["skipped"] == fit.history["skipped"].sum() > 0
    assert np.isfinite(fit.draw(10).z).all()


# The parts.


def test_laplace_at_the_mode_of_a_normal_is_the_normal():
    target = correlated_normal()

    found = candidates.laplace(target, torch.tensor([5.0, 0.1, -1990.0]), "test")

    expected = torch.tensor([1e-3, 1.0, 1e3])
    torch.testing.assert_close(found.scale_tril.norm(dim=1), expected, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.loc, torch.tensor([5.0, 0.0, -2e3]), rtol=1e-3, atol=1e-3)


def test_laplace_is_a_normal_where_differences_are_beyond_all_measure(monkeypatch):
    """As in the neck of a funnel, where a step ended among gradients of 1e264.

    Of such matrices LAPACK finds no eigenvectors in two of three cases.
    """
    target = flowvi.from_density(lambda v: -v["x"].square().sum(), {"x": flowvi.Site((10,))})
    for seed in range(20):
        torch.manual_seed(seed)
        precision = torch.eye(10)
        precision[0, 2:] = precision[2:, 0] = -0.35355
        precision[1] = precision[:, 1] = 1e258 * torch.randn(10)
        precision[1, 1] = 1.0
        monkeypatch.setattr(gaussians, "hessian", lambda target, z, found=-precision: found)

        laplace = candidates.laplace(target, torch.ones(10), "test")

        assert laplace.loc.isfinite().all()
        assert laplace.scale_tril.isfinite().all()


def test_the_guard_skips_what_is_not_finite_and_clips_what_is_too_long():
    guard = Guard()
    for _ in range(30):
        assert guard.admits(0.0, torch.ones(4))[0]

    long = torch.full((4,), 3.0)
    admitted, norm = guard.admits(0.0, long)
    assert admitted
    assert norm == pytest.approx(6.0)
    assert long.norm().item() == pytest.approx(4.0)
    huge = torch.full((4,), 100.0)
    assert guard.admits(0.0, huge)[0]
    assert huge.norm().item() == pytest.approx(4.0)
    assert not guard.admits(math.nan, torch.ones(4))[0]
    assert not guard.admits(0.0, torch.tensor([math.inf]))[0]
    assert guard.skipped == 2


def test_the_step_size_warms_up_and_decays():
    rates = [decayed(i, 1000, 1.0) for i in range(1000)]

    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)


def test_the_average_is_the_mean():
    average = Average()
    vectors = torch.randn(5, 3)

    for v in vectors:
        average.add(v)

    torch.testing.assert_close(average.mean, vectors.mean(0))


# Files.


def test_a_saved_fit_draws_the_same(tmp_path, brief):
    target = banana()
    fit = flowvi.fit(target, steps=20, restarts=2, progress=False)

    fit.save(tmp_path / "fit")
    again = flowvi.load(tmp_path / "fit", banana())

    assert np.array_equal(fit.draw(50, seed=1).z, again.draw(50, seed=1).z)
    assert again.meta == fit.meta
    assert again.log == fit.log
    assert np.array_equal(again.history["bound"], fit.history["bound"])


def test_a_guide_of_ones_own_is_loaded_into_one_of_the_same_build(tmp_path, brief):
    target = banana()
    guide = flowvi.FlowGuide(2, flowvi.FLOWS["realnvp"](2, depth=2, hidden=8))
    fit = flowvi.fit(target, guide, steps=20, progress=False)
    fit.save(tmp_path / "fit")

    with pytest.raises(ValueError, match="guide of your own making"):
        flowvi.load(tmp_path / "fit", target)
    again = flowvi.load(tmp_path / "fit", target, guide)

    assert np.array_equal(fit.draw(50).z, again.draw(50).z)


def _guide(folder: Path) -> Path:
    (file,) = folder.glob("guide_0-*.safetensors")
    return file


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "fit.json").unlink(), "holds no fit.json"),
        (lambda f: (f / "fit.json").write_text("{"), "not a file that flowvi wrote"),
        (lambda f: (f / "fit.json").write_text('{"format": 99}'), "has format 99"),
        (lambda f: _guide(f).write_bytes(b""), r"empty \(0 bytes\)"),
        (lambda f: _truncate(_guide(f)), "100 bytes where .* were written"),
        (lambda f: _flip(_guide(f)), "another checksum"),
        (lambda f: _guide(f).unlink(), "is missing"),
    ],
)
def test_a_damaged_folder_is_refused_by_file(tmp_path, brief, harm, message):
    target = correlated_normal()
    flowvi.fit(target, "meanfield", steps=2, progress=False).save(tmp_path)

    harm(tmp_path)

    with pytest.raises(ValueError, match=message):
        flowvi.load(tmp_path, target)


def test_a_fit_of_another_model_is_refused_by_site(tmp_path, brief):
    flowvi.fit(correlated_normal(), "meanfield", steps=2, progress=False).save(tmp_path)

    with pytest.raises(ValueError, match=r"another model: site 'x'"):
        flowvi.load(tmp_path, banana())
