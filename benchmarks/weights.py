"""Guides of the weights of a network, by what they predict: data that scikit-learn ships or makes.

python benchmarks/weights.py --data diabetes linnerud friedman --splits 5 --budget 10

For each split of 80 and 20 %: the log predictive density of a test row and the root mean square
error of the mean, in units of the standard deviation of the training data. Compared in pairs, on
the same split: with mean field, and, on the first splits, with NUTS, by the root mean square
difference of the log predictive densities of test rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from sklearn.datasets import load_diabetes, load_linnerud, make_friedman1
from torch import Tensor, nn

import flowvi
from flowvi.bnn import Bayesian
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import tabulate
from flowvi.initialization.ascents import ascend
from flowvi.initialization.candidates import laplace

DRAWS = 500
ENSEMBLE = 5
MEAN_FIELD, NUTS = "mean field", "NUTS"


class Task(NamedTuple):
    """What a method is given: the model, its data, the captured target, a seed, seconds."""

    model: Bayesian
    data: tuple[Tensor, Tensor]
    target: flowvi.Target
    seed: int
    budget: float


Method = Callable[[Task], Draws]


class Found(NamedTuple):
    """Log predictive densities of test rows, error of the mean, processor seconds."""

    log_density: np.ndarray
    rmse: float
    seconds: float


def datasets() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs by name."""
    x, y = load_diabetes(return_X_y=True)
    found = {"diabetes": (torch.tensor(x), torch.tensor(y))}
    # Waist from three exercises, on twenty men.
    x, y = load_linnerud(return_X_y=True)
    found["linnerud"] = (torch.tensor(x), torch.tensor(y[:, 1]))
    # Synthetic: five of ten inputs count.
    x, y = make_friedman1(n_samples=100, noise=1.0, random_state=0)
    found["friedman"] = (torch.tensor(x), torch.tensor(y))
    return found


