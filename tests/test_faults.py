"""Bad inputs and models by their number: each is fitted rightly, or gets one error that names it.

The numbers are those of a list of faults that were tried with other tools; the rows that other
tests cover are named here with them.
"""

import ast
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch import Tensor

import flowvi

Y = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5], dtype=torch.float64)
Model = Callable[..., Any]
ELSEWHERE = {
    **dict.fromkeys((1, 2), "test_target_refusals.test_data_that_are_not_finite"),
    5: "test_target_refusals.test_data_outside_of_the_support",
    6: "test_target_refusals.test_an_empty_plate",
    13: "test_target_refusals.test_more_rows_than_the_plate",
    14: "test_target_refusals.test_a_column_against_a_row",
    17: "test_target_refusals.test_forgotten_data_are_remarked",
    **dict.fromkeys((21, 49), "test_target_refusals.test_missing_arguments_and_duplicate_names"),
    22: "test_target_refusals.test_a_discrete_latent_that_could_be_summed_out",
    23: "test_target_refusals.test_a_discrete_latent_with_no_end",
    25: "test_target_refusals.test_a_site_on_one_branch_only",
    26: "test_target_refusals.test_a_random_number_of_sites",
    29: "test_target_refusals.test_directions_on_a_sphere",
    33: "test_target_subsampling.test_local_latents_are_refused",
    34: "test_target_subsampling.test_the_caller_s_rows_are_kept",
    39: "test_target_refusals.test_plates_that_collide",
    41: "test_failing_steps.test_a_fit_that_keeps_failing_names_the_site_and_keeps_the_best",
    42: "test_failing_steps.test_a_gradient_that_is_nan_names_site_parameter_and_operation",
    47: "test_target_refusals.test_errors_of_the_model_name_the_last_site",
    50: "test_layers.test_one_coordinate_gets_a_flow_that_is_not_affine",
    57: "test_failing_steps.test_the_same_target_fitted_twice_has_the_same_bits",
    58: "test_failing_steps.test_two_fits_in_two_threads_are_both_right",
    59: "test_resume.test_an_interrupt_is_gone_on_from",
    62: "test_draws.test_chains_are_guides_and_arrays_agree",
    63: "test_verdict.test_perfect_guide_is_trusted",
    **dict.fromkeys((61, 65, 66), "test_verdict.test_impossible_weights_are_refused"),
    **dict.fromkeys((67, 69, 77, 78), "test_files.test_a_foreign_file_is_refused_by_name"),
    70: "test_files.test_every_flipped_bit_is_seen",
    71: "test_resume.test_another_model_and_other_data_are_refused",
    75: "test_resume.test_a_signal_loses_nothing",
    **dict.fromkeys(
        (73, 74), "test_crafted_files.test_a_folder_that_cannot_be_is_refused_before_the_fit"
    ),
    79: "test_crafted_files.test_a_damaged_file_of_draws_says_what_is_left",
    81: "test_resume.test_what_was_cut_off_goes_on_to_the_same_bits",
    82: "test_resume.test_other_software_is_said",
    83: "test_resume.test_two_runs_do_not_share_a_folder",
    85: "test_cli.test_a_fault_of_the_data_names_the_file_and_the_line",
    **dict.fromkeys((86, 87), "test_cli.test_a_bad_option_is_refused_before_the_fit"),
}
FITTED: dict[str, Callable[[], tuple[Any, ...]]] = {}
REFUSED: dict[str, tuple[str, Callable[[], object]]] = {}


def fitted(number: int) -> Callable[[Model], Model]:
    """The case returns a model and its arguments, which are fitted."""

    def add(case: Model) -> Model:
        FITTED[f"{number}: {case.__name__}"] = case
        return case

    return add


def refused(number: int, words: str) -> Callable[[Model], Model]:
    """The case raises one error with these words."""

    def add(case: Model) -> Model:
        REFUSED[f"{number}: {case.__name__}"] = words, case
        return case

    return add


