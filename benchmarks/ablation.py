"""Leave out one ingredient of the default fit at a time, and see what it was worth.

    python benchmarks/ablation.py [--start] [--shared DIR] [--seed 0] [--only WORD] [NAME ...]

A name is a target of evidence.py, a fit of ten_fits.py, or a posterior of the corpus. Per name and
ingredient left out: the gap in nats on 20,000 fresh draws with its standard error (log Z - ELBO
where log Z is known, else KL(q || p) by the draws themselves), k-hat, the number of steps, seconds
of the processor, where there are reference draws the largest errors of a mean (in sds) and of an
sd, and the verdict.

With --start the ingredients are those of the start and of the check, left out of the default call.
Otherwise they are those of the training, and there is no escalation: the first fit is compared.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import corpus
import numpy as np
import ten_fits
import torch
from evidence import ROOT, TARGETS
from torch import Tensor

import flowvi
from flowvi.fitting import first_guide, restart, starts
from flowvi.initialization import candidates, modes
from flowvi.initialization.candidates import StartSearch, best_gaussian
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.training import schedule, stages
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import constant
from flowvi.training.records import Trial
from flowvi.training.schedule import Schedule

DRAWS = 20_000
DEFAULT = ("eight_schools", "funnel", "brownian", "ionosphere")
AT_START = (
    *("eight_schools_noncentered", "kidscore_interaction", "low_dim_gauss_mix", "gp_pois_regr"),
    *("eight_schools_centered", "two modes"),
)


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


def first_start(target: flowvi.Target, *rest: Any) -> Iterator[candidates.StartCandidates]:
    """The candidates of the first start point alone."""
    return itertools.islice(every_start(target, *rest), 1)


every_start = candidates.candidates

# What is put in place of what: ingredients of the start, and of the check.
Changes = dict[str, list[tuple[Any, str, Any]]]
START: Changes = {
    "nothing": [],
    "starts but the first": [(candidates, "candidates", first_start)],
    "the search for modes": [(starts, "further_modes", lambda *a: [])],
    "symmetries": [(modes, "symmetries", lambda *a: [])],
    "Gaussian polish": [(candidates, "refine_fully", lambda target, g, *a, **k: g)],
    "trials of step sizes": [
        (restart.Restart, "should_search_rate", lambda self, gap: False),
    ],
    "skews beside couplings": [(first_guide, "_compare_with_skews", lambda restart, plain: plain)],
    "annealing": [(restart, "mass_beyond_guide", lambda *a: "")],
}
# Those of the training.
LEFT_OUT: Changes = {
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
def without(what: str, start: bool) -> Iterator[dict[str, Any]]:
    """Leave an ingredient out; yields settings of the fit."""
    settings: dict[str, Any] = {"progress": False, "compile": False}
    if not start:
        settings["escalate"] = False
    if what == "path gradients":
        settings |= {"objective": flowvi.elbo(gradient="total")}
    if what == "the flow":
        settings |= {"guide": "fullrank"}
    with ExitStack() as stack:
        for owner, name, other in (START if start else LEFT_OUT)[what]:
            stack.enter_context(patch.object(owner, name, other))
        yield settings


class Made(NamedTuple):
    """A target, and what is known of it.

    Attributes:
        target: The log density.
        log_z: Log evidence; NaN if it is not known.
        reference: Draws (draw, *shape) by name; none if there are none.
    """

    target: flowvi.Target
    log_z: float
    reference: dict[str, np.ndarray]


def made(name: str, shared: Path) -> Made:
    """A target by name."""
    if name in TARGETS:
        return Made(*TARGETS[name](shared / "targets"), {})
    if name in ten_fits.FITS:
        return Made(ten_fits.FITS[name][0](), math.nan, {})
    folder, module = shared / "posteriors" / name, corpus.load_model(name)
    target = flowvi.from_pyro(module.model, *corpus.arguments(module, name, folder))
    return Made(target, math.nan, corpus.reference(folder))


def row(one: Made, what: str, seed: int, start: bool) -> str:
    """Fit a target without an ingredient."""
    began = time.process_time()
    with without(what, start) as settings:
        fit = flowvi.fit(one.target, seed=seed, **settings)
    seconds = time.process_time() - began
    draws = fit.draw(DRAWS, seed=seed)
    d = flowvi.diagnose(draws)
    gap, se = (one.log_z - d.elbo, d.elbo_se) if math.isfinite(one.log_z) else (d.gap, d.gap_se)
    off = corpus.errors(draws.values, one.reference) if one.reference else (math.nan, math.nan)
    return (
        f"{what:<28}{gap:>9.4f} +-{se:>7.4f}{d.khat:>7.2f}{fit.meta['steps']:>7}{seconds:>7.1f}"
        f"{off[0]:>7.3f}{off[1]:>7.3f}  {d.verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", action="store_true", help="ingredients of the start")
    parser.add_argument("--only", default="", help="a word of the ingredient")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = f"{'gap':>9} {'':>9}{'k-hat':>7}{'steps':>7}{'s':>7}{'mean':>7}{'sd':>7}  verdict"
    for name in options.names or (AT_START if options.start else DEFAULT):
        one = made(name, options.shared)
        print(f"\n{name}\n{'left out':<28}{columns}")
        for what in START if options.start else LEFT_OUT:
            if options.only in what:
                print(row(one, what, options.seed, options.start), flush=True)


if __name__ == "__main__":
    main()
