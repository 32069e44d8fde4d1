"""Fit the posteriors of the corpus with Pyro's own guides, for a given number of seconds.

    python benchmarks/peers.py [--shared DIR] [--seconds 30] [--seed 0] [--out FILE] [NAME ...]

Each fit runs in a process of its own, on one thread: SVI with `Trace_ELBO`, one
draw a step, Adam with a step size that falls from 0.01 to 0.0001 over the time,
and `init_to_median`. Per posterior and guide: the largest error of any mean (in
posterior sds) and of any sd (relative) of 4000 draws, the steps that the time
was enough for, and the seconds. The errors are those of benchmarks/posteriors.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from posteriors import AIM, ROOT, errors, load_model
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, init_to_median
from torch import Tensor

GUIDES = {
    "AutoMultivariateNormal": lambda model: AutoMultivariateNormal(model, init_to_median),
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, init_loc_fn=init_to_median),
}
FIRST, LAST = 1e-2, 1e-4
DRAWS = 4000
# Seconds beyond the budget before a process is given up.
GRACE = 240


def fit(name: str, folder: Path, kind: str, seconds: float, seed: int) -> dict[str, Any]:
    """Fit one posterior with one guide, in this process."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    with np.load(folder / "reference.npz") as z:
        reference = {k: z[k] for k in z.files}
    module = load_model(name)
    args = module.data() if name.startswith("eight") else module.data(str(folder / "data.json"))
    guide = GUIDES[kind](module.model)
    began = time.perf_counter()
    steps = _train(module.model, guide, args, seconds)
    spent = time.perf_counter() - began
    found = Predictive(module.model, guide=guide, num_samples=DRAWS)(*args)
    values = {
        k: _of_site(v.detach().numpy(), reference[k]) for k, v in found.items() if k in reference
    }
    mean, sd = errors(values, reference)
    return {"mean": mean, "sd": sd, "steps": steps, "seconds": spent}


def _train(model: Any, guide: Any, args: tuple[Tensor, ...], seconds: float) -> int:
    optimiser = pyro.optim.ClippedAdam({"lr": FIRST})
    svi = SVI(model, guide, optimiser, Trace_ELBO())
    began, steps = time.perf_counter(), 0
    while (done := (time.perf_counter() - began) / seconds) < 1:
        rate = FIRST * (LAST / FIRST) ** done
        for each in optimiser.optim_objs.values():
            each.param_groups[0]["lr"] = rate
        loss = svi.step(*args)
        if not math.isfinite(loss) and steps > 1000:
            raise ValueError(f"the loss is {loss} at step {steps}")
        steps += 1
    return steps


def _of_site(draws: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Draws (N, *shape), without the plate dimensions of size one that Predictive adds."""
    return draws.reshape(len(draws), *reference.shape[1:])


def row(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fit in a process of its own, and say what became of it."""
    command = [sys.executable, __file__, "--one", kind, "--seconds", str(options.seconds)]
    command += ["--seed", str(options.seed), "--shared", str(options.shared), name]
    found: dict[str, Any] = {"name": name, "method": kind}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.seconds + GRACE, check=False
        )
    except subprocess.TimeoutExpired:
        return {**found, "failure": "gave no draws in time"}
    if done.returncode:
        return {**found, "failure": done.stderr.strip().splitlines()[-1][:80]}
    return {**found, **json.loads(done.stdout.splitlines()[-1])}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['name']:<28}{row['method']:<24}"
    if "failure" in row:
        return head + f"failed: {row['failure']}"
    return head + f"{row['mean']:>9.3f}{row['sd']:>9.3f}{row['steps']:>8}{row['seconds']:>8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", choices=GUIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where rows are kept")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    posteriors = options.shared / "posteriors"
    names = options.names or sorted(p.name for p in posteriors.iterdir() if p.is_dir())
    if options.one:
        warnings.simplefilter("ignore")
        folder = posteriors / names[0]
        print(json.dumps(fit(names[0], folder, options.one, options.seconds, options.seed)))
        return
    print(f"{'posterior':<28}{'method':<24}{'mean':>9}{'sd':>9}{'steps':>8}{'s':>8}")
    rows = []
    for name in names:
        for kind in GUIDES:
            rows.append(row(name, kind, options))
            print(line(rows[-1]), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    for kind in GUIDES:
        mine = [r for r in rows if r["method"] == kind]
        good = sum(max(r.get("mean", np.inf), r.get("sd", np.inf)) <= AIM for r in mine)
        print(f"{kind}: every mean and sd within {AIM} on {good} of {len(mine)}")


if __name__ == "__main__":
    main()
