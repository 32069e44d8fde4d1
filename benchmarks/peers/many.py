"""One method on one model of many latents, in this process; prints a line of JSON.

    python -m peers.many METHOD NAME --data FILE.npz --out FILE.npz [--seconds 60] [--seed 0]

Methods: flowvi's default call, Pyro's guides, and Laplace's approximation of all latents. Means and
sds of every latent go to the file. Seconds are of the processor, from capture to draws; memory is
the most that the process held, and what it held after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import corpus
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch import Tensor

import flowvi

from .budget import Budget

Values = dict[str, np.ndarray]
LARGEST = 3000  # latents, of a matrix that Laplace's method keeps
PARTICLES = 100
PYRO = {
    "pyro_normal": autoguide.AutoNormal,
    "pyro_lowrank": autoguide.AutoLowRankMultivariateNormal,
    "pyro_hierarchical": autoguide.AutoHierarchicalNormalMessenger,
}


def processor() -> float:
    """Seconds of this process and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


class ProcessorBudget(Budget):
    """Seconds of the processor in place of those of the clock."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds, processor())

    def spent(self) -> float:
        return processor() - self.began


@dataclass(frozen=True)
class Run:
    """What is asked of a method."""

    args: tuple[Tensor, ...]
    seconds: float
    seed: int
    draws: int
    guide: str


@dataclass
class Answer:
    """Moments of latents, (draw, *shape) draws or their weighted sums, and facts."""

    facts: dict[str, Any]
    mean: Values = field(default_factory=dict)
    sd: Values = field(default_factory=dict)


def moments(values: Values, facts: dict[str, Any], weight: np.ndarray | None = None) -> Answer:
    """Of draws, (draw, *shape) by name."""
    n = len(next(iter(values.values())))
    weight = np.full(n, 1 / n) if weight is None else weight
    answer = Answer(facts)
    for name, v in values.items():
        answer.mean[name] = mean = np.tensordot(weight, v, 1)
        answer.sd[name] = np.sqrt(np.tensordot(weight, (v - mean) ** 2, 1))
    return answer


def by_flowvi(model: Callable[..., Any], run: Run) -> Answer:
    """The default call; draws are weighted by their smoothed weights."""
    target = flowvi.from_pyro(model, *run.args)
    fit = flowvi.fit(target, run.guide, seed=run.seed, progress=False)
    draws = fit.draw(run.draws, seed=run.seed)
    diagnosis = flowvi.diagnose(draws)
    values = draws.values if draws.mcmc else flowvi.resample(draws, run.seed, 4 * run.draws).values
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in values.items()}
    facts = {
        "dim": target.dim,
        "verdict": diagnosis.verdict,
        "khat": float(diagnosis.khat),
        "log_evidence": diagnosis.log_evidence,
        "log_evidence_se": diagnosis.log_evidence_se,
        "note": "NUTS" if draws.mcmc else str(fit.meta["guide"]),
        "log": fit.log,
    }
    return moments(flat, facts)


def by_pyro(kind: type) -> Callable[[Callable[..., Any], Run], Answer]:
    """A guide of Pyro, trained by Adam for the seconds; the bound takes the evidence's place."""

    def fit(model: Callable[..., Any], run: Run) -> Answer:
        guide, budget = kind(model), ProcessorBudget(run.seconds)
        optimiser = Adam({"lr": budget.step_size()})
        svi, steps = SVI(model, guide, optimiser, Trace_ELBO()), 0
        while steps == 0 or not budget.over():
            for inner in optimiser.optim_objs.values():
                inner.param_groups[0]["lr"] = budget.step_size()
            svi.step(*run.args)
            steps += 1
        with torch.no_grad():
            draws = [replayed(model, guide, run.args) for _ in range(run.draws)]
            bound = -Trace_ELBO(num_particles=PARTICLES).loss(model, guide, *run.args)
        values = {name: np.stack([d[name] for d in draws]) for name in draws[0]}
        return moments(values, {"bound": float(bound), "note": f"{steps} steps"})

    return fit


def replayed(model: Callable[..., Any], guide: Any, args: tuple[Tensor, ...]) -> Values:
    """Latents and deterministics of a draw of a guide."""
    trace = poutine.trace(guide).get_trace(*args)
    again = poutine.trace(poutine.replay(model, trace)).get_trace(*args)
    return {
        name: node["value"].numpy()
        for name, node in again.nodes.items()
        if node["type"] == "sample"
        and (not node["is_observed"] or node["infer"].get("_deterministic"))
        and type(node["fn"]).__name__ != "_Subsample"
    }


def by_laplace(model: Callable[..., Any], run: Run) -> Answer:
    """A normal at the mode of all latents, in unconstrained space."""
    target = flowvi.from_pyro(model, *run.args)
    if target.dim > LARGEST:
        return Answer({"note": f"{target.dim} latents: their matrix is too large"})
    z = torch.zeros(1, target.dim, dtype=target.dtype, requires_grad=True)
    search = torch.optim.LBFGS(
        [z], max_iter=2000, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = -target.log_prob(z).sum()
        loss.backward()
        return loss

    search.step(closure)
    log_p = target.log_prob(z).sum()
    (gradient,) = torch.autograd.grad(log_p, z, create_graph=True)
    rows = [
        torch.autograd.grad(gradient[0, i], z, retain_graph=True)[0][0] for i in range(target.dim)
    ]
    factor, failed = torch.linalg.cholesky_ex(-torch.stack(rows))
    if failed or not torch.isfinite(gradient).all():
        return Answer({"dim": target.dim, "note": "no mode: the density of all latents has none"})
    step = torch.cholesky_solve(gradient.detach().T, factor)
    if (decrement := float(gradient.detach() @ step)) > 1e-3:
        return Answer({"dim": target.dim, "note": f"no mode found: decrement {decrement:.2g}"})
    noise = torch.randn(run.draws, target.dim, dtype=target.dtype)
    offsets = torch.linalg.solve_triangular(factor.T, noise.T, upper=True).T
    values = target.constrain(z.detach() + offsets)
    half_log = target.dim / 2 * np.log(2 * np.pi) - float(factor.diagonal().log().sum())
    facts = {"dim": target.dim, "log_evidence": float(log_p) + half_log, "note": ""}
    return moments({name: v.numpy() for name, v in values.items()}, facts)


METHODS: dict[str, Callable[[Callable[..., Any], Run], Answer]] = {
    "flowvi": by_flowvi,
    "laplace": by_laplace,
    **{name: by_pyro(kind) for name, kind in PYRO.items()},
}


def peak() -> float:
    """Most memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--guide", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.method != "flowvi":
        torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(options.seed)
    model = corpus.load_model(options.name).model
    with np.load(options.data) as file:
        args = tuple(torch.tensor(file[name]) for name in file.files)
    run = Run(args, options.seconds, options.seed, options.draws, options.guide)
    before, began = peak(), processor()
    try:
        answer = METHODS[options.method](model, run)
    except Exception as error:  # whatever a library raises is its result here
        answer = Answer({"note": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]})
    measured = {"cpu": processor() - began, "peak_mb": peak(), "base_mb": before}
    found: dict[str, Any] = {f"mean/{name}": v for name, v in answer.mean.items()}
    found |= {f"sd/{name}": v for name, v in answer.sd.items()}
    np.savez(options.out, **found)
    print(json.dumps(measured | answer.facts))


if __name__ == "__main__":
    main()
