"""What a fit learns of a model's own parameters comes back, wherever the fit was run."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import flowvi

SETTINGS = {"guide": "fullrank", "steps": 400, "lr": 0.05, "progress": False, "compile": False}
Y = [2.1, 3.0, 2.4, 1.9, 3.2, 2.2]


def learned(y):
    """y_i ~ N(z + c, 1), z ~ N(0, 1): the evidence is highest where c is the mean of y."""
    c = pyro.param("c", torch.zeros((), dtype=y.dtype))
    z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(z + c, 1.0), obs=y)


class Shift(nn.Module):
    """One weight, in the user's own module."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))


def of_module(y, module):
    pyro.module("shift", module)
    z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(z + module.c, 1.0), obs=y)


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"])
def data(request):
    torch.set_default_dtype(request.param)
    return torch.tensor(Y, dtype=torch.float64)


def own(target):
    return [p.detach().clone() for p in target.parameters()]


def agrees(fit):
    """The guide is the posterior given the parameters that the target holds, in closed form."""
    (c,) = own(fit.target)
    y, n = np.array(Y), len(Y)
    draws = fit.draw(1000)
    mean, sd = (y - c.item()).sum() / (n + 1), (n + 1) ** -0.5
    z = draws["z"].reshape(-1)
    assert abs(z.mean() - mean) < 4.5 * sd / math.sqrt(1000)
    assert abs(c.item() - y.mean()) < 0.1
    bound = flowvi.diagnose(draws)
    assert abs(bound.elbo - fit.bounds[0]) < 1e-3 + 4.5 * bound.elbo_se


def test_an_executor_brings_the_parameters_back(processes, data):
    """The same numbers as without one, and the closed form."""
    here, far = (flowvi.from_pyro(learned, data) for _ in range(2))
    near = flowvi.fit(here, **SETTINGS)

    fit = flowvi.fit(far, executor=processes, **SETTINGS)

    agrees(fit)
    assert torch.equal(own(far)[0], own(here)[0])
    np.testing.assert_array_equal(fit.draw(20).log_p, near.draw(20).log_p)


def test_a_fit_elsewhere_begins_where_the_parameters_are(processes, data):
    """A second fit goes on from what the first one learned, as it does without an executor."""
    here, far = (flowvi.from_pyro(learned, data) for _ in range(2))
    few = {**SETTINGS, "steps": 5}
    for _ in range(2):
        flowvi.fit(here, **few)
        flowvi.fit(far, executor=processes, **few)

    assert own(here)[0].abs() > 0.05
    assert torch.equal(own(far)[0], own(here)[0])


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_module_is_trained_where_it_stands(kind, processes, data):
    module = Shift().double()
    target = flowvi.from_pyro(of_module, data, module)
    with ThreadPoolExecutor(1) as threads:
        executor = processes if kind == "process" else threads
        agrees(flowvi.fit(target, executor=executor, **SETTINGS))

    assert abs(module.c.item() - np.mean(Y)) < 0.1


def test_a_saved_fit_brings_them_to_a_fresh_target(processes, data, tmp_path):
    fit = flowvi.fit(flowvi.from_pyro(learned, data), executor=processes, **SETTINGS)
    fit.save(tmp_path)

    loaded = flowvi.load(tmp_path, flowvi.from_pyro(learned, data))

    np.testing.assert_array_equal(loaded.draw(20).log_p, fit.draw(20).log_p)
    agrees(loaded)


def test_resuming_elsewhere_ends_where_it_would_have(processes, data, tmp_path):
    """Also on the target that was trained meanwhile, whose parameters have to begin again."""
    target, path = flowvi.from_pyro(learned, data), tmp_path / "run"
    whole = flowvi.fit(target, executor=processes, checkpoint=path, **SETTINGS)
    trained, draws = own(target), whole.draw(20)
    for state in (path / "restart-0").glob("*stage*"):
        state.unlink()

    again = flowvi.fit(target, executor=processes, checkpoint=path, resume=True, **SETTINGS)

    assert torch.equal(own(target)[0], trained[0])
    np.testing.assert_array_equal(again.draw(20).log_p, draws.log_p)
    kept = flowvi.load(path / "fit", flowvi.from_pyro(learned, data))
    np.testing.assert_array_equal(kept.draw(20).log_p, draws.log_p)


def test_restarts_are_refused_with_their_parameters(processes, data):
    target = flowvi.from_pyro(learned, data)

    with pytest.raises(ValueError, match="restarts must be 1, got 2"):
        flowvi.fit(target, restarts=2, executor=processes)


def test_calibration_leaves_them_alone(data):
    """Each fit begins with those that simulated the data, whichever were made before it."""
    module = Shift().double()
    settings = {"fits": 2, "draws": 200, "levels": 31, "seed": 2, "progress": False}
    few = {**SETTINGS, "steps": 20}
    few.pop("progress")

    one = flowvi.sbc(of_module, data, module, **settings, **few)
    assert module.c.item() == 0.0
    with ThreadPoolExecutor(1) as executor:
        two = flowvi.sbc(of_module, data, module, executor=executor, **settings, **few)

    np.testing.assert_array_equal(one.plain, two.plain)
    assert module.c.item() == 0.0
