"""Every file in models/ keeps its contract, runs, and has the density that it claims."""

import ast
import importlib.util
import inspect
import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from stein import largest_of_normals, stein_statistics
from torch import Tensor

import flowvi

FOLDER = Path(__file__).parents[1] / "models"
# Those with a latent vector for each row of the data are test_row_models.py's.
MODELS = sorted(p.stem for p in FOLDER.glob("*.py") if "\nlocal = " not in p.read_text())

# Groups of the models that make data of any size: what is tested here does not depend on it.
FEW = 6

# Unconstrained grids of the scales given which all else is normal: (low, high, points).
SCALES = {
    "eight_schools": {"tau": (-10.0, 6.0, 200)},
    "eight_schools_centered": {"tau": (-10.0, 6.0, 200)},
    "funnel": {"v": (-24.0, 24.0, 200)},
    "linear_gaussian_joint": {},
    "ppca": {},
    "linear_regression": {"sigma2": (-2.0, 1.2, 100)},
    "varying_intercepts": {"tau": (-6.0, 0.3, 50), "sigma": (-0.45, -0.15, 13)},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs_path(name: str) -> bool:
    return bool(inspect.signature(load(name).data).parameters)


POSTERIORS = {name: name for name in MODELS if needs_path(name)} | {
    "eight_schools_centered": "eight_schools_centered",
    "eight_schools_noncentered": "eight_schools",
}


@pytest.fixture
def arguments(request: pytest.FixtureRequest):
    """Function from a model's name to its data; it skips where they are out of reach."""

    def of(name: str) -> tuple[Any, ...]:
        if "sklearn" in (FOLDER / f"{name}.py").read_text():
            pytest.importorskip("sklearn", reason="scikit-learn brings this model's data")
        if hasattr(load(name), "simulate"):
            return load(name).simulate(FEW)
        if not needs_path(name):
            return load(name).data()
        shared = request.getfixturevalue("shared")
        return load(name).data(str(shared / "posteriors" / name / "data.json"))

    return of


@pytest.mark.parametrize("name", MODELS)
def test_file_keeps_the_contract(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }

    module = load(name)

    assert ast.get_docstring(tree)
    assert callable(module.model) and callable(module.data)
    assert imported <= {"torch", "pyro", "numpy", *sys.stdlib_module_names}
    assert "flowvi." not in ast.unparse(tree.body[1:]) and "import flowvi" not in ast.unparse(tree)
    if hasattr(module, "reference"):
        assert set(module.reference()) <= {"log_evidence", "mean", "sd"}


@pytest.mark.parametrize("name", MODELS)
def test_coords_label_the_plates(name, arguments):
    target = flowvi.from_pyro(load(name).model, *arguments(name))
    values = target.constrain(torch.zeros(target.dim)) | target.observed
    sizes = {
        dim: size
        for site, value in values.items()
        for dim, size in zip(target.dims[site], value.shape, strict=True)
    }

    for plate, labels in getattr(load(name), "coords", {}).items():
        assert len(labels) == sizes[plate]


@pytest.mark.parametrize("name", MODELS)
def test_precision_is_the_data_s(name, arguments):
    """Under a single-precision default every number is still a double."""
    z = torch.zeros(flowvi.from_pyro(load(name).model, *arguments(name)).dim)
    double = flowvi.from_pyro(load(name).model, *arguments(name)).log_prob(z)

    torch.set_default_dtype(torch.float32)
    target = flowvi.from_pyro(load(name).model, *arguments(name))

    assert target.dtype == torch.float64
    torch.testing.assert_close(target.log_prob(z), double, rtol=1e-12, atol=0.0)


# Under the precision that users have; the search of a differential equation takes half a minute.
LONG = (
    *("lotka_volterra", "hmm_drive_1", "low_dim_gauss_mix_collapse", "logistic_high_dim"),
    "irt_2pl",
)
BRIEF = [
    pytest.param(name, "single", marks=[pytest.mark.slow] if name in LONG else [])
    for name in MODELS
]


@pytest.mark.parametrize(("name", "default"), BRIEF, indirect=["default"])
def test_a_short_fit_has_a_finite_bound(name, arguments, request, default):
    # Of incomes and heights as they are, the first start is no place to look for an integral.
    request.getfixturevalue("brief" if name == "earn_height" else "hasty")
    target = flowvi.from_pyro(load(name).model, *arguments(name))

    # A full-rank start of a thousand dimensions takes a while.
    guide = "auto" if target.dim < 500 else "meanfield"
    fit = flowvi.fit(target, guide, steps=5, particles=16, progress=False)

    assert np.isfinite(fit.history["bound"][-1])
    assert fit.meta["precision"] == "float64"


@pytest.mark.parametrize("posterior", sorted(POSTERIORS))
def test_stein_identities_hold_over_reference_draws(posterior, arguments, shared):
    name = POSTERIORS[posterior]
    target = flowvi.from_pyro(load(name).model, *arguments(name))
    with np.load(shared / "posteriors" / posterior / "reference.npz") as archive:
        draws = {site: torch.tensor(archive[site]) for site in target.sites}
    thin = len(next(iter(draws.values()))) // 1000

    z = target.unconstrain({site: value[::thin] for site, value in draws.items()})
    statistics = stein_statistics(z.detach().numpy(), score(target, z).numpy())

    assert np.abs(statistics).max() < largest_of_normals(statistics.size)


def score(target: flowvi.Target, z: Tensor) -> Tensor:
    """Gradient of the log density, (S, D)."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    return gradient


@pytest.mark.parametrize("name", sorted(SCALES))
def test_reference_agrees_with_quadrature(name, arguments):
    target = flowvi.from_pyro(load(name).model, *arguments(name))
    expected = load(name).reference()

    log_evidence, mean, sd = integrate(target, SCALES[name])

    assert log_evidence == pytest.approx(expected["log_evidence"], abs=1e-4)
    for site in target.sites.keys() & expected["mean"].keys():
        np.testing.assert_allclose(mean[site], expected["mean"][site], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sd[site], expected["sd"][site], rtol=1e-4)


def integrate(
    target: flowvi.Target, scales: dict[str, tuple[float, float, int]]
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Log evidence, means and sds of a model that is normal given its (scalar) scales.

    The trapezoidal rule runs over the scales; for each of their values the log density is a
    quadratic in all else, which its gradients at the origin and at the unit vectors determine.
    """
    axes = [np.linspace(*grid) for grid in scales.values()]
    outer = [target.slices[site].start for site in scales]
    inner = [column for column in range(target.dim) if column not in outer]
    corners = torch.zeros(1 + len(inner), target.dim)
    corners[1:, inner] = torch.eye(len(inner))
    log_mass, mean, second = [], [], []
    for values in product(*axes):
        corners[:, outer] = torch.tensor(values)
        slope = score(target, corners)[:, inner]
        covariance = torch.linalg.inv(slope[0] - slope[1:])
        centre = corners[0].clone()
        centre[inner] = covariance @ slope[0]
        log_peak = target.log_prob(corners[0]) + slope[0] @ centre[inner] / 2
        normaliser = torch.linalg.slogdet(2 * torch.pi * covariance).logabsdet / 2
        log_mass.append(float(log_peak + normaliser))
        variance = torch.zeros(target.dim)
        variance[inner] = covariance.diagonal()
        moments = target.constrain(centre)
        mean.append(moments)
        second.append(
            {
                site: moments[site] ** 2 + variance[columns].reshape(moments[site].shape)
                for site, columns in target.slices.items()
            }
        )
    cell = sum(np.log(axis[1] - axis[0]) for axis in axes)
    weight = np.exp(log_mass - logsumexp(log_mass))
    first = average(weight, mean)
    spread = average(weight, second)
    sd = {site: np.sqrt(spread[site] - first[site] ** 2) for site in target.sites}
    return float(logsumexp(log_mass) + cell), first, sd


def average(weight: np.ndarray, values: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {
        site: np.tensordot(weight, np.stack([v[site].detach().numpy() for v in values]), axes=1)
        for site in values[0]
    }


@pytest.mark.parametrize("posterior", ["eight_schools_centered", "eight_schools_noncentered"])
def test_typed_data_are_posteriordb_s(posterior, shared):
    raw = json.loads((shared / "posteriors" / posterior / "data.json").read_text())

    effect, error = load(POSTERIORS[posterior]).data()

    assert effect.tolist() == raw["y"] and error.tolist() == raw["sigma"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(ImportError, match=r"flowvi\[data\]"):
        load("logistic_regression").data()


def test_feature_labels_are_scikit_learn_s():
    datasets = pytest.importorskip("sklearn.datasets")

    labels = load("logistic_regression").coords["feature"]

    assert labels == datasets.load_breast_cancer().feature_names.tolist()


def test_the_features_below_the_last_layer_tell_digits_apart(arguments):
    """Those of images that the network was not trained on too, by a linear rule."""
    x, digit = arguments("last_layer_digits")
    *_, other, truth = load("last_layer_digits").split()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    rule = torch.linalg.lstsq(design, torch.nn.functional.one_hot(digit).double()).solution

    found = (torch.cat([other, torch.ones(len(other), 1)], 1) @ rule).argmax(1)

    assert (found == truth).double().mean() > 0.85


def test_products_of_pixels_are_standardised(arguments):
    x, odd = load("logistic_high_dim").predictors()

    assert x.shape == (1797, 990) and set(odd.tolist()) == {0.0, 1.0}
    torch.testing.assert_close(x.mean(0), torch.zeros(990), rtol=0, atol=1e-10)
    torch.testing.assert_close(x.std(0), torch.ones(990))
