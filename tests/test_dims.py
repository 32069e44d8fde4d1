"""Axes have the names and labels that users give, in shared dims, from tables too."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.cli.model_file import load_target


def model(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * beta * scale).sum(-1), 1.0), obs=y)


X, Y = torch.tensor([[1.0, 0.5], [0.2, 1.0], [0.3, 0.1]]), torch.tensor([0.3, 1.0, -0.2])
SHARED = {"beta": ["coef"], "scale": "coef", "x": ["row", "coef"]}


def exported(target):
    fit = flowvi.fit(target, "meanfield", steps=5, compile=False, progress=False)
    return flowvi.to_inference_data(fit.draw(100), log_likelihood=False)


def test_vectors_share_a_dim_and_its_labels():
    target = flowvi.from_pyro(model, X, Y, dims=SHARED, coords={"coef": ["a", "b"], "row": "uvw"})

    idata = exported(target)

    assert idata.posterior["beta"].dims[2:] == idata.posterior["scale"].dims[2:] == ("coef",)
    assert list(idata.posterior["coef"].values) == ["a", "b"]
    assert idata.constant_data["x"].dims == ("row", "coef")
    assert list(idata.observed_data["row"].values) == ["u", "v", "w"]


def test_event_axes_inside_a_plate_are_named_alone_or_with_the_plate():
    def grouped():
        with pyro.plate("group", 3):
            pyro.sample("b", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(1))

    for names in (["coef"], ["group", "coef"]):
        assert flowvi.from_pyro(grouped, dims={"b": names}).dims["b"] == ("group", "coef")
    with pytest.raises(ValueError, match="plate 'group', and keeps this name; got 'region'"):
        flowvi.from_pyro(grouped, dims={"b": ["region", "coef"]})


@pytest.mark.parametrize(
    "dims, message",
    [
        ({"gamma": ["coef"]}, "No variable named 'gamma'"),
        ({"beta": ["coef", "other"]}, r"name the 1 axes of shape \(2,\)"),
        ({"beta": ["scale"]}, "'scale' is the name of a variable and of a dim"),
        ({"x": ["row", "row"]}, "two axes alike"),
        ({"beta": ["row"]}, "dim 'row' has size"),
    ],
)
def test_names_that_clash_are_refused(dims, message):
    with pytest.raises(ValueError, match=message):
        flowvi.from_pyro(model, X, Y, dims=dims)


def test_an_unknown_dim_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"No dim named 'coef'.*dims="):
        flowvi.from_pyro(model, X, Y, coords={"coef": ["a", "b"]})


def test_labels_come_from_tables():
    def counted(region, y):
        with pyro.plate("region", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a[region], 1.0), obs=y)

    table = pd.DataFrame(
        {"region": pd.Categorical(list("zxyz"), categories=list("xyz")), "y": [1.0, 2.0, 3.0, 4.0]},
        index=["p", "q", "r", "s"],
    )
    target = flowvi.from_pyro(
        counted, table["region"].cat.codes, table["y"], coords={"region": table["region"]}
    )

    assert target.coords == {"row": ["p", "q", "r", "s"], "region": ["x", "y", "z"]}
    plain = flowvi.from_pyro(counted, np.array([2, 0, 1, 2]), table["y"].reset_index(drop=True))
    assert plain.coords == {}


def test_a_column_of_labels_needs_no_numbers():
    """The categories of a column label a dim; the column itself is passed as codes."""
    from flowvi.targets.labelling import labels_from

    column = pd.Series(["b", "a", "b"], dtype="category")
    assert labels_from(column) == labels_from(pd.Categorical(["b", "a"])) == ["a", "b"]
    assert labels_from(pd.Index([3, 5])) == [3, 5] and labels_from("xy") == ["x", "y"]


def test_indices_that_disagree_label_nothing():
    def pair(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    x, y = pd.Series([1.0, 2.0], index=["a", "b"]), pd.Series([1.0, 3.0], index=["c", "d"])

    assert flowvi.from_pyro(pair, x, y).coords == {}
    assert flowvi.from_pyro(pair, x, y.set_axis(["a", "b"])).coords == {"row": ["a", "b"]}


def test_an_argument_of_the_model_named_dims_or_coords_is_its_own():
    def own(dims, coords=0.0):
        pyro.sample("x", dist.Normal(coords, 1.0).expand([dims]).to_event(1))

    assert flowvi.from_pyro(own, dims=3).dim == 3
    assert flowvi.from_pyro(own, 2, coords=1.0).dim == 2


def test_a_model_file_names_dims(tmp_path: Path):
    file = tmp_path / "m.py"
    file.write_text(
        "import pyro, torch\nimport pyro.distributions as dist\n"
        "def data():\n    return (torch.tensor([1.0, 2.0]),)\n"
        "def model(y):\n"
        "    a = pyro.sample('a', dist.Normal(0.0, 1.0).expand([2]).to_event(1))\n"
        "    b = pyro.sample('b', dist.Normal(0.0, 1.0).expand([2]).to_event(1))\n"
        "    pyro.sample('y', dist.Normal(a + b, 1.0).to_event(1), obs=y)\n"
        "dims = {'a': ['coef'], 'b': ['coef']}\ncoords = {'coef': ['u', 'v']}\n"
    )

    target = load_target(file, None)

    assert target.dims["a"] == target.dims["b"] == ("coef",)
    assert target.coords["coef"] == ["u", "v"]


def test_labels_that_a_file_cannot_hold_are_said():
    def clash():
        with pyro.plate("b", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b ", dist.Normal(0.0, 1.0))

    target = flowvi.from_pyro(clash, coords={"b": ["u", "v"]})

    with pytest.warns(UserWarning, match="'a' has no labels of 'b'"):
        exported(target)
