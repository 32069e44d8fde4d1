"""Switch off one ingredient of the default fit at a time, and see what it was worth.

    python benchmarks/ablation.py [--shared DIR] [--seed 0] [--only WORD] [TARGET ...]

Per target of benchmarks/evidence.py and ingredient left out: the gap log Z - ELBO
in nats on 20,000 fresh draws with its standard error, k-hat, the number of
steps and the seconds. No escalation, so that what is compared is the first fit.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from evidence import ROOT, TARGETS
from torch import Tensor

import flowvi
from flowvi.fitting import first_guide, starts
from flowvi.initialization.candidates import StartSearch, best_gaussian
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.training import schedule, stages
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import constant
from flowvi.training.records import Trial
from flowvi.training.schedule import Schedule

DRAWS = 20_000
DEFAULT = ("eight_schools", "funnel", "brownian", "ionosphere")


def standard(target: flowvi.Target, *rest: Any) -> StartSearch:
    """No start at all: the standard normal."""
    identity = torch.eye(target.dim, dtype=target.dtype, device=target.device)
    return StartSearch(
        GaussianApproximation(0 * identity[0], identity, "standard normal"), [], 0 * identity[:1]
    )


def diagonal(target: flowvi.Target, seed: int, _: bool, *rest: Any) -> StartSearch:
    """A mean-field start."""
    return best_gaussian(target, seed, True, *rest)


admits = Guard.admits


def skipping(guard: Guard, bound: float, gradient: Tensor) -> tuple[bool, float]:
    """What a guard does that leaves out long steps instead of clipping them."""
    before = sorted(guard.norms)[len(guard.norms) // 2] if len(guard.norms) > 20 else float("inf")
    norm = float(torch.linalg.vector_norm(gradient))
    if norm > 2 * before:
        guard.norms.append(norm)
        guard.skipped += 1
        return False, norm
    return admits(guard, bound, gradient)


def steady(step: int, steps: int, lr: float, warm: bool = True) -> float:
    """No decay."""
    return constant(lr)(step)


# What is put in place of what.
LEFT_OUT: dict[str, list[tuple[Any, str, Any]]] = {
    "nothing": [],
    "the start": [
        (starts, "best_gaussian", standard),
        (starts, "check_integrable", lambda *a: ""),
    ],
    "full rank in the start": [(starts, "best_gaussian", diagonal)],
    "path gradients": [],
    "the decay of the step": [(stages, "decayed", steady)],
    "averaging": [(stages, "LAST_RATE", 0.0)],
    "clipping (skips instead)": [(Guard, "admits", skipping)],
    "later stages": [(schedule, "DEFAULT", Schedule(most_stages=1))],
    "depth (4 couplings)": [
        (first_guide, "MANY_COUPLINGS", 4),
        (first_guide, "FEW_COUPLINGS", 4),
    ],
    "the search for a step size": [
        (stages.Stages, "search", lambda self: Trial(Schedule().middle_rate, -math.inf))
    ],
    "the flow": [],
}


@contextmanager
def without(what: str) -> Iterator[dict[str, Any]]:
    """Leave an ingredient out; yields settings of the fit."""
    settings: dict[str, Any] = {"escalate": False, "progress": False}
    if what == "path gradients":
        settings |= {"objective": flowvi.elbo(gradient="total")}
    if what == "the flow":
        settings |= {"guide": "fullrank"}
    with ExitStack() as stack:
        for owner, name, other in LEFT_OUT[what]:
            stack.enter_context(patch.object(owner, name, other))
        yield settings


def row(make: Callable[[Path], Any], folder: Path, what: str, seed: int) -> str:
    """Fit a target without an ingredient."""
    target, log_z = make(folder)
    began = time.perf_counter()
    with without(what) as settings:
        fit = flowvi.fit(target, seed=seed, **settings)
    seconds = time.perf_counter() - began
    d = flowvi.diagnose(fit.draw(DRAWS, seed=seed))
    return (
        f"{what:<28}{log_z - d.elbo:>9.4f} +-{d.elbo_se:>7.4f}{d.khat:>7.2f}"
        f"{fit.meta['steps']:>7}{seconds:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a word of the ingredient")
    parser.add_argument("names", nargs="*", metavar="TARGET")
    options = parser.parse_args()
    for name in options.names or DEFAULT:
        print(f"\n{name}\n{'left out':<28}{'gap':>9} {'':>9}{'k-hat':>7}{'steps':>7}{'s':>7}")
        for what in LEFT_OUT:
            if options.only in what:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = row(TARGETS[name], options.shared / "targets", what, options.seed)
                print(found, flush=True)


if __name__ == "__main__":
    main()
