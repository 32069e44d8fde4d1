import itertools
import os
from pathlib import Path

import pyro
import pytest
import torch
from quick import quick

from flowvi.compat.arviz_module import import_arviz
from flowvi.initialization import ascents, modes, peaks
from flowvi.initialization import candidates as init

# Fits of the tests are the same to the bit, and leave the processors to each other.
os.environ.setdefault("FLOWVI_COMPILE", "off")

# The workers of pytest start together, and the modules of tests import ArviZ itself.
import_arviz()

REPOSITORY = Path(__file__).parents[1]


def reproducible() -> None:
    """Double precision, a fixed seed and an empty parameter store."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()


@pytest.fixture(autouse=True, scope="module")
def reproducible_module() -> None:
    """What is made once for the tests of a module does not depend on the module before."""
    reproducible()


@pytest.fixture(autouse=True)
def reproducible_test() -> None:
    """What a test does not depend on the test before."""
    reproducible()


@pytest.fixture(params=["double", "single"])
def default(request: pytest.FixtureRequest) -> torch.dtype:
    """Torch's default precision: that of the other tests, and the one that users have."""
    dtype = torch.float64 if request.param == "double" else torch.float32
    torch.set_default_dtype(dtype)
    return dtype


def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search little for a start and for modes, and judge by few draws.

    For what does not depend on them.
    """
    candidates = init.candidates
    monkeypatch.setattr(init, "candidates", lambda *args: itertools.islice(candidates(*args), 1))
    monkeypatch.setattr(init, "TRY_ROUNDS", 2)
    monkeypatch.setattr(init, "REFINE_ROUNDS", 5)
    monkeypatch.setattr(ascents, "LBFGS_STEPS", 50)
    monkeypatch.setattr(modes, "TRY_ROUNDS", 2)
    monkeypatch.setattr(modes, "FIRST", 1)
    monkeypatch.setattr(modes, "FEWEST", 1)
    monkeypatch.setattr(modes, "MOST", 2)
    monkeypatch.setattr(peaks, "STEPS", 5)
    monkeypatch.setattr(peaks, "ROUNDS", 8)
    quick(monkeypatch, evaluation_draws=500, check_draws=500)


def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take whatever start comes first: for what has only to run and to be finite."""
    brief(monkeypatch)
    monkeypatch.setattr(init, "TRY_ROUNDS", 1)
    monkeypatch.setattr(init, "REFINE_ROUNDS", 1)
    monkeypatch.setattr(ascents, "LBFGS_STEPS", 20)
    monkeypatch.setattr(init, "NEWTON_STEPS", 1)
    monkeypatch.setattr(init, "PATH_POINTS", 1)
    monkeypatch.setattr(peaks, "STEPS", 1)


@pytest.fixture(name="brief")
def brief_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit of a test is a brief one."""
    brief(monkeypatch)


@pytest.fixture(name="hasty")
def hasty_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit of a test is a hasty one."""
    hasty(monkeypatch)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the benchmark posteriors and targets: FLOWVI_SHARED, or beside the repository."""
    folder = Path(os.environ.get("FLOWVI_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "posteriors").is_dir():
        pytest.skip(f"no reference posteriors in {folder}; set FLOWVI_SHARED to their folder")
    return folder
