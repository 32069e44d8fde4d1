"""The posteriors of the corpus: Pyro models, data and reference draws, and errors of draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FILES = {"eight_schools_noncentered": "eight_schools"}


def load_model(name: str) -> ModuleType:
    """Import models/NAME.py by path."""
    path = ROOT / "models" / f"{FILES.get(name, name)}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(module: ModuleType, name: str, folder: Path) -> tuple[Tensor, ...]:
    """The data of a posterior, as its Pyro model takes them."""
    found: tuple[Tensor, ...] = (
        module.data() if name.startswith("eight") else module.data(str(folder / "data.json"))
    )
    return found


def reference(folder: Path) -> dict[str, np.ndarray]:
    """The reference draws, (draw, *shape) for each name."""
    with np.load(folder / "reference.npz") as z:
        return {name: z[name] for name in z.files}


def errors(
    values: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], slack: float = 0.0
) -> tuple[float, float]:
    """Largest error of a mean in posterior sds, and of an sd relative to it; NaN if any is.

    Each error is taken less `slack` standard errors of the difference between
    two samples: 1/√n for a mean, √((κ - 1) / 4n) for an sd, with the kurtosis κ
    of the reference and 1/n = 1/n_values + 1/n_reference. A heavy-tailed
    parameter (κ = 215 for one of irt_2pl) has no sd known to 10 % otherwise.
    """
    if missing := sorted(reference.keys() - values.keys()):
        raise KeyError(f"The draws lack {', '.join(missing)}; they have {', '.join(values)}.")
    of_mean, of_sd = [], []
    for name, truth in reference.items():
        found = values[name].reshape(-1, *truth.shape[1:])
        mean, sd = truth.mean(0), truth.std(0)
        share = 1 / len(found) + 1 / len(truth)
        kurtosis = ((truth - mean) ** 4).mean(0) / sd**4
        noise = slack * np.sqrt(share), slack * np.sqrt((kurtosis - 1) / 4 * share)
        of_mean.append((np.abs(found.mean(0) - mean) / sd - noise[0]).ravel())
        of_sd.append((np.abs(found.std(0) / sd - 1) - noise[1]).ravel())
    return float(np.concatenate(of_mean).max()), float(np.concatenate(of_sd).max())