def split(x: Tensor, y: Tensor, seed: int) -> list[Tensor]:
    """Training inputs and outputs, then those of the test, standardised by the training rows."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return [x[train], y[train], x[test], y[test]]


def network(inputs: int, hidden: int, seed: int) -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def points(target: flowvi.Target, z: Tensor) -> Draws:
    """A table of given points."""
    return tabulate(target, len(z), [[(z, torch.zeros(len(z), dtype=z.dtype))]])


def modes(target: flowvi.Target, seed: int, many: int) -> Draws:
    """Modes that L-BFGS finds from random starts, their noise no smaller than the prior allows."""
    generator = torch.Generator().manual_seed(seed)
    starts = 0.5 * torch.randn(many, target.dim, generator=generator, dtype=target.dtype)
    return points(target, torch.stack([ascend(target, start)[-1] for start in starts]))


def laplace_draws(target: flowvi.Target, seed: int) -> Draws:
    """Draws of the Laplace approximation at one mode, eigenvalues of the Hessian made positive."""
    mode = torch.as_tensor(modes(target, seed, 1).z[0, 0])
    g = laplace(target, mode, "Laplace")
    eps = torch.randn(DRAWS, target.dim, generator=torch.Generator().manual_seed(seed)).to(mode)
    return points(target, mode + eps @ g.scale_tril.mT)


def guided(guide: Any) -> Method:
    """Draws of a fitted guide."""

    def run(task: Task) -> Draws:
        fit = flowvi.fit(task.target, guide, seed=task.seed, budget=task.budget, progress=False)
        return fit.draw(DRAWS, seed=task.seed)

    return run


def nuts(task: Task) -> Draws:
    """Markov chains in the coordinates of mean field, which take as long as they take."""
    fit = flowvi.fit(task.target, "meanfield", seed=task.seed, budget=task.budget, progress=False)
    found = flowvi.neutra(fit, 100, 150, 2, seed=task.seed, progress=False)
    return found.thinned(DRAWS // 2)


def of_pyro(kind: Callable[..., Any]) -> Method:
    """Draws of one of Pyro's own guides, trained by its SVI for as long as the others."""

    def run(task: Task) -> Draws:
        pyro.clear_param_store()
        pyro.set_rng_seed(task.seed)
        guide = kind(task.model)
        svi = SVI(task.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        began = time.perf_counter()
        while time.perf_counter() - began < task.budget:
            svi.step(*task.data)
        values = [guide(*task.data) for _ in range(DRAWS)]
        sites = {
            name: torch.stack([v[name].detach() for v in values]) for name in task.target.sites
        }
        return points(task.target, task.target.unconstrain(sites))

    return run


LAST = flowvi.Blocks({"2.*": "realnvp", "*": "meanfield"}, {"*": "2.*"}, {"2.*": {"depth": 6}})
METHODS: dict[str, Method] = {
    MEAN_FIELD: guided("meanfield"),
    NUTS: nuts,
    "MAP": lambda task: modes(task.target, task.seed, 1),
    "ensemble of 5 MAPs": lambda task: modes(task.target, task.seed, ENSEMBLE),
    "Laplace": lambda task: laplace_draws(task.target, task.seed),
    "low rank": guided("lowrank"),
    "flow on the last layer": guided(LAST),
    "multiplicative flow": guided("multiplicative"),
    "hypernetwork flow": guided("realnvp"),
    "flow on all weights": guided("realnvp"),
    "Pyro AutoNormal": of_pyro(AutoNormal),
    "Pyro AutoIAFNormal": of_pyro(AutoIAFNormal),
}


def one(name: str, parts: list[Tensor], hidden: int, seed: int, budget: float) -> Found:
    """Fit and predict."""
    x, y, x_test, y_test = parts
    prior = "unit_scales" if name == "hypernetwork flow" else "normal"
    model = flowvi.bayesian(network(x.shape[1], hidden, seed), prior)
    target = flowvi.from_pyro(model, x, y)
    began = time.process_time()
    draws = METHODS[name](Task(model, (x, y), target, seed, budget))
    seconds = time.process_time() - began
    scores = flowvi.predict(draws, x_test, y_test).log_density("y")
    mean = flowvi.predict(draws, x_test).mean("output")
    return Found(scores, float(np.sqrt(np.mean((mean - y_test.numpy()) ** 2))), seconds)


def row(name: str, found: Sequence[Found], plain: Sequence[Found], truth: Sequence[Found]) -> str:
    """Cells of the table: over the splits, and in pairs with mean field and NUTS."""
    scores = np.array([f.log_density.mean() for f in found])
    before = np.array([f.log_density.mean() for f in plain[: len(found)]])
    cells = [name, _mean(scores)]
    if name == MEAN_FIELD:
        cells += ["", ""]
    else:
        cells += [_mean(scores - before), f"{(scores > before).sum()} of {len(scores)}"]
    cells.append(_mean(np.array([f.rmse for f in found])))
    far = [
        np.sqrt(np.mean((f.log_density - t.log_density) ** 2))
        for f, t in zip(found, truth, strict=False)
    ]
    cells.append("" if name == NUTS or not far else f"{np.mean(far):.3f}")
    cells.append(f"{np.mean([f.seconds for f in found]):.1f}")
    return f"| {' | '.join(cells)} |"


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def main() -> None:
    """Print one row for each data set and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--nuts", type=int, default=2, help="splits on which NUTS runs")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of a fit")
    parser.add_argument("--hidden", type=int, default=5)
    parser.add_argument("--data", nargs="*", default=["diabetes"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    # As the data are: Pyro's guides are made in the default precision.
    torch.set_default_dtype(torch.float64)
    print("| method | log density | less mean field's | better on | RMSE | from NUTS | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for data in options.data:
        done: dict[str, list[Found]] = {}
        for name in {MEAN_FIELD: None, **dict.fromkeys(options.methods)}:
            splits = range(options.nuts if name == NUTS else options.splits)
            parts = [split(*datasets()[data], seed) for seed in splits]
            done[name] = [
                one(name, p, options.hidden, seed, options.budget) for seed, p in enumerate(parts)
            ]
        print(f"| **{data}** | | | | | | |")
        for name, found in done.items():
            print(row(name, found, done[MEAN_FIELD], done.get(NUTS, [])), flush=True)


if __name__ == "__main__":
    main()
