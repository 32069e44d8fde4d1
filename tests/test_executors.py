"""Where restarts and fits run makes no difference to what comes of them."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import constraints

import flowvi
from flowvi.cli.model_file import load_target
from models import eight_schools

SITES = {"x": flowvi.Site(shape=(3,), support=constraints.real)}


def log_prob(values):
    x = values["x"]
    return -0.5 * (x - 1).square().sum() - 0.1 * x.square().prod()


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def here():
    """In double precision by default, which the other processes do not have by themselves."""
    return fitted(None)


def same(one, other):
    """Whether two fits have the same guides, histories and words."""
    for a, b in zip(one.guides, other.guides, strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name])
    for name, column in one.history.items():
        np.testing.assert_array_equal(column, other.history[name])
    assert (one.bounds, one.log) == (other.bounds, other.log)
    assert torch.equal(one.start.loc, other.start.loc)


def fitted(executor, **settings):
    target = flowvi.from_density(log_prob, SITES)
    return flowvi.fit(target, "realnvp", steps=8, restarts=2, seed=3, executor=executor, **settings)


@pytest.mark.slow
def test_processes_give_the_bits_of_restarts_one_after_the_other(here, processes):
    same(here, fitted(processes))


def test_threads_give_the_same_too(here):
    with ThreadPoolExecutor(2) as executor:
        same(here, fitted(executor))


def normal(values):
    return -0.5 * (values["x"] - 1).square().sum()


def test_the_default_call_comes_back_whole(processes, tmp_path):
    """As it is run here, and with a checkpoint of every restart."""
    target = flowvi.from_density(normal, SITES)
    settings = {"restarts": 2, "seed": 1, "compile": False}
    here = flowvi.fit(target, **settings)

    far = flowvi.fit(target, executor=processes, checkpoint=tmp_path / "run", **settings)

    same(here, far)
    assert far.meta["specs"] == here.meta["specs"] and far.meta["stages"] == here.meta["stages"]
    assert (tmp_path / "run" / "restart-1" / "manifest.json").exists()
    again = flowvi.load(tmp_path / "run" / "fit", target)
    np.testing.assert_array_equal(again.draw(50).z, far.draw(50).z)


def test_a_model_file_can_be_sent():
    """The target of a command is made again from its path, with its name and labels."""
    target = load_target(Path(eight_schools.__file__), None)

    again = pickle.loads(pickle.dumps(target.made))()

    z = torch.ones(target.dim, dtype=target.dtype)
    assert torch.equal(again.log_prob(z), target.log_prob(z))
    assert again.name == "eight_schools" and again.coords == target.coords


def test_what_cannot_be_sent_is_named(processes):
    """A density inside a function has no name under which another process could find it."""
    target = flowvi.from_density(lambda values: -values["x"].square().sum(), SITES)

    with pytest.raises(ValueError, match=r"cannot be sent to another process .* top level"):
        flowvi.fit(target, "meanfield", steps=2, executor=processes)


def test_what_must_stay_here_is_refused(processes):
    target = flowvi.from_density(log_prob, SITES)
    with pytest.raises(ValueError, match="callback is called in this process"):
        flowvi.fit(target, executor=processes, callback=print)

    replaced = flowvi.targets.replicable(eight_schools.model, *eight_schools.data())
    with pytest.raises(ValueError, match="cannot be made again elsewhere"):
        flowvi.fit(replaced.observing(replaced.observed), executor=processes)


def calibration(executor):
    return flowvi.sbc(
        eight_schools.model,
        *eight_schools.data(),
        fits=2,
        draws=200,
        levels=31,
        executor=executor,
        guide="meanfield",
        steps=3,
        lr=0.01,
    )


@pytest.mark.slow
def test_dask_runs_restarts_and_calibration(here):
    """Dask's executor, on a process of this machine; it sends functions without a name too."""
    distributed = pytest.importorskip("distributed")

    with (
        distributed.LocalCluster(1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        same(here, fitted(executor))
        far = calibration(executor)
        unnamed = flowvi.from_density(lambda values: -values["x"].square().sum(), SITES)
        flowvi.fit(unnamed, "meanfield", steps=2, executor=executor)

    near = calibration(None)
    np.testing.assert_array_equal(far.plain, near.plain)
