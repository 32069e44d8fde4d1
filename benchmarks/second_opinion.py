"""How often short chains find planted faults, and how often they blame draws of the posterior.

    python benchmarks/second_opinion.py [--shared DIR] [--seeds 10] [--space guide] [NAME ...]

Draws of ten posteriors from long reference runs stand for a perfect guide. Into 4,000 of them a
fault is planted, another one for each seed, and chains start at the result:

    none            the reference draws as they are
    fitted          the draws of a default fit, resampled where its verdict says so
    narrow          every sd is 0.8 times what it should be
    shifted         one mean is off by 0.2 sd
    cut             the lowest or highest 2 % of one coordinate are left out
    mean field      one parameter has the width that a mean-field guide gives it, and no correlation
    uncorrelated    the strongest correlation is lost, both marginals are right
    mode            a mode of 2 % of the mass is left out (a mixture of two normals)

A cell has the number of faults found, of --seeds. The last rows are what all cost in evaluations,
and how well chains moved. --space draws moves them in units of the draws' covariance, guide in the
space of a guide fitted by default.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import corpus
import numpy as np
import torch
from counting import counted

import flowvi
from flowvi.diagnostics import VERDICTS
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import tabulate
from flowvi.guides.guide import Guide
from flowvi.samplers.short_chains import second_opinion

NAMES = (
    "arK",
    "earn_height",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "garch11",
    "gp_pois_regr",
    "kidscore_interaction",
    "logmesquite",
    "low_dim_gauss_mix",
    "nes1980",
)
DRAWS, NARROW, SHIFT, CUT = 4000, 0.8, 0.2, 0.02
# Correlations below this are not counted as lost.
STRONG = 0.8
Fault = Callable[[np.ndarray, np.random.Generator], np.ndarray | None]


def none(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """No fault."""
    return z


def narrow(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All sds too small."""
    return z.mean(0) + NARROW * (z - z.mean(0))


def shifted(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One mean off."""
    moved = z.copy()
    j = rng.integers(z.shape[1])
    moved[:, j] += rng.choice([-1, 1]) * SHIFT * z[:, j].std()
    return moved


def cut(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tail of one coordinate left out, filled up by other draws."""
    column = z[:, rng.integers(z.shape[1])] * rng.choice([-1, 1])
    kept = z[column > np.quantile(column, CUT)]
    return np.concatenate([kept, rng.permutation(kept)[: len(z) - len(kept)]])


def mean_field(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The parameter that mean field narrows most, as mean field has it."""
    covariance = np.cov(z.T)
    widths = 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
    j = np.argmin(widths / np.sqrt(np.diag(covariance)))
    poor = z.copy()
    poor[:, j] = rng.normal(z[:, j].mean(), widths[j], len(z))
    return poor


def uncorrelated(z: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The two most correlated coordinates made independent of each other; None if none are."""
    correlation = np.abs(np.corrcoef(z.T)) - np.eye(z.shape[1])
    if correlation.max() < STRONG:
        return None
    j = np.unravel_index(np.argmax(correlation), correlation.shape)[0]
    poor = z.copy()
    poor[:, j] = rng.permutation(z[:, j])
    return poor


FAULTS: dict[str, Fault] = {
    "none": none,
    "narrow": narrow,
    "shifted": shifted,
    "cut": cut,
    "mean field": mean_field,
    "uncorrelated": uncorrelated,
}


def table(target: flowvi.Target, z: np.ndarray, seed: int, fault: Fault) -> Draws | None:
    """Draws with a fault."""
    rng = np.random.default_rng(seed)
    some = fault(z[rng.permutation(len(z))[:DRAWS]], rng)
    if some is None:
        return None
    points = torch.as_tensor(some, dtype=target.dtype)
    with torch.no_grad():
        return tabulate(target, len(some), [[(points, points.new_zeros(len(points)))]])


def of_corpus(name: str, folder: Path) -> tuple[flowvi.Target, np.ndarray]:
    """A posterior and its reference draws, unconstrained."""
    module = corpus.load_model(name)
    target = flowvi.from_pyro(module.model, *corpus.arguments(module, name, folder))
    values = corpus.reference(folder)
    z = target.unconstrain({site: torch.as_tensor(values[site]) for site in target.sites})
    return target, z.double().numpy()


def two_modes() -> tuple[flowvi.Target, np.ndarray]:
    """Two normals of the plane, one with 2 % of the mass; draws of the other one."""
    low, high = torch.log(torch.tensor([CUT, 1 - CUT], dtype=torch.float64))

    def log_density(v: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [high - 0.5 * v["x"].square().sum(), low - 0.5 * (v["x"] - 8.0).square().sum()]
        return torch.logsumexp(torch.stack(parts), 0)

    z = np.random.default_rng(0).normal(size=(10000, 2))
    return flowvi.from_density(log_density, {"x": flowvi.Site((2,))}), z


def row(name: str, folder: Path, options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Faults found and planted, by fault; prints one line for each."""
    target, z = two_modes() if name == "two modes" else of_corpus(name, folder)
    guide: Guide | None = None
    fit = None
    if options.space == "guide" and name != "two modes":
        fit = flowvi.fit(target, progress=False, seed=1)
        guide = fit.guide
        print(f"{name}: {fit.meta['guide']}", flush=True)
    faults = {"mode": none} if name == "two modes" else FAULTS
    found = {}
    for fault, plant in faults.items():
        if options.faults and fault not in options.faults:
            continue
        hits = planted = 0
        facts = []
        for seed in range(options.seeds):
            draws = table(target, z, seed, plant)
            if draws is None:
                continue
            planted += 1
            with counted() as counts:
                said = second_opinion(draws, guide, seed=seed)
            hits += bool(said.drifts)
            facts.append((said.acceptance, said.correlation, counts.points, counts.calls))
            if options.verbose:
                print(f"    {fault} {seed}: {said.drifts}")
        if planted:
            found[fault] = (hits, planted)
            means = np.mean(facts, axis=0)
            print(
                f"{name:<28}{fault:<14}{hits:>4} of {planted:<4} acceptance {means[0]:.2f}, "
                f"correlation {means[1]:.2f}, {means[2]:.0f} points in {means[3]:.0f} calls",
                flush=True,
            )
    if fit is not None and (not options.faults or "fitted" in options.faults):
        hits = 0
        for seed in range(options.seeds):
            draws = fit.draw(DRAWS, seed + 1)
            verdict = flowvi.diagnose(draws).verdict
            said = second_opinion(draws, guide, verdict == VERDICTS[1], seed)
            hits += bool(said.drifts)
            if options.verbose or said.drifts:
                print(f"    fitted {seed}: {verdict}: {said.drifts}")
        found["fitted"] = (hits, options.seeds)
        print(f"{name:<28}{'fitted':<14}{hits:>4} of {options.seeds}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--space", choices=["guide", "draws"], default="guide")
    parser.add_argument("--faults", nargs="*", default=[])
    parser.add_argument("--verbose", action="store_true", help="print what is said each time")
    parser.add_argument("names", nargs="*", default=[*NAMES, "two modes"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total: dict[str, tuple[int, int]] = {}
    for name in options.names:
        for fault, counts in row(name, options.shared / "posteriors" / name, options).items():
            before = total.get(fault, (0, 0))
            total[fault] = (before[0] + counts[0], before[1] + counts[1])
    print("\n| fault | found | planted |\n| --- | --- | --- |")
    for fault, (hits, planted) in total.items():
        print(f"| {fault} | {hits} | {planted} |")


if __name__ == "__main__":
    main()
