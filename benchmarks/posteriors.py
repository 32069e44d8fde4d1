"""Fit every posterior of the corpus with the default call and compare with its reference draws.

    python benchmarks/posteriors.py [--shared DIR] [--seeds 1] [--guide auto] [NAME ...]

Per posterior: D, Pareto k-hat, the largest error of any mean (in posterior
standard deviations) and of any standard deviation (relative), over all
parameters, of the plain draws and of the resampled ones; the log evidence
with its standard error; the verdict; and the seconds from capture to draws.
The reference draws are themselves a sample: with 10,000 of them the largest
of many errors is about 0.03 when there is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

import flowvi

ROOT = Path(__file__).resolve().parents[1]
FILES = {"eight_schools_noncentered": "eight_schools"}
HEADER = (
    f"{'posterior':<28}{'D':>4}{'k-hat':>7}{'mean':>7}{'sd':>7}{'mean*':>7}{'sd*':>7}"
    f"{'log evidence':>14}{'+-':>8}{'s':>7}  verdict"
)


def load_model(name: str) -> ModuleType:
    """Import models/NAME.py by path."""
    path = ROOT / "models" / f"{FILES.get(name, name)}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(
    values: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Largest error of a mean in posterior sds, and of an sd relative to it."""
    of_mean, of_sd = [], []
    for name in reference.keys() & values.keys():
        truth = reference[name]
        found = values[name].reshape(-1, *truth.shape[1:])
        sd = truth.std(0)
        # The last entry of a simplex or a fixed value has no spread of its own.
        of_mean.append(np.abs(found.mean(0) - truth.mean(0)).ravel() / sd.ravel())
        of_sd.append(np.abs(found.std(0) / sd - 1).ravel())
    return float(np.concatenate(of_mean).max()), float(np.concatenate(of_sd).max())


def run(name: str, folder: Path, guide: str, seed: int) -> str:
    """Fit one posterior; a row of the table."""
    with np.load(folder / "reference.npz") as z:
        reference = {k: z[k] for k in z.files}
    module = load_model(name)
    args = module.data() if name.startswith("eight") else module.data(str(folder / "data.json"))
    began = time.perf_counter()
    target = flowvi.from_pyro(module.model, *args)
    draws = flowvi.fit(target, guide, seed=seed, progress=False).draw(4000, seed=seed)
    seconds = time.perf_counter() - began
    diagnosis = flowvi.diagnose(draws)
    plain = errors(draws.values, reference)
    resampled = errors(flowvi.resample(draws).values, reference)
    return (
        f"{name:<28}{target.dim:>4}{diagnosis.khat:>7.2f}{plain[0]:>7.3f}{plain[1]:>7.3f}"
        f"{resampled[0]:>7.3f}{resampled[1]:>7.3f}{diagnosis.log_evidence or np.nan:>14.3f}"
        f"{diagnosis.log_evidence_se or np.nan:>8.4f}{seconds:>7.1f}  {diagnosis.verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--guide", default="auto")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    posteriors = options.shared / "posteriors"
    names = options.names or sorted(p.name for p in posteriors.iterdir() if p.is_dir())
    print(HEADER)
    for name in names:
        for seed in range(options.seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                print(run(name, posteriors / name, options.guide, seed), flush=True)


if __name__ == "__main__":
    main()
