"""Models of the shared record, which are translated from Stan: flat priors are masked ones."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import flowvi

# Three dimensions at most, with an exact evidence.
SMALL = ("dogs", "mesquite_volume", "wells_dist")


def load(folder: Path) -> tuple[ModuleType, flowvi.Target]:
    spec = importlib.util.spec_from_file_location(folder.name, folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args, kwargs = module.load(folder)
    return module, flowvi.from_pyro(module.model, *args, **kwargs)


def published(shared: Path) -> dict[str, dict[str, str]]:
    with (shared / "record" / "record.csv").open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_every_model_is_captured_and_finite_somewhere(shared):
    names = published(shared)
    assert set(SMALL) < set(names)
    for name in names:
        _, target = load(shared / "record" / name)
        assert target.dim == int(names[name]["D"])
        assert target.log_prob(target._trial.points).isfinite().all()


RUNS = [*((name, "single") for name in SMALL), (min(SMALL), "double")]


@pytest.mark.parametrize(("name", "default"), RUNS, indirect=["default"])
def test_the_evidence_is_the_exact_one(name, shared, default):
    module, target = load(shared / "record" / name)
    row = published(shared)[name]

    fit = flowvi.fit(target, "fullrank", steps=200, escalate=False, progress=False)
    found = flowvi.diagnose(fit.draw(4000))

    error = found.log_evidence + module.OFFSET - float(row["exact"])
    # Both are known to a standard error, the published one to the last digit that is printed too.
    spread = (found.log_evidence_se**2 + float(row["exact_se"] or 0.0) ** 2) ** 0.5
    assert abs(error) < 4.5 * spread + 0.0005
