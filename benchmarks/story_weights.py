"""Posteriors over the weights of small networks, with many Markov chains as the truth.

python benchmarks/story_weights.py --data gap friedman --splits 3

Two problems: "gap", 24 noisy values of a wave on both sides of a gap, and "friedman", 40 rows of
Friedman's first function of five inputs. A split is a data set and a test set of its own seed. For
each guide: the log predictive density of a test row, paired with mean field's; the distance of the
network's output from that of the chains, as the mean Wasserstein-1 distance over test rows, and as
the ratio of the standard deviations (geometric mean); how many test rows the 90 % intervals cover;
the ELBO less mean field's; core seconds.

The chains are Hamiltonian ones, 250 at a time. With `--nuts` so many draws of `flowvi.nuts` are
scored too, at minutes for each data set.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from weights import modes, points

import flowvi
from flowvi.bnn.priors import Normal
from flowvi.draws.draws import Draws
from flowvi.runtime.rng import isolated_rng
from flowvi.samplers.hmc import hmc_transition, sampling_space

DRAWS = 1000
NOISE = 0.1
FIRST_ROWS, TEST_ROWS = 40, 200
MEAN_FIELD, CHAIN = "mean field", "Markov chains"
CHAINS, LEAPFROG, FIRST_STEP, ACCEPTED = 250, 10, 0.1, 0.8
# Wide weights for the inputs: the wave is not smooth.
PRIORS: dict[str, Any] = {"gap": {"0.*": Normal(4.0), "*": "normal"}, "friedman": "normal"}
UNITS = {"gap": 5, "friedman": 3}


class Split(NamedTuple):
    """Inputs and outputs to fit, in units of their standard deviation, and those of the test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Found(NamedTuple):
    """What a guide says: of test rows, its output's draws (S, N), its bound, core seconds."""

    log_density: float
    output: np.ndarray
    covered: float
    elbo: float
    seconds: float


def gap(seed: int) -> Split:
    """A wave on both sides of a gap, with test rows everywhere."""
    rng = np.random.default_rng(seed)

    def drawn(x: np.ndarray) -> tuple[Tensor, Tensor]:
        y = np.sin(4 * x) + NOISE * rng.standard_normal(len(x))
        return torch.tensor(x)[:, None], torch.tensor(y)

    side = rng.uniform(0.4, 1.0, 24) * np.repeat([-1, 1], 12)
    return Split(*drawn(side), *drawn(rng.uniform(-1.0, 1.0, TEST_ROWS)))


def friedman(seed: int) -> Split:
    """Friedman (1991), the first of his functions, with the five inputs that count."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(FIRST_ROWS + TEST_ROWS, 5))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4] + rng.standard_normal(len(x))
    first = slice(FIRST_ROWS)
    inputs = torch.tensor((x - x[first].mean(0)) / x[first].std(0))
    outputs = torch.tensor((y - y[first].mean()) / y[first].std())
    rest = slice(FIRST_ROWS, None)
    return Split(inputs[first], outputs[first], inputs[rest], outputs[rest])


DATA: dict[str, Callable[[int], Split]] = {"gap": gap, "friedman": friedman}
GUIDES: dict[str, Any] = {
    MEAN_FIELD: "meanfield",
    "low rank": "lowrank",
    "full rank": "fullrank",
    "multiplicative flow": flowvi.Multiplicative(),
    "flow on the last layer": flowvi.Blocks(
        {"2.*": "realnvp", "*": "meanfield"}, {"*": "2.*"}, {"2.*": {"depth": 4}}
    ),
    "flow on all weights": "realnvp",
}


def target_of(name: str, split: Split) -> flowvi.Target:
    """The posterior of the weights of a network with one hidden layer."""
    torch.manual_seed(0)
    units = UNITS[name]
    net = nn.Sequential(nn.Linear(split.x.shape[1], units), nn.Tanh(), nn.Linear(units, 1))
    return flowvi.from_pyro(flowvi.bayesian(net, PRIORS[name]), split.x, split.y)


def core_seconds() -> float:
    """Processor time of this process and of those that it has started."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def of_draws(draws: Draws, split: Split, elbo: float, began: float) -> Found:
    """Predictions of test rows by draws of the weights."""
    scored = flowvi.predict(draws, split.x_test, split.y_test)
    found = flowvi.predict(draws, split.x_test)
    low, high = found.quantiles("y", (0.05, 0.95))
    y = split.y_test.numpy()
    output = np.asarray(found["output"])
    return Found(
        float(scored.log_density("y").mean()),
        output.reshape(-1, len(y)),
        float(((low <= y) & (y <= high)).mean()) if len(draws) > 1 else math.nan,
        elbo,
        core_seconds() - began,
    )


def place(target: flowvi.Target, seed: int) -> dict[str, Tensor]:
    """One place from which all guides of a split search for their start."""
    generator = torch.Generator().manual_seed(seed)
    z = 0.5 * torch.randn(target.dim, generator=generator, dtype=target.dtype)
    with torch.no_grad():
        values = target.constrain(z)
    return {name: values[name] for name in target.sites}


