"""Guides of the weights of a network, by what they predict: data that scikit-learn ships.

python benchmarks/weights.py --splits 5 --budget 20

For each split of 80 and 20 %: the log predictive density of a test row and the root mean square
error of the mean, in units of the standard deviation of the training data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_linnerud
from torch import Tensor, nn

import flowvi
from flowvi.draws import Draws, tabulate
from flowvi.init import ascend, laplace

DRAWS = 500
ENSEMBLE = 5


def datasets() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs by name."""
    x, y = load_diabetes(return_X_y=True)
    found = {"diabetes": (torch.tensor(x), torch.tensor(y))}
    # Waist from three exercises, on twenty men.
    x, y = load_linnerud(return_X_y=True)
    found["linnerud"] = (torch.tensor(x), torch.tensor(y[:, 1]))
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
    return tabulate(target, [[(z, torch.zeros(len(z), dtype=z.dtype))]])


def modes(target: flowvi.Target, seed: int, many: int) -> Draws:
    """Modes that L-BFGS finds from random starts, their noise no smaller than the prior allows."""
    generator = torch.Generator().manual_seed(seed)
    starts = 0.5 * torch.randn(many, target.dim, generator=generator, dtype=target.dtype)
    return points(target, torch.stack([ascend(target, start)[-1] for start in starts]))


def laplace_draws(target: flowvi.Target, seed: int) -> Draws:
    """Draws of the Laplace approximation at one mode."""
    mode = torch.as_tensor(modes(target, seed, 1).z[0, 0])
    g = laplace(target, mode, "Laplace")
    eps = torch.randn(DRAWS, target.dim, generator=torch.Generator().manual_seed(seed)).to(mode)
    return points(target, mode + eps @ g.scale_tril.mT)


def guided(guide: Any) -> Callable[[flowvi.Target, int, float], Draws]:
    """Draws of a fitted guide."""

    def run(target: flowvi.Target, seed: int, budget: float) -> Draws:
        fit = flowvi.fit(target, guide, seed=seed, budget=budget, progress=False)
        return fit.draw(DRAWS, seed=seed)

    return run


def nuts(target: flowvi.Target, seed: int, budget: float) -> Draws:
    """Markov chains in the coordinates of a full-rank Gaussian."""
    fit = flowvi.fit(target, "fullrank", seed=seed, budget=budget, progress=False)
    return flowvi.neutra(fit, seed=seed).thinned(DRAWS)


LAST = flowvi.Blocks({"2.*": "realnvp", "*": "meanfield"}, {"*": "2.*"}, {"2.*": {"depth": 6}})
METHODS: dict[str, Callable[[flowvi.Target, int, float], Draws]] = {
    "MAP": lambda target, seed, budget: modes(target, seed, 1),
    "ensemble of 5 MAPs": lambda target, seed, budget: modes(target, seed, ENSEMBLE),
    "Laplace": lambda target, seed, budget: laplace_draws(target, seed),
    "mean field": guided("meanfield"),
    "low rank": guided("lowrank"),
    "full rank": guided("fullrank"),
    "flow on the last layer": guided(LAST),
    "flow on all weights": guided("realnvp"),
    "hypernetwork flow": guided("realnvp"),
    "NUTS": nuts,
}


def one(name: str, parts: list[Tensor], hidden: int, seed: int, budget: float) -> list[float]:
    """Log predictive density of a row, error of the mean, seconds."""
    x, y, x_test, y_test = parts
    prior = "unit_scales" if name == "hypernetwork flow" else "normal"
    model = flowvi.bayesian(network(x.shape[1], hidden, seed), prior)
    target = flowvi.from_pyro(model, x, y)
    start = time.perf_counter()
    draws = METHODS[name](target, seed, budget)
    seconds = time.perf_counter() - start
    found = flowvi.predict(draws, x_test, y_test)
    error = found.mean("output") if "output" in found.values else None
    if error is None:
        error = flowvi.predict(draws, x_test).mean("output")
    rmse = float(np.sqrt(np.mean((error - y_test.numpy()) ** 2)))
    return [float(found.log_density("y").mean()), rmse, seconds]


def main() -> None:
    """Print one row for each data set and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of a fit")
    parser.add_argument("--hidden", type=int, default=10)
    parser.add_argument("--data", nargs="*", default=["diabetes"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    print("| data | method | log predictive density | RMSE | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for data in options.data:
        for name in options.methods:
            rows = np.array(
                [
                    one(name, split(*datasets()[data], seed), options.hidden, seed, options.budget)
                    for seed in range(options.splits)
                ]
            )
            mean, error = rows.mean(0), rows.std(0, ddof=1) / len(rows) ** 0.5
            cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean[:2], error[:2], strict=True)]
            print(f"| {data} | {name} | {' | '.join(cells)} | {mean[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
