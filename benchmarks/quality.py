"""Seconds from the start of a process until the ELBO is within 0.1 nats of the best known.

    python benchmarks/quality.py [--models eight_schools ...] [--longest 64]

Needs `pip install "flowvi[benchmark]"`. Each run is a process of its own with one thread, and
trains for 2, 4, 8 ... seconds: flowvi by `fit(target, budget=...)`, with no compiled step
left by an earlier fit; NumPyro (`AutoIAFNormal`, `AutoBNAFNormal`, 16 draws a step), Pyro
(`AutoIAFNormal`, 16 vectorised draws) and PyMC (full-rank ADVI, one draw) by Adam with a
step size that falls from 0.01 to 0.0001 meanwhile, NumPyro from the prior's median and the
others from starts of their own. The seconds that are printed are all of the process up to the
end of training: imports, compiling, start, checks. What the ELBO is comes after them, from fresh
draws; PyMC's is that of its last 1,000 steps. Runs get longer until one is good enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GRID = (2, 4, 8, 16, 32, 64, 128)
ENOUGH = 0.1
DRAWS = 4000
MODELS = ("eight_schools", "radon", "logistic", "network")
# PyMC takes memory for the losses of all steps at once, and fewer than this in a second.
FASTEST, LAST = 20_000, 1000
BEGAN = "FLOWVI_BENCHMARK_BEGAN"


def flowvi_fit(problem: Any, seconds: float) -> Callable[[], float]:
    import flowvi

    target = flowvi.from_pyro(problem.model, *problem.args)
    fit = flowvi.fit(target, budget=seconds, progress=False)
    return lambda: flowvi.diagnose(fit.draw(5 * DRAWS)).elbo


def numpyro_fit(kind: str, problem: Any, seconds: float) -> Callable[[], float]:
    import jax
    import numpyro
    from numpyro.infer import Trace_ELBO
    from peers.budget import Budget
    from peers.numpyro_fit import trained

    numpyro.enable_x64()
    model, arrays = problem.numpyro(), tuple(x.numpy() for x in problem.args)
    guide, params, _ = trained(kind, model, arrays, Budget(seconds), jax.random.PRNGKey(0))
    elbo, key = Trace_ELBO(num_particles=DRAWS), jax.random.PRNGKey(1)
    return lambda: -float(elbo.loss(key, params, model, guide, *arrays))


def pyro_fit(problem: Any, seconds: float) -> Callable[[], float]:
    import pyro
    import torch
    from peers.budget import Budget
    from pyro.infer import SVI
    from pyro.infer.autoguide import AutoIAFNormal

    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    guide = AutoIAFNormal(problem.model, num_transforms=3)
    budget = Budget(seconds)
    optimiser = pyro.optim.Adam({"lr": budget.step_size()})
    svi = SVI(problem.model, guide, optimiser, _elbo(16))
    while not budget.over():
        for inner in optimiser.optim_objs.values():
            inner.param_groups[0]["lr"] = budget.step_size()
        svi.step(*problem.args)

    def elbo() -> float:
        with torch.no_grad():
            return -float(_elbo(DRAWS).loss(problem.model, guide, *problem.args))

    return elbo


def _elbo(particles: int) -> Any:
    from pyro.infer import Trace_ELBO

    return Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)


def pymc_fit(problem: Any, seconds: float) -> Callable[[], float]:
    import pymc as pm
    import pytensor
    from peers.budget import HIGH, Budget

    size = pytensor.shared(np.array(HIGH))
    begun: list[Budget] = []

    def told(approximation: Any, losses: Any, step: int) -> None:
        if not begun:  # what comes before is compiling
            begun.append(Budget(seconds))
        size.set_value(np.array(begun[0].step_size()))
        if begun[0].over():
            raise StopIteration

    with pm.Model():
        problem.pymc()
        advi = pm.FullRankADVI(random_seed=0)
        approximation = advi.fit(
            math.ceil(FASTEST * seconds),
            callbacks=[told],
            obj_optimizer=pm.adam(learning_rate=size),
            progressbar=False,
        )
    # Of single draws, while the step is at its smallest.
    return lambda: -float(np.mean(approximation.hist[-LAST:]))


METHODS: dict[str, Callable[[Any, float], Callable[[], float]]] = {
    "flowvi": flowvi_fit,
    "numpyro_iaf": lambda problem, seconds: numpyro_fit("iaf", problem, seconds),
    "numpyro_bnaf": lambda problem, seconds: numpyro_fit("bnaf", problem, seconds),
    "pyro_iaf": pyro_fit,
    "pymc_fullrank": pymc_fit,
}


def run(method: str, name: str, seconds: float) -> dict[str, Any]:
    """Train in this process."""
    import torch
    from step_models import PROBLEMS

    torch.set_num_threads(1)
    elbo = METHODS[method](PROBLEMS[name](), seconds)
    wall = time.time() - float(os.environ[BEGAN])
    return {"seconds": wall, "elbo": elbo()}


def elsewhere(method: str, name: str, seconds: float) -> dict[str, Any]:
    """Train in a process of its own."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        env |= {"FLOWVI_CACHE": cache, "PYTENSOR_FLAGS": f"base_compiledir={cache}"}
        env[BEGAN] = str(time.time())
        command = [sys.executable, __file__, "--run", method, name, str(seconds)]
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{method} on {name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--longest", type=float, default=64.0, help="seconds of training")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        method, name, seconds = options.run
        print(json.dumps(run(method, name, float(seconds))))
        return
    print(f"| model | best ELBO | {' | '.join(METHODS)} |")
    print(f"| {' | '.join(['---'] * (len(METHODS) + 2))} |")
    for name in options.models:
        print(line(name, [s for s in GRID if s <= options.longest]), flush=True)


def line(name: str, grid: list[int]) -> str:
    """One row of the table; every run is told on the error stream as it ends."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    best = -float("inf")
    # The longest run of each shows what can be reached.
    for seconds in (grid[-1], *grid[:-1]):
        for method, found in runs.items():
            if seconds != grid[-1] and any(r["elbo"] >= best - ENOUGH for r in found[1:]):
                continue
            if seconds != grid[-1] and not found[0]["elbo"] >= best - ENOUGH:
                continue
            found.append(elsewhere(method, name, seconds))
            best = max(best, found[-1]["elbo"])
            print(name, method, seconds, found[-1], file=sys.stderr, flush=True)
    cells = []
    for found in runs.values():
        good = [r["seconds"] for r in found if r["elbo"] >= best - ENOUGH]
        short = found[0]["elbo"] - best
        below = f"{short:+.2f} nats" if short > -1e4 else f"{short:.0e} nats"
        below = below if math.isfinite(short) else "no finite ELBO"
        cells.append(f"{min(good):.1f} s" if good else below)
    return f"| {name} | {best:.2f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
