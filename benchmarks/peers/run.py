"""One fit of one peer in this process; prints a line of JSON.

    python -m peers.run METHOD NAME --seconds 30 [--seed 0] [--shared DIR]

Training stops when the seconds are spent, which do not count imports and
NumPyro's compilation; that and the draws, 4000, are in the seconds that are
printed. Errors are null where the fit failed; the note says why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
import warnings
from pathlib import Path

import corpus

from .budget import Budget, Fitted

# Module and what its `fit` is told.
METHODS = {
    "pyro_mvn": ("pyro_fit", "mvn"),
    "pyro_iaf": ("pyro_fit", "iaf"),
    "numpyro_iaf": ("numpyro_fit", "iaf"),
    "numpyro_bnaf": ("numpyro_fit", "bnaf"),
    "pymc_advi": ("pymc_fit", "advi"),
    "pymc_fullrank": ("pymc_fit", "fullrank_advi"),
    "blackjax_pathfinder": ("pathfinder", ""),
}
LONGEST_NOTE = 100


def run(method: str, name: str, folder: Path, seconds: float, seed: int) -> dict[str, object]:
    """Fit, and compare with the reference draws."""
    module, kind = METHODS[method]
    fit = importlib.import_module(f"{__package__}.{module}").fit
    reference = corpus.reference(folder)
    args = corpus.arguments(corpus.load_model(name), name, folder)
    mean = sd = math.nan
    budget, busy = Budget(seconds), time.process_time()
    try:
        fitted = fit(kind, name, args, set(reference), budget, seed)
        mean, sd = corpus.errors(fitted.values, reference)
        note = fitted.note if math.isfinite(mean + sd) else "nan"
    except Exception as error:  # whatever a library raises is its result here
        fitted = Fitted({}, math.nan, 0)
        note = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_NOTE]
    return {
        "posterior": name,
        "method": method,
        "seed": seed,
        "mean": finite(mean),
        "sd": finite(sd),
        "elbo": finite(fitted.elbo),
        "steps": fitted.steps,
        "seconds": budget.spent(),
        "cpu_seconds": time.process_time() - busy,
        "note": note,
    }


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("name")
    options = parser.parse_args()
    folder = options.shared / "posteriors" / options.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = run(options.method, options.name, folder, options.seconds, options.seed)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
