"""How often other draws of the same fit change the verdict.

    python benchmarks/verdicts.py [--seeds 20] [--draws 4000] [NAME ...]

Ten fits of all qualities, from close guides to poor ones, several of them near a limit. Each is
checked by draws of its own, and then judged by other draws from 20 seeds: as `diagnose` does, with
the fit's check behind it, and by these draws alone. A row has the verdict of the check, how many of
the 20 verdicts differ from it, and the range of k-hat over the seeds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace

import corpus
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Gamma, constraints

import flowvi
from flowvi.diagnostics import VERDICTS

SCHOOLS, CENTRED, FUNNEL = map(
    corpus.load_model, ("eight_schools", "eight_schools_centered", "funnel")
)

Y = torch.tensor([1.2, 0.4, 2.9, 1.7, 0.8])
X = torch.arange(8.0) / 4
LINE = torch.tensor([0.3, 1.2, 1.1, 2.3, 2.2, 3.4, 3.1, 4.4])


def normal(y: Tensor) -> None:
    """Mean and scale of five numbers."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def line(x: Tensor, y: Tensor) -> None:
    """A line through eight points, noise unknown."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


def rain() -> flowvi.Target:
    """Shape and mean of a gamma density."""

    def log_density(v: dict[str, Tensor]) -> Tensor:
        likelihood = Gamma(v["shape"], v["shape"] / v["mean"]).log_prob(Y).sum()
        return likelihood - 0.1 * (v["shape"] + v["mean"])

    positive = flowvi.Site(support=constraints.positive)
    return flowvi.from_density(log_density, {"shape": positive, "mean": positive})


def schools() -> flowvi.Target:
    """Eight schools, non-centred."""
    return flowvi.from_pyro(SCHOOLS.model, *SCHOOLS.data())


def centred() -> flowvi.Target:
    """Eight schools, centred."""
    return flowvi.from_pyro(CENTRED.model, *CENTRED.data())


FITS: dict[str, tuple[Callable[[], flowvi.Target], str, int]] = {
    "schools, realnvp": (schools, "realnvp", 300),
    "schools, full rank": (schools, "fullrank", 100),
    "schools, mean field": (schools, "meanfield", 100),
    "centred, realnvp": (centred, "realnvp", 200),
    "centred, planar": (centred, "planar", 200),
    "funnel, realnvp": (lambda: flowvi.from_pyro(FUNNEL.model), "realnvp", 200),
    "normal, realnvp": (lambda: flowvi.from_pyro(normal, Y), "realnvp", 100),
    "normal, full rank": (lambda: flowvi.from_pyro(normal, Y), "fullrank", 100),
    "line, realnvp": (lambda: flowvi.from_pyro(line, X, LINE), "realnvp", 200),
    "rain, realnvp": (rain, "realnvp", 100),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(FITS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| fit | its check | other verdicts | without the check | k-hat |\n|" + " --- |" * 5)
    changed = alone_changed = 0
    for name in args.names:
        make, guide, steps = FITS[name]
        fit = flowvi.fit(make(), guide, steps=steps, progress=False)
        check = fit.meta["check"]
        # What the search for a start saw stands whatever the draws are.
        found = VERDICTS[2] if fit.meta["missed"] else check["verdict"]
        khats, other, alone = [], 0, 0
        for seed in range(1, args.seeds + 1):
            draws = fit.draw(args.draws, seed)
            judged = flowvi.diagnose(draws)
            bare = flowvi.diagnose(replace(draws, meta={**draws.meta, "check": None}))
            khats.append(judged.khat)
            other += judged.verdict != found
            alone += bare.verdict != found
        changed, alone_changed = changed + other, alone_changed + alone
        print(
            f"| {name} | {found} ({check['draws']} draws, {check['khat']:.2f}) "
            f"| {other} | {alone} | {min(khats):.2f} to {max(khats):.2f} |",
            flush=True,
        )
    every = args.seeds * len(args.names)
    print(f"\n{changed} of {every} verdicts differ; {alone_changed} would without the check")


if __name__ == "__main__":
    main()