def by_guide(name: str, target: flowvi.Target, split: Split, seed: int, steps: int) -> Found:
    """Fit a guide, and predict by its draws as they are; MAP is one point."""
    began = core_seconds()
    if name == "MAP":
        return of_draws(modes(target, seed, 1), split, math.nan, began)
    start = place(target, seed)
    fit = flowvi.fit(
        target, GUIDES[name], steps=steps, seed=seed, start=start, compile=False, progress=False
    )
    return of_draws(fit.draw(DRAWS, seed=seed), split, fit.bounds[0], began)


def by_chains(target: flowvi.Target, seed: int, transitions: int) -> Draws:
    """Draws of many Hamiltonian chains at a time, in the coordinates of a normal of full rank.

    The second half of the transitions counts, of which every chain gives eight draws.
    """
    start = place(target, seed)
    fit = flowvi.fit(
        target, "fullrank", steps=50, seed=seed, start=start, compile=False, progress=False
    )
    with isolated_rng(seed):
        space = sampling_space(target, fit.guide)
        point, step, kept = space.draw(CHAINS), FIRST_STEP, []
        for i in range(transitions):
            point, accepted = hmc_transition(space, point, 1.0, step, LEAPFROG)
            if i < transitions // 2:
                step *= 1.1 if accepted > ACCEPTED else 0.9
            elif (i + 1) % max(1, transitions // 16) == 0:
                kept.append(point.z)
    return points(target, torch.cat(kept))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of the Wasserstein-1 distance of draws. (S, N), (T, N)."""
    at = (np.arange(200) + 0.5) / 200
    return float(np.abs(np.quantile(a, at, axis=0) - np.quantile(b, at, axis=0)).mean())


def spread_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Geometric mean over rows of the ratio of standard deviations."""
    return float(np.exp(np.log(a.std(0) / b.std(0)).mean()))


def mean_of(values: Sequence[float], digits: int = 3) -> str:
    """The mean over splits with its standard error."""
    v = np.array(values)
    if not np.isfinite(v).all():
        return ""
    error = f" ± {v.std(ddof=1) / len(v) ** 0.5:.{digits}f}" if len(v) > 1 else ""
    return f"{v.mean():.{digits}f}{error}"


def row(name: str, found: list[Found], plain: list[Found], truth: list[Found]) -> str:
    """Cells of the table."""
    pairs = list(zip(found, plain, strict=True))
    gain = [f.log_density - p.log_density for f, p in pairs]
    if name == CHAIN:
        # The first half of the draws from the second: what the distances of the others contain.
        halves = [np.split(t.output, 2) for t in truth]
        far = [wasserstein(*half) for half in halves]
        wide = [math.nan]
    else:
        far = [wasserstein(f.output, t.output) for f, t in zip(found, truth, strict=True)]
        wide = [
            spread_ratio(f.output, t.output) if len(f.output) > 1 else math.nan
            for f, t in zip(found, truth, strict=True)
        ]
    cells = [
        name,
        mean_of([f.log_density for f in found]),
        "" if name == MEAN_FIELD else mean_of(gain),
        mean_of(far),
        mean_of(wide, 2),
        mean_of([f.covered for f in found], 2),
        "" if name == MEAN_FIELD else mean_of([f.elbo - p.elbo for f, p in pairs], 2),
        f"{np.mean([f.seconds for f in found]):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def tell(data: str, seed: int, name: str, found: Found) -> None:
    """A line of progress on stderr."""
    words = f"log density {found.log_density:.3f}, ELBO {found.elbo:.2f}, {found.seconds:.0f} s"
    print(f"{data} {seed}, {name}: {words}", file=sys.stderr, flush=True)


def main() -> None:
    """Print one row for each problem and guide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=DATA)
    parser.add_argument("--guides", nargs="*", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--steps", type=int, default=400, help="steps of a fit")
    parser.add_argument("--transitions", type=int, default=160, help="of each Markov chain")
    parser.add_argument("--nuts", type=int, default=0, help="draws of each of four NUTS chains")
    parser.add_argument("--quick", action="store_true", help="one split, few steps and draws")
    options = parser.parse_args()
    splits, steps, transitions = options.splits, options.steps, options.transitions
    if options.quick:
        splits, steps, transitions = 1, 100, 32
    print(
        "| guide | log density | less mean field's | from the chains | sd, of theirs | in 90 % | "
        "ELBO, less mean field's | core s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for data in options.data:
        done: dict[str, list[Found]] = {}
        for seed in range(splits):
            split = DATA[data](seed)
            target = target_of(data, split)
            for name in dict.fromkeys(["MAP", MEAN_FIELD, *options.guides]):
                said = by_guide(name, target, split, seed, steps)
                done.setdefault(name, []).append(said)
                tell(data, seed, name, said)
            began = core_seconds()
            chains = by_chains(target, seed, transitions)
            done.setdefault(CHAIN, []).append(of_draws(chains, split, math.nan, began))
            tell(data, seed, CHAIN, done[CHAIN][-1])
            if options.nuts:
                began = core_seconds()
                drawn = flowvi.nuts(target, options.nuts, options.nuts, 4, seed, progress=False)
                done.setdefault("NUTS", []).append(of_draws(drawn, split, math.nan, began))
        print(f"| **{data}, D = {target.dim}, {splits} data sets** | | | | | | | |")
        for name, found in done.items():
            print(row(name, found, done[MEAN_FIELD], done[CHAIN]), flush=True)


if __name__ == "__main__":
    main()
