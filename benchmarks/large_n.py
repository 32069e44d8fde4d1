"""The default fit of regressions with very many rows, against Laplace's approximation.

    python benchmarks/large_n.py [--rows 1000000] [--coefficients 20]
        [--likelihood logistic poisson normal] [--batch 0 1000]

For each likelihood and batch size (0: all rows in the plate) a line of the model, rows, seconds of
the processor in `from_pyro`, `fit` and `fit.draw(1000)`, peak memory of the process beyond that
with the data and torch loaded, the fit's verdict, the largest errors of means (in sd) and of sds
(relative) of its draws and of its start, and the error of the log evidence. The truth is Newton's
method with the Hessian written by hand, in double precision. With N = 10^6 rows the posterior is
normal to about 10^-3 of its widths; 1,000 draws alone have errors of a mean of 0.03 sd and of an
sd of 2 %, times 2 to 3 for the largest of 20.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import flowvi

PRIOR_SD = 2.0
LIKELIHOODS = ("logistic", "poisson", "normal")
DRAWS = 1000


def data(rows: int, coefficients: int, likelihood: str) -> tuple[Tensor, Tensor]:
    """Predictors, the first of them 1, and outcomes, in single precision: (N, D) and (N)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, coefficients, generator=g)
    x[:, 0] = 1.0
    eta = x @ (torch.randn(coefficients, generator=g) / coefficients**0.5)
    if likelihood == "logistic":
        return x, (torch.rand(rows, generator=g) < eta.sigmoid()).float()
    if likelihood == "poisson":
        return x, torch.poisson(torch.exp(0.5 * eta), generator=g)
    return x, eta + torch.randn(rows, generator=g)


def regression(x: Tensor, y: Tensor, likelihood: str, batch: int = 0) -> None:
    """The model: normal coefficients, and a plate over the rows, subsampled or not."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), PRIOR_SD).to_event(1))
    with pyro.plate("row", len(x), subsample_size=batch or None) as rows:
        if batch:
            x, y = x[rows], y[rows]
        eta = x @ weight
        if likelihood == "logistic":
            pyro.sample("y", dist.Bernoulli(logits=eta), obs=y)
        elif likelihood == "poisson":
            pyro.sample("y", dist.Poisson(torch.exp(0.5 * eta)), obs=y)
        else:
            pyro.sample("y", dist.Normal(eta, 1.0), obs=y)


def laplace(x: Tensor, y: Tensor, likelihood: str) -> tuple[Tensor, Tensor, float]:
    """Mode, covariance matrix and log evidence of Laplace's approximation, by Newton's method."""
    x, y = x.double(), y.double()
    b = x.new_zeros(x.shape[1])
    for _ in range(30):
        eta = x @ b
        if likelihood == "logistic":
            mean, weight = eta.sigmoid(), eta.sigmoid() * (-eta).sigmoid()
            value = (y * eta - torch.nn.functional.softplus(eta)).sum()
        elif likelihood == "poisson":
            mean = torch.exp(0.5 * eta)
            weight, value = 0.25 * mean, (y * 0.5 * eta - mean - torch.lgamma(y + 1)).sum()
        else:
            mean, weight = eta, torch.ones_like(eta)
            value = -0.5 * ((y - eta).square() + math.log(2 * math.pi)).sum()
        scale = 0.5 if likelihood == "poisson" else 1.0
        gradient = scale * (x.mT @ (y - mean)) - b / PRIOR_SD**2
        precision = x.mT @ (weight[:, None] * x) + torch.eye(len(b)).double() / PRIOR_SD**2
        step = torch.linalg.solve(precision, gradient)
        if float(step @ gradient) < 1e-12:
            break
        b = b + step
    prior = -0.5 * (b.square() / PRIOR_SD**2 + math.log(2 * math.pi * PRIOR_SD**2)).sum()
    volume = len(b) / 2 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    return b, torch.linalg.inv(precision), float(value + prior + volume)


def megabytes() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def one(rows: int, coefficients: int, likelihood: str, batch: int) -> str:
    """Fit one model in this process, and say how it went."""
    x, y = data(rows, coefficients, likelihood)
    before, times = megabytes(), [time.process_time()]
    target = flowvi.from_pyro(regression, x, y, likelihood, batch)
    times.append(time.process_time())
    fit = flowvi.fit(target, progress=False)
    times.append(time.process_time())
    draws = fit.draw(DRAWS)
    times.append(time.process_time())
    memory = megabytes() - before
    found = flowvi.diagnose(draws)
    mean, covariance, evidence = laplace(x, y, likelihood)
    sd = covariance.diagonal().sqrt()
    z = torch.as_tensor(draws.z).reshape(-1, len(mean))
    start = fit.start
    assert start is not None
    errors = [
        ((z.mean(0) - mean) / sd).abs().max(),
        (z.std(0) / sd - 1).abs().max(),
        ((start.loc - mean) / sd).abs().max(),
        (start.widths / sd - 1).abs().max(),
    ]
    seconds = [f"{b - a:.1f}" for a, b in itertools.pairwise(times)]
    error = found.log_evidence - evidence
    cells = [likelihood, f"{rows:,}", batch or "all", *seconds, f"{memory:.0f}"]
    cells += [fit.meta["check"]["verdict"], *(f"{float(e):.3f}" for e in errors), f"{error:+.4f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table, each line from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--coefficients", type=int, default=20)
    parser.add_argument("--likelihood", nargs="+", default=LIKELIHOODS, choices=LIKELIHOODS)
    parser.add_argument("--batch", nargs="+", type=int, default=(0, 1000))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(one(given.rows, given.coefficients, given.likelihood[0], given.batch[0]))
        return
    names = "likelihood, rows, batch, capture s, fit s, 1000 draws s, peak MB, verdict, mean, sd"
    head = [*names.split(", "), "start's mean", "start's sd", "evidence"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for likelihood in given.likelihood:
        for batch in given.batch:
            sizes = ["--rows", given.rows, "--coefficients", given.coefficients]
            which = ["--likelihood", likelihood, "--batch", batch, "--alone"]
            subprocess.run([sys.executable, __file__, *map(str, [*sizes, *which])], check=True)


if __name__ == "__main__":
    main()
