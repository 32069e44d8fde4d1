"""Every model file with a latent vector a row keeps its contract, and fits."""

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import flowvi
from flowvi.cli import main
from flowvi.vae.image_files import SPLITS

FOLDER = Path(__file__).parents[1] / "models"
# With latents that all rows share beside those of rows.
NESTED = "vae_bayesian_decoder"
ALL = sorted(p.stem for p in FOLDER.glob("*.py") if "\nlocal = " in p.read_text())
MODELS = [name for name in ALL if name != NESTED]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path):
    """A file of a few small images with classes."""
    rng = np.random.default_rng(0)
    x = {f"{k}_x": rng.integers(0, 256, (30, 8, 8), np.uint8) for k in SPLITS}
    np.savez(tmp_path / "images.npz", **x, train_y=rng.integers(0, 10, 30))
    return str(tmp_path / "images.npz")


def test_the_models_of_variational_autoencoders_are_there():
    assert MODELS == ["iwae", "vae_f", "vae_flow", "vae_labels", "vae_mnist"]


@pytest.mark.parametrize("name", ALL)
def test_file_keeps_the_contract(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    module = load(name)

    assert ast.get_docstring(tree)
    assert imported <= {"torch", "numpy", "pyro", "flowvi", *sys.stdlib_module_names}
    assert all(callable(getattr(module, part)) for part in ("data", "model", "guide", "fit"))


@pytest.mark.parametrize("name", MODELS)
def test_a_short_fit_has_a_finite_bound_and_trains_guide_and_model(name, images, default):
    fit = load(name).fit(images, epochs=2, progress=False)

    assert np.isfinite(fit.history["bound"]).all()
    assert np.isfinite(fit.iw_bound(rows=range(10), particles=5).values).all()
    assert list(fit.target.parameters()) and list(fit.guide.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_fit_is_a_guide_of_the_model_in_pyro(name, images):
    module = load(name)
    fit = module.fit(images, epochs=1, progress=False)
    batch = fit.target.batch()
    args, kwargs = fit.target.arguments.call(batch.data)
    loss = (TraceEnum_ELBO if name == "vae_labels" else Trace_ELBO)(max_plate_nesting=1)

    torch.manual_seed(1)
    found = -loss.loss(module.model, flowvi.pyro_guide(fit), *args, **kwargs)
    torch.manual_seed(1)
    z, log_q = fit.guide.sample((), batch)

    expected = (fit.target.log_prob(z, batch) - log_q).sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_data_come_without_a_file(name):
    pytest.importorskip("sklearn")

    x = load(name).data()[0]

    assert x.shape == (1397, 8, 8)


def test_classes_that_are_not_known_are_summed_out(images):
    """p(x, z) is the sum of p(x, z, y) over the classes."""
    module = load("vae_labels")
    x, label, decoder = module.data(images, known=5)
    target = flowvi.from_pyro(module.model, x, label, decoder, local=module.local)
    z = torch.randn(3, len(x), module.LATENT)

    each = [target.log_prob(z, (x, torch.full((len(x),), y))) for y in range(module.CLASSES)]
    unknown = target.log_prob(z, (x, torch.full((len(x),), -1)))

    torch.testing.assert_close(torch.logsumexp(torch.stack(each), 0), unknown)


def test_classes_are_probabilities(images):
    module = load("vae_labels")
    fit = module.fit(images, epochs=1, progress=False)
    x, *_ = module.data(images)

    found = module.classify(fit, x, draws=3)

    assert found.shape == (30, module.CLASSES)
    torch.testing.assert_close(found.sum(-1), torch.ones(30))


def test_flowvi_fit_says_what_to_do_with_such_a_file(tmp_path):
    file = str(FOLDER / "vae_mnist.py")

    done = CliRunner().invoke(main, ["fit", file, "--out", str(tmp_path / "out")])

    assert done.exit_code == 1
    assert "a latent vector for each row of plate 'data'" in done.stderr
    assert f"python {file}" in done.stderr


def test_a_decoder_with_a_posterior_is_trained_from_its_points(images):
    """The posterior begins around the point weights, and its bound rises."""
    module = load(NESTED)
    points = module.start(images, epochs=2, rows=20)

    fit = module.fit_weights(points, "multiplicative", epochs=40)

    first, last = fit.history["bound"][:10].mean(), fit.history["bound"][-10:].mean()
    assert last > first
    assert fit.draw(3)["weight"].shape == (1, 3, 64, module.UNITS)
    assert np.isfinite(fit.predictive_bound(points.x[:4], n=3)).all()
    assert isinstance(points.trained(1).fit, flowvi.RowFit)


def test_predictions_of_narrow_weights_are_those_of_the_points(images):
    """The bound of the model with a posterior, that of the points where it is all of it."""
    module = load(NESTED)
    module.WIDTH = 1e-4
    points = module.start(images, epochs=1, rows=20)
    nested = module.fit_weights(points, "meanfield", epochs=1)
    trained, (theta, _) = nested.density.target, nested.guide.sample((1,))

    given = trained.shared.constrain(theta)
    z = torch.randn(5, 4, module.LATENT)
    with torch.no_grad():
        points.last.weight.copy_(given["weight"][0])
        points.last.bias.copy_(given["bias"][0])
        points.body.load_state_dict(
            dict(zip(points.body.state_dict(), nested.density.target.parameters(), strict=True))
        )
        found = trained.log_prob(z, points.x[:4], theta[0])
        expected = points.fit.target.log_prob(z, points.x[:4])

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
