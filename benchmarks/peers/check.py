"""Are the ports the models they stand for? Their log densities at reference draws.

    python -m peers.check [--shared DIR] [NAME ...]

At five reference draws, in constrained space and without Jacobians, the log
density of each port is compared with that of models/NAME.py. The difference
must be the same at all five; the table shows its mean, its range, and the
largest error of a deterministic value relative to its size. Exits with 1 if a
range exceeds 1e-6, or such an error 1e-6 (1e-4 where a Cholesky factor of a
nearly singular matrix stands between).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import corpus
import jax.numpy as jnp
import numpy as np
import numpyro
import pymc as pm
import pyro
import torch
from numpyro.infer.util import log_density

from . import numpyro_models, numpyro_series, pymc_models, pymc_series, pyro_models

POINTS = 5
TOLERANCE = 1e-6
LOOSE = 1e-4
WRONG = "  WRONG"
# What a port computes from its latents and the reference has beside them.
DERIVED = {
    "eight_schools_noncentered": ("theta",),
    "garch11": ("alpha1", "beta1"),
    "gp_pois_regr": ("f",),
}
Point = dict[str, np.ndarray]
# Log density and derived values at the latents of a point.
Scored = tuple[float, Mapping[str, np.ndarray]]
Port = Callable[[Point], Scored]


def of_pyro(model: Callable[..., Any], args: tuple[Any, ...]) -> Port:
    def score(latents: Point) -> Scored:
        values = {name: torch.as_tensor(value) for name, value in latents.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(*args)
        sites = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}
        return float(trace.log_prob_sum()), {n: np.asarray(v) for n, v in sites.items()}

    return score


def of_numpyro(model: Callable[..., Any], args: tuple[Any, ...]) -> Port:
    def score(latents: Point) -> Scored:
        values = {name: jnp.asarray(value) for name, value in latents.items()}
        log_p, trace = log_density(model, args, {}, values)
        return float(log_p), {n: np.asarray(s["value"]) for n, s in trace.items() if "value" in s}

    return score


def of_pymc(declare: Callable[..., Any], args: tuple[Any, ...]) -> Port:
    with pm.Model() as model:
        declare(*args)
    log_p = model.compile_logp(jacobian=False)
    derived = model.compile_fn(
        model.replace_rvs_by_values(model.deterministics),
        inputs=model.value_vars,
        on_unused_input="ignore",
    )

    def score(latents: Point) -> Scored:
        values = {}
        for rv in model.free_RVs:
            value, transform = np.asarray(latents[rv.name]), model.rvs_to_transforms[rv]
            if transform is not None:
                value = transform.forward(value, *rv.owner.inputs).eval()
            values[model.rvs_to_values[rv].name] = value
        found = zip(model.deterministics, derived(values), strict=True)
        return float(log_p(values)), {rv.name: value for rv, value in found}

    return score


def points(reference: Mapping[str, np.ndarray]) -> list[Point]:
    """Reference draws, far apart; the triangle of `garch11` also as a simplex."""
    found = []
    for row in np.linspace(0, len(next(iter(reference.values()))) - 1, POINTS).astype(int):
        point = {name: draws[row] for name, draws in reference.items()}
        if "beta1" in point:
            first, second = point["alpha1"], point["beta1"]
            point["shares"] = np.stack([first, second, 1 - first - second])
        found.append(point)
    return found


def judge(port: Port, at: list[Point], original: list[float], derived: tuple[str, ...]) -> str:
    """The numbers of a row of the table, with a mark where the port is wrong."""
    difference, largest = [], 0.0
    for point, truth in zip(at, original, strict=True):
        log_p, found = port({n: v for n, v in point.items() if n not in derived})
        difference.append(log_p - truth)
        for name in derived:
            error = np.abs(found[name] - point[name]).max() / np.abs(point[name]).max()
            largest = max(largest, float(error))
    spread = float(np.ptp(difference))
    right = spread < TOLERANCE and largest < (LOOSE if "f" in derived else TOLERANCE)
    return f"{np.mean(difference):>12.3g}{spread:>10.1e}{largest:>10.1e}{'' if right else WRONG}"


def rows(name: str, folder: Path) -> Iterator[str]:
    """A row of the table for each port of a posterior."""
    module = corpus.load_model(name)
    tensors = corpus.arguments(module, name, folder)
    arrays = tuple(tensor.numpy() for tensor in tensors)
    at, derived = points(corpus.reference(folder)), DERIVED.get(name, ())
    # The file of `garch11` has latents where its ports have a simplex.
    given = () if name == "garch11" else derived
    score = of_pyro(module.model, tensors)
    original = [score({n: v for n, v in p.items() if n not in given})[0] for p in at]
    ports = {
        "pyro": of_pyro(pyro_models.model_of(name, module), tensors),
        "numpyro": of_numpyro((numpyro_models.MODELS | numpyro_series.MODELS)[name], arrays),
        "pymc": of_pymc((pymc_models.MODELS | pymc_series.MODELS)[name], arrays),
    }
    for library, port in ports.items():
        yield f"{name:<28}{library:<9}{judge(port, at, original, derived)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)
    posteriors = options.shared / "posteriors"
    print(f"{'posterior':<28}{'library':<9}{'difference':>12}{'range':>10}{'derived':>10}")
    names = options.names or sorted(p.name for p in posteriors.iterdir() if p.is_dir())
    wrong = False
    for name in names:
        for row in rows(name, posteriors / name):
            print(row, flush=True)
            wrong |= row.endswith(WRONG)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
