"""Fit every small model of the tests, and count what came of it.

    python benchmarks/small_models.py [--steps 200] [--only NAME]

A model is fitted if its bound is finite, and so is the model's density at its draws; it is
refused if one error says why; anything else failed. Prints a line for each that was not fitted,
and the counts of all.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import ZOO
from zoo.exact import EXACT

import flowvi


def outcome(build: Callable[[], Any], steps: int) -> tuple[str, str]:
    """What came of a model: a word, and why."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    case = build()
    try:
        target = flowvi.from_pyro(case.model, *case.args, **getattr(case, "kwargs", {}))
        fit = flowvi.fit(target, "fullrank", steps=steps, progress=False)
    except flowvi.ModelError as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:  # to be counted, whatever it is
        return "failed", f"{type(error).__name__}: {error}"
    draws = fit.draw(500)
    if not np.isfinite(draws.log_p).all():
        return "failed", "draws have no density: they lie outside the supports of their sites"
    if not np.isfinite(fit.bounds[0]):
        return "failed", f"the bound is {fit.bounds[0]}"
    return "fitted", flowvi.diagnose(draws).verdict


def main() -> None:
    """Fit all, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name, build in [*ZOO.items(), *EXACT.items()]:
        if given.only in name:
            word, why = outcome(build, given.steps)
            counts[word] += 1
            if word == "fitted":
                counts[f"fitted: {why}"] += 1
            else:
                print(f"{name}: {word}: {why[:200]}", flush=True)
    for word, n in sorted(counts.items()):
        print(f"| {word} | {n} |")


if __name__ == "__main__":
    main()