def normal(y: Any, rows: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", rows or len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def slope(x: Any, y: Any) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m * x, 1.0), obs=y)


def with_nan(value: float = math.nan) -> Tensor:
    y = Y.clone()
    y[1] = value
    return y


# Data.


@fitted(3)
def nan_behind_a_mask() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    return model, with_nan()


@fitted(3)
def nan_of_a_distribution_that_leaves_it_out() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.NanMaskedNormal(m, 1.0), obs=y)

    return model, with_nan()


@fitted(7)
def numpy_arrays() -> tuple[Any, ...]:
    return slope, np.linspace(0, 1, 5), Y.numpy()[::-1]


@fitted(7)
def an_array_in_a_dictionary() -> tuple[Any, ...]:
    return lambda data: normal(data["y"]), {"y": Y.numpy()}


@fitted(7)
def columns_of_a_table() -> tuple[Any, ...]:
    table = pd.DataFrame({"x": np.arange(5), "y": Y.numpy()})
    return slope, table["x"], table["y"]


@fitted(7)
def a_list() -> tuple[Any, ...]:
    return normal, Y.tolist()


@refused(7, "Site 'y' observes an array of object; pass numbers")
def an_array_of_objects() -> object:
    return flowvi.from_pyro(normal, np.array([1.0, None], dtype=object))


@refused(7, "Site 'y' observes an array of <U1")
def words_as_data() -> object:
    return flowvi.from_pyro(normal, np.array(["a", "b"]))


@refused(7, "Site 'y' observes a Series")
def a_column_of_words() -> object:
    return flowvi.from_pyro(normal, pd.Series(["a", "b"]))


@refused(7, "Site 'y' observes complex numbers")
def complex_data() -> object:
    return flowvi.from_pyro(normal, torch.zeros(3, dtype=torch.complex128))


@fitted(10)
def whole_numbers_of_a_normal() -> tuple[Any, ...]:
    return normal, torch.arange(5)


@fitted(11)
def booleans_of_a_bernoulli() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Beta(1.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(m), obs=y)

    return model, Y > 1


@refused(14, r"'y' has values of shape \(5, 1\).*did you mean \(5,\)\?")
def a_column_of_data() -> object:
    return flowvi.from_pyro(normal, Y[:, None])


@fitted(14)
def a_row_of_data() -> tuple[Any, ...]:
    return normal, Y[None], 5


@refused(15, r"log density of normal is of the size .*'y' has values up to 1e\+20. Rescale")
def values_of_twenty_decades() -> object:
    return fit(flowvi.from_pyro(normal, torch.full((5,), 1e20)))


@refused(2, "'x' holds inf in 1 place")
def an_infinite_covariate() -> object:
    return flowvi.from_pyro(slope, with_nan(math.inf), Y)


@refused(18, r"'z' was .*\[5\].* and is .*\[7\]")
def more_rows_than_were_fitted(folder: Path) -> object:
    fit(flowvi.from_pyro(a_latent_each, Y)).save(folder)
    return flowvi.load(folder, flowvi.from_pyro(a_latent_each, torch.zeros(7)))


@refused(18, r"'z' has shape \(5,\) in the fit and \(7,\)")
def predictions_for_other_rows() -> object:
    draws = fit(flowvi.from_pyro(a_latent_each, Y)).draw(100)
    return flowvi.predict(draws, torch.zeros(7))


@refused(18, r"'z' in plate 'row' has shape \(5,\) in the fit and \(7,\)")
def a_guide_for_pyro_with_other_rows() -> object:
    guide = flowvi.pyro_guide(fit(flowvi.from_pyro(a_latent_each, Y)))
    return Trace_ELBO().loss(a_latent_each, guide, torch.zeros(7))


def a_latent_each(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@refused(19, "argument 'y' lies on cpu, parameter 'w' lies on meta")
def a_parameter_on_another_device() -> object:
    def model(y: Tensor) -> None:
        w = pyro.param("w", torch.zeros((), device="meta"))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m + w, 1.0), obs=y)

    return flowvi.from_pyro(model, Y)


# Models.


@fitted(27)
def a_support_that_depends_on_a_latent() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        m = pyro.sample("m", dist.Uniform(0.0, a))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    return model, Y


@fitted(30)
def an_improper_prior_of_a_proper_posterior() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    return model, Y


def only_a_sum(y: Tensor) -> None:
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


