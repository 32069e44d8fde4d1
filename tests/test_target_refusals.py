"""A model that cannot be carried is refused with one error that names the culprit and a cure."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn

import flowvi.targets as target_module
from flowvi.targets import ModelError, from_pyro

Y = torch.tensor([1.0, 2.0, 3.0])


def normal_rows(y: Tensor, rows: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", rows or len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def refused(model, *args, **kwargs) -> str:
    """The message of the one error that a model meets."""
    with pytest.raises(ModelError) as caught:
        from_pyro(model, *args, **kwargs)
    return str(caught.value)


def mentions(message: str, *parts: str) -> None:
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


# What a latent must not do.


def test_reading_a_latent():
    def item(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m.item() + m, 1.0), obs=y)

    def number(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.tensor(float(m)) + m, 1.0), obs=y)

    def branch(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m if m > 0 else 2 * m, 1.0), obs=y)

    def count(y):
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        total = sum(k / (i + 1) for i in range(int(k) + 1))
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    def select(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[x > 0].sum() + x.sum(), 1.0), obs=y)

    for model in (item, number, branch, count, select):
        message = refused(model, torch.tensor(0.3))
        mentions(message, model.__name__, r"test_target_refusals.py:\d+", "torch.where")


def test_a_site_on_one_branch_only():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        if m > 0:
            m = pyro.sample("extra", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    mentions(refused(model, torch.tensor(0.3)), "'extra'", "structure changes", "torch.where")


def test_a_random_number_of_sites():
    def model():
        n = int(torch.poisson(torch.tensor(3.0)))
        for i in range(n):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    mentions(refused(model), r"'x_\d'", "structure changes")


def test_a_random_shape():
    def model():
        n = int(torch.randint(2, 9, ()))
        pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))

    mentions(refused(model), "'x'", r"\(\d,\) in one run")


# Random numbers that are not sites.


def test_random_numbers_in_the_body():
    def noise(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m + torch.randn(3), 1.0), obs=y)

    def unused(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        torch.rand(3)
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    for model in (noise, unused):
        mentions(refused(model, Y), "random numbers that are not sites", r"refusals.py:\d+", "data")


def test_dropout_in_training_mode():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)).requires_grad_(False)

    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(m)[0], 1.0), obs=y)

    mentions(refused(model, torch.tensor(0.3)), "random numbers", r"\.eval\(\)")


def test_a_model_with_a_memory():
    calls = []

    def model(y):
        calls.append(1)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, float(len(calls))), obs=y)

    mentions(refused(model, torch.tensor(0.3)), "Two evaluations of model", "keeps state")


def test_a_generator_of_its_own_is_data():
    def model(y):
        features = torch.randn(3, generator=torch.Generator().manual_seed(0))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(m * features, 1.0), obs=y)

    assert from_pyro(model, Y).dim == 1


# Latents that have no density on R^D.


@pytest.mark.parametrize("fn", [dist.Bernoulli(0.5), dist.Categorical(torch.ones(3))])
def test_a_discrete_latent_that_could_be_summed_out(fn):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", fn)

    mentions(refused(model), "'k' is discrete", type(fn).__name__, "'enumerate': 'parallel'")


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}])
def test_a_discrete_latent_with_no_end(infer):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Poisson(3.0), infer=infer)

    mentions(refused(model), "'k' is discrete", "Poisson", "integrate it out by hand")


@pytest.mark.parametrize(
    "fn", [dist.ProjectedNormal(torch.ones(3)), dist.ImproperUniform(constraints.sphere, (), (3,))]
)
def test_directions_on_a_sphere(fn):
    def model():
        pyro.sample("direction", fn)

    mentions(refused(model), "'direction' has support Sphere", "ProjectedNormalReparam")


def test_nothing_to_approximate():
    def model(y):
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    mentions(refused(model, Y), "no latent sites", "obs=")


def test_a_plate_without_latents_cannot_be_local():
    mentions(refused(normal_rows, Y, local="row"), "local='row'", "Leave local out")


# Data.


def test_an_empty_plate():
    mentions(refused(normal_rows, torch.zeros(0)), "'row' has size 0", "no rows")


@pytest.mark.parametrize(("bad", "kind"), [(math.nan, "nan"), (math.inf, "infinite")])
@pytest.mark.parametrize("validate", [True, False])
def test_data_that_are_not_finite(bad, kind, validate):
    with pyro.validation_enabled(validate):
        message = refused(normal_rows, torch.tensor([1.0, bad, 2.0]))

    mentions(message, f"'y': 1 of 3 values is {kind}", r"first at \[1\]", "obs_mask")


def test_data_outside_of_the_support():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    message = refused(model, torch.tensor([1.0, 2.5, -1.0]))

    mentions(message, "'y': 2 of 3", "outside the support", "Poisson", r"first at \[1\]: 2.5")


def test_a_column_against_a_row():
    mentions(
        refused(normal_rows, Y[:, None], 3),
        r"'y'|\"y\"",
        r"\[3, 3\]",
        r"\(3, 1\)",
        r"plate|to_event",
    )

    def no_plate(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    mentions(refused(no_plate, Y[:, None]), '"y"', r"\(3, 1\)")


def test_more_rows_than_the_plate():
    mentions(refused(normal_rows, Y, 4), r"'y' has values of shape \(3,\)", "'row' of 4")


def test_something_that_is_no_tensor():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs="three")

    mentions(refused(model), "'y' observes a str", "as_tensor")


def test_data_too_large_for_double_precision():
    huge = torch.full((3,), 1e200, dtype=torch.float64)

    mentions(refused(normal_rows, huge), "'y'", "-inf", "rescale")


def test_data_too_large_for_single_precision_are_not_too_large():
    torch.set_default_dtype(torch.float32)

    target = from_pyro(normal_rows, torch.full((3,), 1e20))

    assert target.log_prob(torch.zeros(1, target.dim, dtype=torch.float64)).isfinite().all()


def test_nan_in_a_constant():
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    message = refused(model, torch.tensor([1.0, math.nan, 2.0]), Y)

    mentions(message, "argument 'x' holds nan in 1 place")


def test_forgotten_data_are_remarked():
    def model(y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    with pytest.warns(UserWarning, match="observes nothing.*'y' is None"):
        from_pyro(model)


def test_a_parameter_without_a_value():
    pyro.param("scale", torch.tensor(1.0))

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, pyro.param("scale")))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    mentions(refused(model, torch.tensor(0.3)), "'scale' has no initial value")


# What Pyro says already, with the site that was reached.


def test_errors_of_the_model_name_the_last_site():
    def model(y):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        raise KeyError("column 'age'")

    with pytest.raises(KeyError, match="age") as caught:
        from_pyro(model, Y)

    assert "last site reached was 'm'" in caught.value.__notes__[0]


def test_missing_arguments_and_duplicate_names():
    def twice():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match="'y'"):
        from_pyro(normal_rows)
    with pytest.raises(RuntimeError, match="Multiple sample sites named 'x'"):
        from_pyro(twice)


def test_plates_that_collide():
    def model():
        with pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="collide at dim=-1"):
        from_pyro(model)


def test_undeclared_rows_of_a_model_with_discrete_sites():
    def model(y):
        pyro.sample("m", dist.Normal(torch.zeros(3), 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    mentions(refused(model, torch.tensor(0.3)), '"m"', "invalid log_prob shape", "to_event")


# Wrong questions to a target.


def test_wrong_questions():
    target = from_pyro(poutine.condition(normal_rows, {}), Y)

    with pytest.raises(ValueError, match=r"2 columns.*D = 1 \(m 1\)"):
        target.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="value for site 'm'; got n"):
        target.unconstrain({"n": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"No dim named 'col'; .* has row"):
        target.label({"col": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="'row' has size 3; got 2"):
        target.label({"row": ["a", "b"]})
    assert target.label({"row": ["a", "b", "c"]}).coords == {"row": ["a", "b", "c"]}
    assert target_module.__all__


def test_values_of_the_wrong_shape():
    def model():
        pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("s", dist.Normal(0.0, 1.0))

    target = from_pyro(model)

    with pytest.raises(ValueError, match=r"'v' has shape \(3,\); got a value of shape \(5, 2\)"):
        target.unconstrain({"v": torch.zeros(5, 2), "s": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"'s' has \(4,\), those before it \(5,\)"):
        target.unconstrain({"v": torch.zeros(5, 3), "s": torch.zeros(4)})
