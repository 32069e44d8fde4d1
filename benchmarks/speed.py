"""Milliseconds of a whole training step, beside other ways to take the same one.

    python benchmarks/speed.py [--models eight_schools ...] [--draws 1 16 100 256]
                               [--guides realnvp iaf nsf_coupling fullrank meanfield] [--rounds 7]
                               [--double] [--without bnaf]

Needs `pip install "flowvi[benchmark]"` and a C++ compiler. A step draws, evaluates the
ELBO and its gradient, and updates the parameters by Adam, on one thread. The others work in
single precision, their default, or in double; flowvi as it always does, with flows in single
and densities in double precision. The first number is flowvi's, its steps called from Python by
`flowvi.fit`, compiled; the others are ratios to it, above 1 where flowvi is faster. All take
turns of 50 steps in one run; medians of the rounds.

- pyro: `SVI` with `Trace_ELBO`, vectorised particles, and the same guide.
- hand: torch by hand, the backward pass written out, Adam fused (realnvp).
- jax: the same arithmetic by hand and jitted; called from Python, and 50 steps in one loop.
- numpyro: `SVI` with `AutoIAFNormal` and `AutoBNAFNormal` (iaf), or the Gaussian of the same
  kind; likewise called, and in one loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

# XLA would take every processor for itself otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch
from step_models import PROBLEMS, Problem
from step_rivals import RIVALS

import flowvi
from flowvi.guides import make_guide
from flowvi.training.records import Step

STEPS = 50
# flowvi's first steps, in which it compiles.
BEFORE = 40
SIZES: dict[str, dict[str, Any]] = {"realnvp": {"depth": 8}, "iaf": {"depth": 3}}
COLUMNS = (
    "pyro",
    "hand",
    "jax, called",
    "jax, loop",
    "numpyro, called",
    "numpyro, loop",
    "BNAF, called",
    "BNAF, loop",
)
Turn = Callable[[int], object]


class Rounds:
    """The callback of a fit, in which the others have their turns.

    Args:
        others: What takes a number of steps, by name.
        rounds: How many rounds to go.
    """

    def __init__(self, others: dict[str, Turn], rounds: int) -> None:
        self.others, self.rounds = others, rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in ("flowvi", *others)}
        self.began = 0.0

    def __call__(self, step: Step) -> bool:
        turns, rest = divmod(step.step - BEFORE, STEPS)
        if rest or turns < 0:
            return False
        if turns:
            self.seconds["flowvi"].append((time.perf_counter() - self.began) / STEPS)
            for name, turn in self.others.items():
                began = time.perf_counter()
                turn(STEPS)
                self.seconds[name].append((time.perf_counter() - began) / STEPS)
        self.began = time.perf_counter()
        return turns == self.rounds

    def medians(self) -> dict[str, float]:
        """Milliseconds of a step of each."""
        return {name: 1e3 * statistics.median(found) for name, found in self.seconds.items()}


def row(
    problem: Problem, name: str, kind: str, draws: int, rounds: int, without: str | None
) -> str:
    """Time one cell of the table."""
    others: dict[str, Turn] = {}
    for make in RIVALS.get(kind, ()):
        if without not in make.args:
            others |= make(problem, draws)
    for turn in others.values():
        turn(STEPS)  # compiles what is compiled
    target = flowvi.from_pyro(problem.model, *problem.args)
    guide = make_guide(kind, problem.dim, **SIZES.get(kind, {}))
    turns = Rounds(others, rounds)
    fit = flowvi.fit(
        target,
        guide,
        flowvi.elbo(draws, "total"),
        particles=draws,
        steps=BEFORE + STEPS * rounds + 1,
        lr=1e-3,
        compile=True,
        progress=False,
        callback=turns,
    )
    found = turns.medians()
    ours = found["flowvi"]
    cells = [f"{found[c] / ours:.2g}" if c in found else "-" for c in COLUMNS]
    compiled = any(line.startswith("compiled step") for line in fit.log)
    mark = "" if compiled else " (not compiled)"
    return f"| {name} | {kind} | {draws} | {ours:.2f}{mark} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--guides", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--draws", nargs="+", type=int, default=[1, 16, 100, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--double", action="store_true", help="the others in double precision")
    parser.add_argument("--without", choices=("bnaf",), help="it takes long to compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| model | guide | draws | flowvi, ms | {' | '.join(COLUMNS)} |")
    print(f"| {' | '.join(['---'] * (len(COLUMNS) + 4))} |")
    for kind in options.guides:
        for name in options.models:
            problem = PROBLEMS[name](torch.float64 if options.double else torch.float32)
            for draws in options.draws:
                line = row(problem, name, kind, draws, options.rounds, options.without)
                print(line, flush=True)


if __name__ == "__main__":
    main()
