"""ArviZ's statistics and plots are right on what a fit gives, its files lose nothing."""

import importlib.util
import math

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import flowvi
from flowvi.compat.arviz_groups import group_names, has_trees, read_groups, to_dataset
from flowvi.compat.netcdf import write_groups
from flowvi.draws.resampling import resample
from flowvi.draws.sampling import draw
from flowvi.guides import FullRank
from flowvi.interop.read_draws import draws_of

ROWS = 12
FORMATS = ["nc", "zarr"] if importlib.util.find_spec("zarr") else ["nc"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping",  # ArviZ's plots, and how it calls others
    "ignore::DeprecationWarning:arviz",
    "ignore::FutureWarning:arviz",
)


def line(x, y, flat=False):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 2.0))
    level = pyro.sample("level", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("row", len(y)):
        mean = pyro.deterministic("mean", level + (0.0 if flat else 1.0) * slope * x)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def data():
    x = torch.linspace(-1.0, 1.0, ROWS, dtype=torch.float64)
    noise = torch.tensor([0.3, -0.6, 0.2, 0.9, -0.4, 0.1, -0.2, 0.5, -0.8, 0.4, 0.0, -0.3])
    return x, 0.8 * x + 0.5 + 0.7 * noise.double()


def exact(x, y, rows=slice(None)):
    """Mean and covariance of (slope, level) given some rows."""
    design = torch.stack([x, torch.ones_like(x)], -1)[rows]
    covariance = torch.linalg.inv(design.mT @ design / 0.25 + torch.eye(2).double() / 4.0)
    return covariance @ design.mT @ y[rows] / 0.25, covariance


def exact_loo(x, y, out=True):
    """Log predictive density of each row given the others, or given all."""
    found = []
    for n in range(ROWS):
        mean, covariance = exact(x, y, [i for i in range(ROWS) if i != n or not out])
        row = torch.stack([x[n], torch.ones(()).double()])
        sd = (row @ covariance @ row + 0.25).sqrt()
        found.append(dist.Normal(row @ mean, sd).log_prob(y[n]).item())
    return np.array(found)


def table(width=1.2, shift=0.1, flat=False, n=4000):
    """Two chains of draws of a guide that is off by a known amount."""
    x, y = data()
    target = flowvi.from_pyro(line, x, y, flat).label({"row": [f"r{i}" for i in range(ROWS)]})
    mean, covariance = exact(0.0 * x if flat else x, y)
    guide = FullRank(2)
    guide.start(mean + shift, width * torch.linalg.cholesky(covariance))
    return draw(target, [guide, guide], n // 2, seed=1, meta={"guide": "fullrank", "seed": 1})


@pytest.fixture(scope="module")
def draws():
    return table()


@pytest.fixture(scope="module")
def idata(draws):
    rows = [f"new {i}" for i in range(3)]
    new = {"y": np.zeros((*draws.log_p.shape, 3))}
    return flowvi.to_inference_data(
        draws,
        prior=50,
        predictive=True,
        predictions=new,
        dims={"y": ["row"]},
        coords={"row": [f"row {i}" for i in range(ROWS)], "y_dim_0": rows},
    )


def of(found, name):
    """A number of ArviZ's record of LOO, by its name of 0.23."""
    later = {"elpd_loo": "elpd", "p_loo": "p", "loo_i": "elpd_i"}
    return getattr(found, later[name] if has_trees() else name)


def test_all_groups_are_there(idata):
    assert set(group_names(idata)) == {
        *("posterior", "posterior_predictive", "log_likelihood", "log_prior", "sample_stats"),
        *("prior", "prior_predictive", "observed_data", "constant_data", "predictions"),
    }


def test_dims_and_coords_can_be_given(idata):
    assert list(idata.posterior["row"].values)[:2] == ["row 0", "row 1"]
    assert idata.predictions["y"].dims[2] != "row"  # of another size


def test_predictions_have_the_model_s_values_at_new_data(draws):
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)

    new = flowvi.predict(draws, x, torch.zeros(2, dtype=torch.float64))
    idata = flowvi.to_inference_data(draws, log_likelihood=False, predictions=new)

    expected = draws["level"][..., None] + draws["slope"][..., None] * x.numpy()
    np.testing.assert_allclose(idata.predictions["mean"], expected)
    assert idata.predictions["y"].shape == (2, 2000, 2)


def test_predictions_of_other_draws_are_refused(draws):
    with pytest.raises(ValueError, match=r"\['y'\] must begin with the shape \(2, 2000\)"):
        flowvi.to_inference_data(draws, predictions={"y": np.zeros((2, 5, 3))})


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_loses_nothing(idata, tmp_path, kind):
    path = tmp_path / f"all.{kind}"

    write_groups(idata, path)
    again = read_groups(path)

    assert set(group_names(again)) == set(group_names(idata))
    for group in group_names(idata):
        old, new = (to_dataset(groups[group]) for groups in (idata, again))
        xr.testing.assert_identical(new.drop_attrs(deep=False), old.drop_attrs(deep=False))
        kept = {k: v for k, v in idata[group].attrs.items() if v == v}
        found = again[group].attrs
        assert {k: found[k] for k in kept} == kept


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.nc").write_text("no NetCDF")

    with pytest.raises(ValueError, match="cannot be read as ArviZ's groups"):
        read_groups(tmp_path / "x.nc")


def test_loo_is_that_of_the_exact_posterior(draws, idata):
    """And without the correction it is not: the guide is wider and off."""
    expected = exact_loo(*data())

    corrected = flowvi.loo(idata)
    plain = az.loo(idata, pointwise=True)

    error = np.abs(of(corrected, "loo_i").values - expected)
    assert error.max() < 0.05
    off, plainly = (abs(of(found, "elpd_loo") - expected.sum()) for found in (corrected, plain))
    assert off < 0.1
    assert plainly > 2 * off
    assert of(corrected, "elpd_loo") == pytest.approx(of(flowvi.loo(draws), "elpd_loo"))
    p_loo = exact_loo(*data(), out=False).sum() - expected.sum()
    assert of(corrected, "p_loo") == pytest.approx(p_loo, abs=0.05)
    spread = len(expected) ** 0.5 * of(corrected, "loo_i").values.std()
    assert of(corrected, "se") == pytest.approx(spread)
    assert corrected.pareto_k.dims == ("row",)


def test_loo_of_resampled_draws_is_arviz_s_own(draws):
    resampled = flowvi.to_inference_data(resample(draws))

    found, own = flowvi.loo(resampled), az.loo(resampled)

    assert of(found, "elpd_loo") == pytest.approx(of(own, "elpd_loo"))


def test_loo_says_which_rows_rest_on_few_draws():
    with pytest.warns(UserWarning, match=r"above 0\.\d+ for \d+ of 12 observations"):
        found = flowvi.loo(table(width=0.3, shift=0.4, n=400))

    assert found.warning


def test_loo_needs_one_site(draws):
    bare = flowvi.to_inference_data(draws, log_likelihood=False)

    with pytest.raises(ValueError, match="no pointwise log likelihood"):
        flowvi.loo(bare)
    with pytest.raises(ValueError, match=r"No observed site named 'z'.*Choose from y"):
        flowvi.loo(draws, "z")


def test_arviz_compares_the_corrected_numbers(draws):
    flat = table(flat=True)

    ranked = az.compare({"line": flowvi.loo(draws), "flat": flowvi.loo(flat)})

    assert list(ranked.index) == ["line", "flat"]
    # ArviZ 1 subtracts the other way round.
    assert ranked.loc["flat", "elpd_diff"] * (-1 if has_trees() else 1) > 0


def test_loo_pit_is_about_uniform(idata):
    found = az.loo_pit(idata)["y"] if has_trees() else az.loo_pit(idata, y="y")

    assert found.shape == (ROWS,)
    assert ((found > 0) & (found < 1)).all()
    assert abs(found.mean() - 0.5) < 4 * math.sqrt(1 / 12 / ROWS)


def test_arviz_draws_what_a_fit_gives(draws, idata):
    if has_trees():
        drawn = [
            az.plot_khat(flowvi.loo(idata)),
            az.plot_ppc_dist(idata, num_samples=10),
            az.plot_forest(idata, var_names=["slope", "level"], combined=True),
            az.plot_pair(idata, var_names=["slope", "level"]),
            az.plot_loo_pit(idata, var_names=["y"]),
            az.plot_dist(idata, var_names=["slope"]),
        ]
        plt.close("all")
        assert all(isinstance(found, (az.PlotCollection, az.PlotMatrix)) for found in drawn)
        return
    axes = [
        az.plot_khat(flowvi.loo(idata)),
        az.plot_ppc(idata, num_pp_samples=10),
        az.plot_forest(idata, var_names=["slope", "level"], combined=True)[0],
        az.plot_pair(idata, var_names=["slope", "level"]),
        az.plot_loo_pit(idata, y="y"),
        az.plot_posterior(idata, var_names=["slope"]),
    ]
    plt.close("all")

    assert all(ax is not None for ax in axes)


def test_trees_of_later_versions_are_read(draws, idata):
    """ArviZ 1 keeps groups in a tree of xarray."""
    tree = xr.DataTree.from_dict({group: to_dataset(idata[group]) for group in group_names(idata)})

    assert flowvi.evidence(tree).log_evidence == flowvi.evidence(idata).log_evidence
    np.testing.assert_array_equal(draws_of(tree).log_weights, draws.log_weights)
