"""What a user's model is called, and columns of tables among its arguments."""

import functools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import AutoReparam

import flowvi

Y = torch.tensor([1.0, 2.0, 0.5])
X = torch.tensor([0.0, 1.0, 2.0])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"], autouse=True)
def precision(request):
    torch.set_default_dtype(request.param)


def wells(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        return pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def nameless(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def named(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


DATA = {"y": Y}
WRAPPED = {
    "condition": lambda: pyro.condition(wells, DATA),
    "messenger": lambda: poutine.condition(data=DATA)(wells),
    "partial": lambda: functools.partial(wells, y=Y),
    "partial of condition": lambda: functools.partial(pyro.condition(wells, DATA)),
    "two handlers": lambda: poutine.scale(pyro.condition(wells, DATA), scale=1.0),
    "enumerated": lambda: config_enumerate(pyro.condition(wells, DATA)),
    "reparam": lambda: AutoReparam(centered=0.0)(pyro.condition(wells, DATA)),
    "trace": lambda: poutine.trace(pyro.condition(wells, DATA)),
    "decorated": lambda: nameless(pyro.condition(wells, DATA)),
    "wrapped": lambda: named(functools.partial(wells, y=Y)),
    "lambda": lambda: lambda x: wells(x, Y),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_a_model_has_the_name_and_arguments_that_the_user_gave(form):
    target = flowvi.from_pyro(WRAPPED[form](), X)
    assert target.name == "wells"
    assert list(target.constants) == ["x"]


class Wells(pyro.nn.PyroModule):
    def forward(self, x, y=None):
        return wells(x, y)


def test_modules_and_lambdas():
    assert flowvi.from_pyro(pyro.condition(Wells(), DATA), X).name == "Wells"
    assert list(flowvi.from_pyro(Wells(), X, Y).constants) == ["x"]
    alone = flowvi.from_pyro(
        lambda y: pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), 1), obs=y),
        Y[0],
    )
    assert alone.name == "model"


def levels(region, y):
    with pyro.plate("region_", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a[region.long()], 1.0), obs=y)


def slopes(region, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(b * region, 1.0), obs=y)


def indexed(region, y):
    with pyro.plate("region_", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a[region], 1.0), obs=y)


WORDS = ["north", "south", "east"]
WRONG = {
    "strings": (pd.Series(WORDS), "Series of strings", "pd.factorize(region)[0]"),
    "objects": (pd.Series(WORDS, dtype=object), "Series of strings", "cat.codes"),
    "array": (np.array(WORDS), "an array of strings", "cat.codes"),
    "categories": (pd.Series(WORDS, dtype="category"), "of categories", "region.cat.codes"),
    "dates": (pd.Series(pd.to_datetime(["2024-01-01"] * 3)), "of dates", "pd.Timedelta"),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("model", [levels, slopes, indexed])
def test_columns_without_numbers_are_refused_by_the_name_of_the_argument(kind, model):
    column, what, cure = WRONG[kind]
    for args, kwargs in (((column, Y), {}), ((), {"region": column, "y": Y})):
        with pytest.raises(flowvi.ModelError, match="Its argument 'region' is") as error:
            flowvi.from_pyro(model, *args, **kwargs)
        assert what in str(error.value)
        assert cure in str(error.value)


def test_tables_and_what_lies_in_other_arguments():
    table = pd.DataFrame({"region": WORDS, "y": Y.numpy()})

    def of_table(data):
        levels(data["region"], data["y"])

    with pytest.raises(flowvi.ModelError, match=r"'data' is a DataFrame with 'region' \(strings\)"):
        flowvi.from_pyro(of_table, table)
    with pytest.raises(flowvi.ModelError, match=r"argument 'data\['region'\]' is a Series"):
        flowvi.from_pyro(of_table, dict(table))
    with pytest.raises(flowvi.ModelError, match="observes a Series of strings"):
        flowvi.from_pyro(wells, X, table["region"])


def test_the_way_out_works():
    codes = pd.Series(["b", "a", "c"], dtype="category").cat.codes
    for model in (levels, indexed):
        target = flowvi.from_pyro(model, codes, Y)
        assert target.constants["region"].tolist() == [1, 0, 2]


def test_types_of_pandas_with_missing_values_become_numbers():
    whole = pd.Series([1, 0, 2], dtype="Int64")
    assert flowvi.from_pyro(levels, whole, Y).constants["region"].dtype == torch.int64
    yes = pd.Series([True, False, True], dtype="boolean")
    assert flowvi.from_pyro(slopes, yes, Y).constants["region"].dtype == torch.bool
    for column in (pd.Series([1, None, 2], dtype="Int64"), pd.array([1.0, None, 2.0], "Float64")):
        with pytest.raises(flowvi.ModelError, match="argument 'region' holds nan in 1 place"):
            flowvi.from_pyro(slopes, pd.Series(column), Y)


def test_labels_may_be_words():
    """A column that the model only counts, or reads names from, is its own business."""

    def model(region, y):
        with pyro.plate("level", len(set(region))):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a.sum(), 1.0), obs=y)

    assert flowvi.from_pyro(model, pd.Series(["a", "b", "a"]), Y[0]).dim == 2


def test_other_errors_stay_what_they_are():
    def model(region, y):
        torch.no_such_function(y)

    with pytest.raises(AttributeError, match="no_such_function"):
        flowvi.from_pyro(model, pd.Series(WORDS), Y)