@refused(31, r"only_a_sum is improper.*along '(a - b|b - a)'.*proper prior")
def an_improper_posterior() -> object:
    return fit(flowvi.from_pyro(only_a_sum, Y), "fullrank")


@refused(31, r"only_a_sum is improper.*along '(a - b|b - a)'.*proper prior")
def an_improper_posterior_of_a_guide_without_correlations() -> object:
    return fit(flowvi.from_pyro(only_a_sum, Y))


@fitted(35)
def elements_without_a_plate() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m.sum(), 1.0), obs=y)

    return model, Y


@fitted(37)
def a_matrix_times_a_vector() -> tuple[Any, ...]:
    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ m, 1.0), obs=y)

    return model, torch.randn(5, 2), Y


@fitted(38)
def a_row_of_means_in_two_plates() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        with pyro.plate("a", 4, dim=-2), pyro.plate("b", 3, dim=-1):
            m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    return model, torch.randn(4, 3)


@refused(39, "Multiple sample sites named 'a'")
def two_plates_of_one_name() -> object:
    def model() -> None:
        for size in (2, 3):
            with pyro.plate("a", size):
                pyro.sample(f"m{size}", dist.Normal(0.0, 1.0))

    return flowvi.from_pyro(model)


@fitted(43)
def a_positive_definite_matrix() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        with pyro.plate("row", len(y)):
            law = dist.MultivariateNormal(torch.zeros(2), precision_matrix=m)
            pyro.sample("y", law, obs=y)

    return model, torch.randn(6, 2)


ODD = ["a", "a.b", "a/b", "a_b", "../k", "/etc/passwd", "μ ²", "<script>", "%s{}", "a\nb", "nul\0l"]
ODD += [".", "..", "chain", "m", "x" * 300, "-rf", " "]


@fitted(46)
def names_of_every_kind() -> tuple[Any, ...]:
    def model() -> None:
        total = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ODD)
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(1.0))

    return (model,)


@fitted(45)
def names_that_look_like_attributes() -> tuple[Any, ...]:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("m.b", dist.Normal(m, 1.0))
        pyro.sample("m.b.c", dist.Normal(m, 1.0), obs=y)

    return model, torch.tensor(0.0)


@refused(46, "name that is text and not empty; got 3")
def a_number_as_a_name() -> object:
    return flowvi.from_pyro(lambda: pyro.sample(3, dist.Normal(0.0, 1.0)))


@refused(46, "name that is text and not empty; got ''")
def no_name() -> object:
    return flowvi.from_pyro(lambda: pyro.sample("", dist.Normal(0.0, 1.0)))


@refused(22, "Site 'm' is a Delta, .*pyro.deterministic")
def a_point_mass() -> object:
    def model() -> None:
        m = pyro.sample("m", dist.Delta(torch.tensor(1.0)))
        pyro.sample("x", dist.Normal(m, 1.0))

    return flowvi.from_pyro(model)


@refused(49, "Site 'm' samples from a Normal of torch.distributions")
def a_distribution_of_torch() -> object:
    return flowvi.from_pyro(lambda: pyro.sample("m", torch.distributions.Normal(0.0, 1.0)))


@refused(49, "got a Tensor")
def data_in_place_of_the_model() -> object:
    return flowvi.from_pyro(Y, normal)


@refused(49, "got the class Sequential; pass an instance")
def a_class_in_place_of_a_model() -> object:
    return flowvi.from_pyro(torch.nn.Sequential)


@refused(49, r"does not run when it is called \(async or yield\)")
def a_generator_in_place_of_a_model() -> object:
    def model() -> Any:
        yield pyro.sample("m", dist.Normal(0.0, 1.0))

    return flowvi.from_pyro(model)


@refused(49, "from_density needs a dictionary of at least one site")
def shapes_in_place_of_sites() -> object:
    return flowvi.from_density(lambda v: v["m"], {"m": (3,)})


@pytest.mark.parametrize("empty", [dist.Dirichlet(torch.ones(1)), dist.Normal(torch.zeros(0), 1)])
def test_latents_without_elements_are_refused(empty):
    with pytest.raises(flowvi.ModelError, match="latents of model have no elements"):
        flowvi.from_pyro(lambda: pyro.sample("m", empty.to_event(1 - empty.event_dim)))


