"""One guide for every data set of a model: densities, exactness, refusals, fallback."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.amortized import many
from flowvi.amortized.features import Features, Input
from flowvi.amortized.network import build
from flowvi.amortized.problem import Problem, Simulated
from flowvi.amortized.refine import WakeGradient
from flowvi.amortized.storage import load_guide
from flowvi.amortized.training import Plan
from flowvi.targets import ModelError
from flowvi.targets.precision import default_dtype

SPREAD, NOISE = 3.0, 2.0


def mean_model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, SPREAD))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def line_model(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def group_model(group, y):
    with pyro.plate("group", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(level[group].exp()), obs=y)


def schools_model(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, error), obs=effect)


def curve_model(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with pyro.plate("time", 6):
        pyro.sample("y", dist.Normal((-rate * torch.arange(6.0)).exp(), 0.1), obs=y)


def log_model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("log_y", dist.Normal(mean, 1.0), obs=y.log())


def amortize(model, *args, steps=200, **settings):
    plan = Plan(batch=64, lr=3e-3, warm_up=20, held_out=200)
    given = {"guide": "affine", "budget": None, "progress": False, "plan": plan, **settings}
    return flowvi.amortize(model, *args, steps=steps, **given)


@pytest.fixture(scope="module")
def mean_guide():
    with default_dtype(torch.float64):
        return amortize(mean_model, torch.zeros(10), steps=350)


@pytest.fixture(scope="module")
def line_guide():
    with default_dtype(torch.float64):
        return amortize(line_model, torch.linspace(-1.0, 1.0, 12), torch.zeros(12))


def exact(y):
    """Mean, sd and log evidence of `mean_model`."""
    n, y = len(y), torch.as_tensor(y).double()
    precision = 1 / SPREAD**2 + n / NOISE**2
    cov = NOISE**2 * torch.eye(n).double() + SPREAD**2
    evidence = torch.distributions.MultivariateNormal(torch.zeros(n).double(), cov).log_prob(y)
    return float(y.sum() / NOISE**2 / precision), precision**-0.5, float(evidence)


@pytest.mark.parametrize("rows", [5, 12, 20])
def test_weighted_draws_are_exact(mean_guide, rows):
    y = np.random.default_rng(rows).normal(2.0, NOISE, rows)

    draws = mean_guide.draw(y, 4000, seed=1)

    mean, sd, evidence = exact(y)
    found = flowvi.diagnose(draws)
    w = np.exp(draws.log_weights[0] - draws.log_weights.max())
    w /= w.sum()
    error = sd / math.sqrt(found.ess)
    assert found.verdict != "do not trust"
    assert abs(w @ draws["mean"][0] - mean) < 5 * error
    assert abs(math.sqrt(w @ (draws["mean"][0] - mean) ** 2) - sd) < 5 * error
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_se
    # The guide itself is near, without the weights.
    assert abs(draws["mean"].mean() - mean) < 0.5 * sd


def test_the_density_is_that_of_the_model(mean_guide, line_guide):
    rng = np.random.default_rng(0)
    for guide, model, data in (
        (mean_guide, mean_model, (rng.normal(size=7),)),
        (line_guide, line_model, (rng.normal(size=9), rng.normal(size=9))),
    ):
        draws = guide.draw(data, 50)
        target = flowvi.from_pyro(model, *data)

        z = torch.as_tensor(draws.z)
        assert np.allclose(draws.log_p, target.log_prob(z).numpy(), rtol=1e-9)
        assert np.allclose(draws.log_q, guide.log_prob(data, draws.z), rtol=1e-5)
        assert draws.dims == {n: target.dims[n] for n in draws.dims}
        assert {n: v.shape for n, v in draws.observed.items()} == {"y": data[-1].shape}


def test_the_order_of_rows_does_not_matter(line_guide):
    rng = np.random.default_rng(1)
    x, y, order = rng.normal(size=10), rng.normal(size=10), rng.permutation(10)
    z = rng.normal(size=(20, 2))

    one = line_guide.log_prob((x, y), z)
    two = line_guide.log_prob((x[order], y[order]), z)

    assert np.allclose(one, two, rtol=1e-9)
    assert not np.allclose(one, line_guide.log_prob((x, y[order]), z), rtol=1e-3)


def test_a_data_set_has_several_forms(line_guide):
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 8))
    wanted = line_guide.draw((x, y), 20).z

    for form in (
        {"x": x, "y": torch.as_tensor(y)},
        (torch.as_tensor(x), list(y)),
        pd.DataFrame({"y": y, "name": list("abcdefgh"), "x": x}),
    ):
        assert np.array_equal(line_guide.draw(form, 20).z, wanted)


def test_a_seed_gives_the_same_guide():
    guides = [
        amortize(mean_model, torch.zeros(4), steps=20, seed=seed).draw(np.ones(4), 10)
        for seed in (3, 3, 4)
    ]

    assert np.array_equal(guides[0].z, guides[1].z)
    assert not np.array_equal(guides[0].z, guides[2].z)


def test_saved_and_loaded(line_guide, tmp_path):
    data = (np.linspace(0, 1, 9), np.ones(9))
    line_guide.save(tmp_path / "guide")

    loaded = flowvi.load(tmp_path / "guide", line_model)

    one, two = line_guide.draw(data, 50), loaded.draw(data, 50)
    assert np.array_equal(one.z, two.z) and np.array_equal(one.log_p, two.log_p)
    assert one.meta == two.meta
    assert str(loaded) == str(line_guide)
    assert {path.suffix for path in (tmp_path / "guide").iterdir()} == {".json", ".safetensors"}
    with pytest.raises(flowvi.load.__globals__["CheckpointError"], match="site 'a'"):
        flowvi.load(tmp_path / "guide", lambda x, y: mean_model(y))
    with pytest.raises(ValueError, match="give load the model itself"):
        flowvi.load(tmp_path / "guide", flowvi.from_pyro(mean_model, torch.ones(3)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((np.zeros(5), np.zeros(4)), "differ in their number of rows: 'x' has 5, 'y' has 4"),
        ({"y": np.zeros(5)}, "lacks 'x'"),
        ({"x": np.zeros(5), "y": None}, "lacks 'y'"),
        ({"z": np.zeros(5)}, "'z', and none of the arguments"),
        ((np.zeros((5, 2)), np.zeros(5)), r"'x' has shape \(5, 2\).*reads \(rows,\)"),
        ((np.zeros(3), np.array([1.0, np.nan, 2.0])), "'y' has 1 values that are not finite"),
        ((np.zeros(3), ["a", "b", "c"]), "'y' of a data set must be an array of numbers"),
        ((1, 2, 3), "tuple of at most 2 arguments"),
    ],
)
def test_bad_data_are_refused_in_a_sentence(line_guide, data, words):
    with pytest.raises((ValueError, TypeError), match=words):
        line_guide.draw(data, 10)


def test_data_of_another_size_are_refused_where_rows_have_latents():
    guide = amortize(schools_model, torch.zeros(4), torch.ones(4), steps=2)

    with pytest.raises(ValueError, match=r"Site 'theta' has a value for each row: amortize again"):
        guide.draw((np.zeros(5), np.ones(5)), 10)


def improper_model(y):
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


def lagged_model(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("time", len(y) - 1):
        pyro.sample("y", dist.Normal(slope * y[:-1], 1.0), obs=y[1:])


def parameter_model(y):
    scale = pyro.param("scale", torch.tensor(1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


class Unsampled(dist.Normal):
    def rsample(self, sample_shape=()):
        raise NotImplementedError

    sample = rsample

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self.__new__(Unsampled))


def unsampled_model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", Unsampled(mean, 1.0), obs=y)


def subsampled_model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


@pytest.mark.parametrize(
    ("model", "args", "settings", "words"),
    [
        (improper_model, 3, {}, "The prior of 'mean' is improper"),
        (lagged_model, 6, {}, "'y' is observed, and enters the density elsewhere"),
        (parameter_model, 3, {}, "has parameters of its own"),
        (unsampled_model, 3, {}, "Site 'y' cannot be simulated"),
        (subsampled_model, 4, {}, "Plate 'row' is subsampled"),
        (lambda y: pyro.sample("a", dist.Normal(0.0, 1.0)), 3, {}, "observes nothing"),
        (partial(schools_model, error=torch.ones(70)), 70, {}, "Site 'theta'.*local='school'"),
        (partial(schools_model, error=1.0), 4, {"rows": (2, 8)}, "Site 'theta' has a value"),
        (curve_model, 6, {"rows": (2, 8)}, "the order of the rows of curve_model"),
        (mean_model, 4, {"rows": (8, 2)}, "rows must be two numbers"),
        (mean_model, 4, {"covariates": "free"}, "covariates must be a function"),
        (mean_model, 4, {"covariates": lambda rows: {"u": 1}}, "'u', which is no argument"),
        (mean_model, 4, {"encoder": torch.nn.Flatten()}, "encoder must map"),
    ],
)
def test_models_are_refused_in_a_sentence(model, args, settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        amortize(model, torch.ones(args), steps=1, **settings)


@pytest.mark.parametrize(
    ("model", "args", "exchangeable", "varying", "rows"),
    [
        (mean_model, (torch.zeros(10),), True, [], (5, 20)),
        (line_model, (torch.linspace(0, 1, 10), torch.zeros(10)), True, ["x"], (5, 20)),
        (group_model, (torch.arange(12) % 3, torch.ones(12)), True, ["group"], (6, 24)),
        (schools_model, (torch.zeros(8), torch.ones(8)), False, ["error"], (8, 8)),
        (curve_model, (torch.zeros(6),), False, [], (6, 6)),
        (log_model, (torch.ones(6),), True, [], (3, 12)),
    ],
)
def test_what_varies_is_found(model, args, exchangeable, varying, rows):
    problem = Problem(model, args, {})

    assert problem.exchangeable == exchangeable
    assert problem.varying == varying
    assert problem.rows == rows


def test_latents_and_data_are_drawn_together():
    problem = Problem(line_model, (torch.linspace(-1, 1, 6), torch.zeros(6)), {}, rows=(6, 6))

    pairs = problem.simulate(4000, 0)

    a, b = pairs.z.T
    rest = pairs.data["y"] - (a[:, None] + b[:, None] * pairs.data["x"])
    # Standard normal: the mean of S draws is within 5 / sqrt(S).
    for column in (a, b, rest[:, 2]):
        assert abs(float(column.mean())) < 5 / 4000**0.5
        assert abs(float(column.var()) - 1) < 5 * (2 / 4000) ** 0.5


def test_derived_data_are_read_as_the_model_derives_them():
    guide = amortize(log_model, torch.ones(6), steps=2)
    y = np.array([1.0, 2.0, 5.0])

    draws = guide.draw(y, 10)

    target = flowvi.from_pyro(log_model, torch.as_tensor(y))
    assert np.allclose(draws.log_p, target.log_prob(torch.as_tensor(draws.z)).numpy())
    assert np.array_equal(draws.z, guide.draw({"log_y": np.log(y)}, 10).z)


def test_a_far_data_set_is_not_trusted_and_fitted_by_itself(mean_guide, tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    near, far = rng.normal(1.0, NOISE, 10), rng.normal(60.0, NOISE, 10)
    found = flowvi.diagnose(mean_guide.draw(far, 500))
    assert found.verdict == "do not trust"
    assert "unlike all 2000 simulated ones" in found.reasons[0]
    assert not mean_guide.unlike(near).beyond
    large = flowvi.diagnose(mean_guide.draw(rng.normal(1.0, NOISE, 50), 500))
    assert large.verdict == "do not trust"
    assert "has 50 rows, and is unlike all simulated ones, which had 5 to 20" in large.reasons[0]

    file = tmp_path / "many.npz"
    fits = mean_guide.fit_many([near, far, np.ones((2, 2))], n=500, file=file, progress=False)

    assert [line.method for line in fits.lines] == ["guide", "fit", "failed"]
    assert fits.trusted.tolist() == [True, True, False]
    mean, sd, evidence = exact(far)
    assert abs(fits[1]["mean"].mean() - mean) < 5 * sd / 500**0.5
    assert abs(fits.lines[1].log_evidence - evidence) < 5 * fits.lines[1].log_evidence_se + 1e-6
    assert "shape (2, 2)" in fits.lines[2].reason
    assert "2 of 3 data sets trusted" in str(fits)

    # A later call reads the file, and fits nothing.
    monkeypatch.setattr(many, "run_task", None)
    again = mean_guide.fit_many([near, far, np.ones((2, 2))], n=500, file=file, progress=False)
    assert again.verdicts == fits.verdicts
    assert np.array_equal(again[1].z, fits[1].z) and np.array_equal(again[0].z, fits[0].z)
    with pytest.raises(ValueError, match="another call of fit_many"):
        mean_guide.fit_many([near], n=400, file=file, progress=False)


def test_a_fit_starts_from_the_guide(mean_guide):
    y = np.random.default_rng(5).normal(1.0, NOISE, 10)

    fit = mean_guide.fit(y, progress=False)

    assert fit.log[0] == "start: the given draws; no other places are searched"
    assert fit.meta["check"]["verdict"] == "trust"
    far = mean_guide.fit(np.full(10, 1e4), progress=False)
    assert "the given draws are not near the posterior" in far.log[0]
    assert far.meta["check"]["verdict"] == "trust"


def test_ranks_are_uniform(mean_guide):
    found = flowvi.sbc(mean_guide, fits=200, draws=600, levels=63, progress=False)

    assert min(found.uniform.values()) > 0.001
    assert found.trusted > 0.9
    plain, weighted = found.coverage([0.5, 0.9])
    for shares in (plain, weighted):
        assert np.all(np.abs(shares[:, 0] - [0.5, 0.9]) < 5 * np.sqrt([0.25, 0.09]) / 200**0.5)
    # 1 - posterior / prior variance: rows from 5 to 20.
    assert np.all((found.recovery.contraction > 0.8) & (found.recovery.contraction < 1))
    assert abs(found.recovery.z_scores.std() - 1) < 5 * (0.5 / 200) ** 0.5


def test_a_guide_that_is_off_is_seen(mean_guide):
    wrong = flowvi.AmortizedGuide(**{**vars(mean_guide), "meta": dict(mean_guide.meta)})
    scale = wrong.network.scale.clone()
    try:
        wrong.network.scale.mul_(0.7)
        assert flowvi.sbc(wrong, fits=150, draws=200, progress=False).uniform["plain"] < 1e-3
    finally:
        wrong.network.scale.copy_(scale)


def test_real_data_sets_refine_a_guide(monkeypatch):
    guide = amortize(mean_model, torch.zeros(10), steps=15)
    # Far from where most simulated data sets lie.
    sets = [np.random.default_rng(i).normal(11.0, NOISE, 8 + i) for i in range(6)]
    first = [p.clone() for p in guide.network.parameters()]

    better = guide.refine(sets, steps=120, draws=64, progress=False)

    shares = [float(flowvi.diagnose(g.draw(sets[0], 2000)).ess) / 2000 for g in (guide, better)]
    assert shares[0] < 0.9 and shares[1] > 0.95
    assert better.log[-1].startswith("refined on 6 data sets in 120 steps: ")
    assert better.log[-1].endswith("kept") and better.meta["refined"]["data sets"] == 6
    assert all(torch.equal(p, q) for p, q in zip(guide.network.parameters(), first, strict=True))
    # Plain draws are near the exact posterior, too.
    mean, sd, _ = exact(sets[0])
    errors = [abs(g.draw(sets[0], 2000)["mean"].mean() - mean) / sd for g in (guide, better)]
    assert errors[1] < errors[0]
    # More steps on simulated pairs alone bring less.
    monkeypatch.setattr(WakeGradient, "_weighted", lambda self, data: torch.zeros(()))
    asleep = guide.refine(sets, steps=120, draws=64, progress=False)
    assert float(flowvi.diagnose(asleep.draw(sets[0], 2000)).ess) / 2000 < 0.9
    with pytest.raises(ValueError, match="refine needs data sets; got none"):
        guide.refine([])


def test_a_refinement_that_brings_nothing_is_dropped(mean_guide, monkeypatch):
    monkeypatch.setattr("flowvi.amortized.refine.SLOWER", 30.0)
    sets = [np.random.default_rng(i).normal(0.5, NOISE, 10) for i in range(3)]

    same = mean_guide.refine(sets, steps=30, draws=16, progress=False)

    assert same.network is mean_guide.network and "dropped" in same.log[-1]


def test_axes_and_their_labels_have_names(tmp_path):
    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    labels = {"coef": ["age", "dose"], "row": [f"r{i}" for i in range(8)]}
    guide = amortize(
        model, torch.eye(8, 2), torch.zeros(8), steps=2, dims={"beta": "coef"}, coords=labels
    )
    guide.save(tmp_path / "guide")
    for one in (guide, flowvi.load(tmp_path / "guide", model)):
        idata = flowvi.to_inference_data(one.draw((torch.ones(8, 2), torch.ones(8)), 50))
        assert idata.posterior["beta"].dims == ("chain", "draw", "coef")
        assert idata.posterior["coef"].values.tolist() == ["age", "dose"]
        assert idata.observed_data["row"].values.tolist() == labels["row"]
        # Data sets of another size have no labels of the example's rows.
        fewer = flowvi.to_inference_data(one.draw((torch.ones(5, 2), torch.ones(5)), 50))
        assert fewer.posterior["coef"].values.tolist() == ["age", "dose"]
        assert fewer.observed_data["row"].values.tolist() == [*range(5)]
    with pytest.raises(ValueError, match="No dim named 'coefs'"):
        amortize(model, torch.eye(8, 2), torch.zeros(8), coords={"coefs": ["age", "dose"]})


def test_own_covariates_and_encoder(tmp_path):
    class Sums(torch.nn.Module):
        def forward(self, data):
            return torch.stack([data["y"].sum(1), (data["x"] * data["y"]).sum(1)], -1)

    guide = amortize(
        line_model,
        torch.zeros(5),
        torch.zeros(5),
        steps=3,
        covariates=lambda rows: {"x": 10 + torch.randn(rows)},
        encoder=Sums(),
    )

    sets, truth = guide.simulate(50, 0)
    assert {len(one["x"]) for one in sets} <= set(range(2, 11))
    assert abs(np.concatenate([one["x"] for one in sets]).mean() - 10) < 1
    assert truth["a"].shape == (50,)
    assert np.isfinite(guide.draw(sets[0], 20).log_p).all()

    # The function is not saved: without it the guide draws, and simulates nothing.
    folder = guide.save(tmp_path / "guide")
    loaded = load_guide(folder, line_model, Sums())
    assert np.array_equal(loaded.draw(sets[0], 20).z, guide.draw(sets[0], 20).z)
    with pytest.raises(ModelError, match="function that was not saved with the guide"):
        loaded.simulate(2)
    again = load_guide(folder, line_model, Sums(), lambda rows: {"x": 10 + torch.randn(rows)})
    assert len(again.simulate(2)[0]) == 2


def test_fixed_covariates_are_those_of_the_example():
    guide = amortize(line_model, torch.ones(4), torch.zeros(4), steps=2, covariates="fixed")

    assert np.isfinite(guide.draw(np.zeros(4), 5).log_p).all()
    with pytest.raises(ValueError, match="'x' differs from the example's"):
        guide.draw((np.zeros(4), np.zeros(4)), 5)


def test_groups_of_rows_are_told_apart():
    guide = amortize(group_model, torch.arange(12) % 3, torch.ones(12), steps=200)
    group, y = np.arange(12) % 3, np.where(np.arange(12) % 3 == 1, 9.0, 0.0)

    level = guide.draw((group, y), 500)["level"].mean((0, 1))

    assert level[1] > 1 > 0 > max(level[0], level[2])


def test_single_precision():
    with default_dtype(torch.float32):
        guide = amortize(mean_model, torch.zeros(6), steps=60)
        y = np.ones(6, dtype=np.float32)
        draws = guide.draw(y, 200)

        assert guide.network.dtype == torch.float32
        target = flowvi.from_pyro(mean_model, torch.as_tensor(y))
        found = target.log_prob(torch.as_tensor(draws.z).double()).numpy()
        assert np.allclose(draws.log_p, found, rtol=1e-9)
        assert np.allclose(draws.log_q, guide.log_prob(y, draws.z), atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_features_are_finite_over_orders_of_magnitude(size):
    features = Features(Input("y", (2,), False)).double()
    y = size * torch.randn(500, 2).double().exp()
    features.fit(y)

    found = features(torch.cat([y, 1e6 * y, -y, 0 * y]))

    assert bool(found.isfinite().all())
    assert bool((features(y).abs() < 20).all())
    assert bool((features(y).std(0) > 0.2).all())


def test_a_network_starts_at_the_regression():
    problem = Problem(mean_model, (torch.zeros(10),), {})
    pairs = problem.simulate(2000, 0)

    network = build(problem, pairs, "affine")[0]

    # The exact posterior has the loss of its entropy; the prior, that of a normal of width 3.
    y = np.random.default_rng(0).normal(2.0, NOISE, 10)
    mean, sd, _ = exact(y)
    data = {"y": torch.as_tensor(y)[None]}
    points = torch.tensor([mean, mean + 2 * sd], dtype=torch.float64)
    with torch.no_grad():
        found = [float(network.log_prob(Simulated(z.reshape(1, 1), data))) for z in points]
    wanted = torch.distributions.Normal(mean, sd).log_prob(points).tolist()
    assert np.allclose(found, wanted, atol=0.7)
    prior = torch.distributions.Normal(0.0, SPREAD).log_prob(points).tolist()
    assert found[0] > prior[0] + 0.5
