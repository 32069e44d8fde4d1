"""ArviZ opens what flowvi exports: every group, every name, before and after a file."""

import json
import math
from types import SimpleNamespace

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.compat.arviz_groups import group_names, has_trees, read_groups
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample
from flowvi.draws.sampling import draw
from flowvi.guides import MeanField
from flowvi.interop.inference_data import to_inference_data
from flowvi.targets import from_pyro

ROWS = 6


def regression(x, y):
    """A conjugate regression: posterior mean and variance of both are known."""
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        level = pyro.deterministic("level", slope * x)
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


@pytest.fixture
def target():
    x = torch.linspace(-1.0, 1.0, ROWS)
    target = from_pyro(regression, x, 0.5 * x + 0.1)
    target.coords["row"] = [f"r{i}" for i in range(ROWS)]
    return target


@pytest.fixture
def draws(target):
    """Two chains from the exact posterior."""
    x, y = target.constants["x"], target.observed["y"]
    precision = 1 + (x**2).sum()
    q = MeanField(1)
    q.start(((x * y).sum() / precision)[None], precision.rsqrt()[None, None])
    meta = {"guide": "meanfield", "seconds": 1.5, "interrupted": False, "flow": {"depth": 4}}
    return draw(target, [q, q], 300, meta=meta)


@pytest.fixture
def reopened(draws, tmp_path):
    """Everything, written to a file and read back."""
    idata = to_inference_data(draws, prior=20, predictive=True)
    idata.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    return read_groups(tmp_path / "posterior.nc")


def test_groups_survive_a_file(draws, reopened):
    sizes = {group: set(reopened[group].data_vars) for group in group_names(reopened)}

    assert sizes == {
        "posterior": {"slope", "level"},
        "posterior_predictive": {"y"},
        "log_likelihood": {"y"},
        "log_prior": {"slope"},
        "sample_stats": {"log_p", "log_q", "log_weight"},
        "prior": {"slope", "level"},
        "prior_predictive": {"y"},
        "observed_data": {"y"},
        "constant_data": {"x"},
    }
    np.testing.assert_array_equal(reopened.posterior["slope"], draws["slope"])
    np.testing.assert_array_equal(reopened.sample_stats["log_weight"], draws.log_weights)


def test_plates_are_dims_with_labels(reopened):
    for variable in (reopened.posterior["level"], reopened.log_likelihood["y"]):
        assert variable.dims == ("chain", "draw", "row")
        assert list(variable["row"].values) == [f"r{i}" for i in range(ROWS)]
    assert reopened.observed_data["y"].dims == ("row",)
    assert reopened.prior["slope"].shape == (1, 20)


def test_log_likelihood_is_that_of_the_model(draws, reopened):
    y = draws.target.observed["y"].numpy()
    expected = -((y - draws["level"]) ** 2) / 2 - math.log(2 * math.pi) / 2

    np.testing.assert_allclose(reopened.log_likelihood["y"], expected)


def test_attributes_survive_a_file(reopened):
    for group in group_names(reopened):
        attrs = reopened[group].attrs
        assert attrs["inference_library"] == "flowvi"
        assert attrs["verdict"] == "trust"
        assert attrs["sampling_time"] == 1.5
        assert attrs["interrupted"] == 0
        assert json.loads(attrs["flow"]) == {"depth": 4}
        assert isinstance(json.loads(attrs["reasons"]), list)
    assert "Jacobian" in reopened.sample_stats["log_p"].attrs["space"]


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ's plots
def test_arviz_works_on_it(reopened):
    summary = az.summary(reopened)
    loo = az.loo(reopened)
    predicted = az.plot_ppc_dist if has_trees() else az.plot_ppc
    axes = [
        az.plot_trace(reopened, var_names=["slope"]),
        az.plot_pair(reopened, var_names=["slope"]) if has_trees() else az.plot_pair(reopened),
        predicted(reopened, **{"num_samples" if has_trees() else "num_pp_samples": 10}),
    ]
    plt.close("all")

    assert summary.loc["slope", "r_hat"] < 1.05
    assert loo.n_data_points == ROWS
    assert len(axes) == 3


