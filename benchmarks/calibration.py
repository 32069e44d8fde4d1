"""Simulation-based calibration of the default guide on four models.

    python benchmarks/calibration.py [--fits 200] [--processes 1] [--out results/calibration]
                                     [--guide realnvp] [--steps 150] [--lr 0.01] [MODEL ...]
    python benchmarks/calibration.py --amortised realnvp nsf_coupling --fits 1000

Per model: adjusted p-values of the tests of uniform ranks (plain and resampled
draws) and of symmetry, the verdicts of the fits, and the seconds. As a check
that the tests bite, the same ranks are tested once more after planted faults:
draws whose spread is 0.8 of what it should be, and draws shifted by 0.2 sds.
Finished fits are kept in DIR/MODEL.npz, from where the same call goes on; the
rank pictures are DIR/MODEL.png. With --amortised one guide that reads the data is trained
on ROWS simulated data sets, by each flow that is named, and judged by other ones.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import norm
from torch import Tensor

import flowvi
from flowvi import RowFit
from flowvi.diagnostics.calibration import Calibration, adjusted, uniformity

DRAWS, LEVELS = 1000, 127


def schools(y: Tensor, s: Tensor) -> None:
    """Eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("school", len(s)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, s), obs=y)


def logistic(y: Tensor, x: Tensor) -> None:
    """Logistic regression on three columns and an intercept."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ w), obs=y)


def counts(y: Tensor, group: Tensor) -> None:
    """Counts in groups, whose rates have a common mean and spread."""
    mean = pyro.sample("mean", dist.Normal(1.0, 1.0))
    spread = pyro.sample("spread", dist.Gamma(2.0, 4.0))
    with pyro.plate("group", 6):
        rate = pyro.sample("rate", dist.Normal(mean, spread))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate[group].exp()), obs=y)


def line(y: Tensor, x: Tensor) -> None:
    """A regression line whose noise is unknown."""
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(level + slope * x, sigma), obs=y)


def _data() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    x = torch.randn(40, 3, generator=generator)
    group = torch.arange(30) % 6
    return {
        "schools": (schools, (torch.zeros(8), s)),
        "logistic": (logistic, (torch.zeros(40), x)),
        "counts": (counts, (torch.zeros(30), group)),
        "line": (line, (torch.zeros(20), torch.linspace(-1.0, 1.0, 20))),
    }


def schools_rows(y: Tensor, s: Tensor) -> None:
    """As `schools`, one data set a row."""
    with pyro.plate("data", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        mean = mu[..., None] + tau[..., None] * eta
        pyro.sample("y", dist.Normal(mean, s).to_event(1), obs=y)


def logistic_rows(y: Tensor, x: Tensor) -> None:
    """As `logistic`, one data set a row."""
    with pyro.plate("data", len(y)):
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        logits = intercept[..., None] + w @ x.mT
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def counts_rows(y: Tensor, group: Tensor) -> None:
    """As `counts`, one data set a row."""
    with pyro.plate("data", len(y)):
        mean = pyro.sample("mean", dist.Normal(1.0, 1.0))
        spread = pyro.sample("spread", dist.Gamma(2.0, 4.0))
        rates = dist.Normal(mean[..., None], spread[..., None]).expand([*mean.shape, 6])
        rate = pyro.sample("rate", rates.to_event(1))
        pyro.sample("y", dist.Poisson(rate[..., group].exp()).to_event(1), obs=y)


def line_rows(y: Tensor, x: Tensor) -> None:
    """As `line`, one data set a row."""
    with pyro.plate("data", len(y)):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        mean = level[..., None] + slope[..., None] * x
        pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


ROWS = {
    "schools": schools_rows,
    "logistic": logistic_rows,
    "counts": counts_rows,
    "line": line_rows,
}


def amortised(name: str, args: tuple[Tensor, ...], flow: str, rows: int, epochs: int) -> RowFit:
    """A guide that reads data sets, trained on simulated ones."""
    like, constant = args
    blank = flowvi.from_pyro(ROWS[name], like.expand(rows, -1), constant, local="data")
    y = torch.as_tensor(blank.prior(rows, seed=1)["y"], dtype=like.dtype)
    target = flowvi.from_pyro(ROWS[name], y, constant, local="data")
    return flowvi.fit(target, flow, epochs=epochs, seed=1, progress=False)


def faulty(ranks: np.ndarray, scale: float, shift: float) -> float:
    """Smallest adjusted p-value of the ranks if draws were narrower, or shifted."""
    u = (ranks + 0.5) / (LEVELS + 1)
    moved = norm.cdf((norm.ppf(u) + shift) / scale)
    return adjusted(*uniformity(np.floor(moved * (LEVELS + 1)).astype(int), LEVELS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--guide", default="realnvp")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--amortised", nargs="+", default=[], metavar="FLOW")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/calibration"))
    parser.add_argument("names", nargs="*", metavar="MODEL")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(
        f"{'model':<22}{'fits':>6}{'plain':>9}{'resampled':>11}{'symmetric':>11}"
        f"{'sd x 0.8':>10}{'shift 0.2':>11}{'s':>8}  verdicts"
    )
    for name, (model, args) in _data().items():
        if options.names and name not in options.names:
            continue
        for flow in options.amortised:
            began = time.perf_counter()
            one = amortised(name, args, flow, options.rows, options.epochs)
            found = flowvi.sbc(one, fits=options.fits, draws=DRAWS, levels=LEVELS)
            show(f"{name}, {flow}", found, time.perf_counter() - began, options.out)
        if options.amortised:
            continue
        began = time.perf_counter()
        with ExitStack() as stack:
            executor = None
            if options.processes > 1:
                pool = ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"))
                executor = stack.enter_context(pool)
            found = flowvi.sbc(
                model,
                *args,
                fits=options.fits,
                draws=DRAWS,
                levels=LEVELS,
                file=options.out / f"{name}.npz",
                executor=executor,
                guide=options.guide,
                steps=options.steps,
                lr=options.lr,
            )
        show(name, found, time.perf_counter() - began, options.out)


def show(name: str, found: Calibration, seconds: float, folder: Path) -> None:
    """Print a row of the table, and write the picture of its ranks."""
    verdicts = {v: found.verdicts.count(v) for v in dict.fromkeys(found.verdicts)}
    print(
        f"{name:<22}{len(found.plain):>6}{found.uniform['plain']:>9.2g}"
        f"{found.uniform['resampled']:>11.2g}{found.symmetric:>11.2g}"
        f"{faulty(found.resampled, 0.8, 0.0):>10.1g}{faulty(found.resampled, 1.0, 0.2):>11.1g}"
        f"{seconds:>8.0f}  {', '.join(f'{n} x {v}' for v, n in verdicts.items())}",
        flush=True,
    )
    picture(found, folder / f"{name.replace(', ', '_')}.png")


def picture(found: Calibration, file: Path) -> None:
    """Write the ranks of the worst scalars."""
    import matplotlib as mpl

    mpl.use("agg")
    from flowvi.plots import plot_sbc

    plot_sbc(found).flat[0].figure.savefig(file)


if __name__ == "__main__":
    main()