# Settings, one by one.


@refused(54, "particles must be a whole number of at least 1; got 0")
def no_particles() -> object:
    return flowvi.fit(flowvi.from_pyro(normal, Y), particles=0)


@refused(55, "The guide has D = 2 but normal has D = 1")
def a_guide_for_another_model() -> object:
    return flowvi.fit(flowvi.from_pyro(normal, Y), flowvi.MeanField(2))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.filterwarnings("ignore:Simulating one draw at a time")
def test_what_can_be_fitted_is(name, brief, tmp_path):
    """With finite bounds, and results that a file holds under names that lead back to the sites."""
    model, *data = FITTED[name]()

    result = fit(flowvi.from_pyro(model, *data))

    assert math.isfinite(result.bounds[0])
    sites = set(result.target.sites)
    result.save(tmp_path / "fit")
    assert set(flowvi.load(tmp_path / "fit", result.target).draw(100).values) >= sites
    groups = flowvi.to_inference_data(result.draw(100))
    groups.to_netcdf(str(tmp_path / "posterior.nc"), engine="h5netcdf")
    posterior = type(groups).from_netcdf(str(tmp_path / "posterior.nc"), engine="h5netcdf")
    named = {v.attrs.get("original_name", n) for n, v in posterior["posterior"].data_vars.items()}
    assert named >= {site.replace("\0", "\\x00") for site in sites}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused(name, brief, tmp_path):
    words, case = REFUSED[name]

    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"(?s){words}"):
        case(*[tmp_path] * case.__code__.co_argcount)


def fit(target: flowvi.Target, guide: str = "meanfield") -> flowvi.Fit:
    return flowvi.fit(target, guide, steps=5, progress=False)


# Their relatives.

COUNTED = ("steps", "particles", "restarts", "epochs", "batch_size")
NO_COUNTS = (-1, 1.5, math.nan, math.inf, "3", True, [1], torch.tensor(2.5))
AMOUNTS = (0, -1, math.nan, math.inf, "3", True, [1])


@pytest.fixture(scope="module")
def one() -> flowvi.Target:
    return flowvi.from_pyro(normal, Y)


@pytest.fixture(scope="module")
def local() -> flowvi.LocalTarget:
    return flowvi.from_pyro(a_latent_each, Y, local="row")


@pytest.mark.parametrize(
    ("name", "value"),
    [*((n, v) for n in (*COUNTED, "seed") for v in NO_COUNTS), *((n, 0) for n in COUNTED)],
)
def test_what_is_no_count_is_refused(name, value, one, local):
    target = local if name in ("epochs", "batch_size") else one

    with pytest.raises(ValueError, match=rf"^{name} must be a whole number .*; got "):
        flowvi.fit(target, "meanfield", progress=False, **{name: value})


@pytest.mark.parametrize("value", AMOUNTS, ids=repr)
@pytest.mark.parametrize("name", ["lr", "budget"])
def test_what_is_no_amount_is_refused(name, value, one, local):
    for target in (one, local):
        with pytest.raises(ValueError, match=f"^{name} must be a positive number.*; got "):
            flowvi.fit(target, progress=False, **{name: value})


@pytest.mark.parametrize("value", [0, 1, 1.5, math.nan, math.inf, True])
def test_a_share_of_rows_beyond_all_is_refused(value, local):
    with pytest.raises(ValueError, match="the share of them to hold out; got"):
        flowvi.fit(local, validation=value, progress=False)