def test_groups_that_cost_are_optional(draws):
    idata = to_inference_data(draws, log_likelihood=False)

    assert "log_likelihood" not in group_names(idata)
    assert "prior" not in group_names(idata)
    assert "posterior_predictive" not in group_names(idata)


def test_resampled_draws_have_no_weights_but_keep_the_verdict(draws):
    idata = to_inference_data(resample(draws))

    assert set(idata.sample_stats.data_vars) == {"log_p", "log_q"}
    assert idata.posterior.attrs["resampled"] == 1
    assert idata.posterior.attrs["verdict"] == "trust"
    sizes = idata.posterior.sizes
    assert sizes["chain"] * sizes["draw"] == 600


def test_few_draws_are_exported_unjudged(draws):
    few = Draws(
        draws.z[:, :50],
        draws.log_p[:, :50],
        draws.log_q[:, :50],
        {name: value[:, :50] for name, value in draws.values.items()},
        draws.target,
    )

    assert "not judged" in to_inference_data(few).posterior.attrs["verdict"]


def awkward(values, dims, coords):
    """Draws of values (2, 100, ...) of a target whose names and dims clash."""
    target = SimpleNamespace(
        name="awkward",
        sites=dict.fromkeys(values),
        slices={},
        dims=dims,
        coords=coords,
        observed={},
        constants={},
        improper=(),
        dtype=torch.float64,
        device=torch.device("cpu"),
        chunk=lambda: 64,
        log_likelihood=lambda z: {},
    )
    zeros = np.zeros((2, 100))
    return Draws(np.zeros((2, 100, 1)), zeros, zeros, values, target)


VALUES = np.random.default_rng(0).normal(size=(2, 100, 12))
CLASHES = {
    "a slash": ({"a/b": VALUES[..., 0], "a_b": VALUES[..., 1]}, {}, {}),
    "spaces and Greek": ({"μ 1": VALUES[..., 0], "β.x": VALUES}, {"β.x": ("Größe/Art",)}, {}),
    "a dim of two sizes": (
        {"u": VALUES[..., :3], "v": VALUES[..., :5]},
        {"u": ("plate",), "v": ("plate",)},
        {"plate": ["a", "b", "c"]},
    ),
    "a dim twice": (
        {"cov": VALUES[..., :4].reshape(2, 100, 2, 2)},
        {"cov": ("city", "city")},
        {"city": ["Oslo", "Rome"]},
    ),
    "a dim named as a variable": ({"x": VALUES[..., :3]}, {"x": ("x",)}, {"x": [1, 2, 3]}),
    "a dim named as a lead": (
        {"chain": VALUES[..., :3], "draw": VALUES[..., 0]},
        {"chain": ("draw",)},
        {},
    ),
    "a dim named as a default": (
        {"x": VALUES[..., :3], "y": VALUES[..., :4]},
        {"y": ("x_dim_0",)},
        {},
    ),
    "labels of all kinds": (
        {"x": VALUES[..., :4]},
        {"x": ("k",)},
        {"k": [1, "b", None, (1, 2)]},
    ),
    "too few labels": ({"x": VALUES[..., :4]}, {"x": ("k",)}, {"k": ["one"]}),
    "flags": ({"on": VALUES[..., 0] > 0, "many": VALUES > 0}, {}, {}),
    "no elements": ({"none": VALUES[..., :0], "x": VALUES[..., 0]}, {}, {}),
}


@pytest.mark.filterwarnings("ignore:.*has no labels of:UserWarning")
@pytest.mark.parametrize("clash", CLASHES)
def test_awkward_names_survive_a_file(clash, tmp_path):
    values, dims, coords = CLASHES[clash]

    to_inference_data(awkward(values, dims, coords)).to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    posterior = az.from_netcdf(tmp_path / "x.nc", engine="h5netcdf").posterior

    found = {v.attrs.get("original_name", name): v for name, v in posterior.data_vars.items()}
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_dim_that_comes_twice_keeps_its_labels():
    values, dims, coords = CLASHES["a dim twice"]

    cov = to_inference_data(awkward(values, dims, coords)).posterior["cov"]

    assert all(list(cov[dim].values) == ["Oslo", "Rome"] for dim in cov.dims[2:])