KINDS: dict[str, tuple[Callable[..., object], str]] = {
    "a model": (lambda one: flowvi.fit(normal), "what from_pyro .* returned; got a function"),
    "no guide": (lambda one: flowvi.fit(one, None), "guide must be a name, .* got a NoneType"),
    "a class": (lambda one: flowvi.fit(one, flowvi.MeanField), "got the class MeanField"),
    "a flow": (lambda one: flowvi.fit(one, flowvi.FLOWS["planar"](1)), "guide must be .* a Chain"),
    "misspelt": (lambda one: flowvi.fit(one, "realnpv"), "'realnpv'. Did you mean realnvp?"),
    "a builder": (lambda one: flowvi.fit(one, objective=flowvi.iwelbo), "one such as elbo"),
    "an objective": (lambda one: flowvi.fit(one, objective="ibelbo"), "Did you mean iwelbo?"),
    "a callback": (lambda one: flowvi.fit(one, callback=3), "callback must be a function"),
    "a folder": (lambda one: flowvi.fit(one, checkpoint=3), "checkpoint must be the path"),
    "nothing": (lambda one: flowvi.fit(one, resume=True), "name its folder, checkpoint="),
    "a setting": (
        lambda one: flowvi.fit(one, stpes=3),
        "no argument 'stpes'. Did you mean 'steps'",
    ),
    "chains": (lambda one: flowvi.neutra(one, chians=3), "Did you mean 'chains'"),
    "a network": (lambda one: flowvi.bayesian(3), "module must be a network; got an int"),
    "a prior": (lambda one: flowvi.bayesian(None, piror="normal"), "Did you mean 'prior'"),
    "rows": (lambda one: flowvi.nested(one), "a model with a local plate"),
    "one of draws": (lambda one: flowvi.compare(one), "dictionary of draws by name"),
    "draws": (lambda one: flowvi.diagnose(one), "the draws of a fit, .* got a GlobalTarget"),
    "resampled": (lambda one: flowvi.resample(one), "the draws of a fit, .* got a GlobalTarget"),
    "evidence": (lambda one: flowvi.evidence(one), "the draws of a fit, .* got a GlobalTarget"),
    "loo": (lambda one: flowvi.loo(one), "the draws of a fit, .* got a GlobalTarget"),
    "groups": (
        lambda one: flowvi.to_inference_data(one),
        "the draws of a fit, .* got a GlobalTarget",
    ),
    "predicted": (lambda one: flowvi.predict(one), "the draws of a fit, .* got a GlobalTarget"),
    "half": (lambda one: flowvi.iwelbo(1.5), "whole number of at least 1; got 1.5"),
    "loaded": (lambda one: flowvi.load(None, one), "folder must be the path of a folder"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_of_another_kind_is_refused(name, one):
    call, words = KINDS[name]

    with pytest.raises((TypeError, ValueError), match=words):
        call(one)


@pytest.mark.parametrize("value", [np.int64(5), torch.tensor(5)])
def test_numbers_of_other_libraries_are_numbers(value, one, brief):
    result = flowvi.fit(one, "meanfield", steps=value, seed=value, progress=False)

    assert len(result.history["bound"]) == result.meta["steps"] == 5
    assert len(result.draw(value)) == 5


def test_the_precision_is_stated(brief):
    """Row 9: data in double precision, and a model in single."""
    torch.set_default_dtype(torch.float32)

    result = fit(flowvi.from_pyro(normal, Y.double()))

    assert result.meta["precision"] == "float64"
    assert {p.dtype for p in result.guide.parameters()} == {torch.float64}


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_step_that_is_far_too_long_is_survived(lr, brief):
    """Row 53: what is kept is no worse than the start."""
    target = flowvi.from_pyro(normal, Y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = flowvi.fit(target, "fullrank", steps=60, lr=lr, progress=False)

    assert [str(w.message) for w in caught] == result.meta["failures"]
    assert all("halved 3 times" in words for words in result.meta["failures"])
    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(Y)
    assert abs(result.bounds[0] - exact) < 1e-2
    assert all(p.isfinite().all() for p in result.guide.parameters())


def test_every_row_has_its_test():
    numbers = {int(name.split(":")[0]) for name in [*FITTED, *REFUSED]} | {9, 53}
    listed = {*range(1, 4), 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19}
    listed |= {21, 22, 23, 25, 26, 27, 29, 30, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43, 45, 46, 47}
    listed |= {49, 50, 53, 54, 55, 57, 58, 59, 61, 62, 63, 65, 66, 67, 69, 70, 71, 73, 74, 75}
    listed |= {77, 78, 79, 81, 82, 83, 85, 86, 87}

    assert numbers | set(ELSEWHERE) == listed
    for name in ELSEWHERE.values():
        file, function = name.split(".")
        tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
        assert any(getattr(node, "name", "") == function for node in tree.body), name
