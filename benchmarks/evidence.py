"""Fit targets whose log evidence is known, with the default call, and compare.

    python benchmarks/evidence.py [--shared DIR] [--seeds 1] [--guide auto] [--budget SECONDS]
                                  [--draws 4000] [NAME ...]

Per target: D, the true log Z, the gap log Z - ELBO, the estimated log evidence
minus the truth and its standard error, k-hat, the verdict and the seconds from
capture to draws. With several seeds, the mean error, and how often the truth is
within two stated errors.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

import flowvi
from flowvi import Site, Target

ROOT = Path(__file__).resolve().parents[1]
Made = tuple[Target, float]


def funnel(folder: Path) -> Made:
    def log_prob(v: dict[str, Tensor]) -> Tensor:
        prior = torch.distributions.Normal(0.0, 3.0).log_prob(v["v"])
        rest = torch.distributions.Normal(0.0, (v["v"] / 2).exp()).log_prob(v["x"])
        return prior + rest.sum()

    return flowvi.from_density(log_prob, {"v": Site(), "x": Site((9,))}), 0.0


def eight_schools(folder: Path) -> Made:
    return _schools(centred=False)


def eight_schools_centred(folder: Path) -> Made:
    return _schools(centred=True)


def _schools(centred: bool) -> Made:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    s = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    normal = torch.distributions.Normal

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        prior = normal(0.0, 5.0).log_prob(v["mu"])
        prior = prior + torch.distributions.HalfCauchy(5.0).log_prob(v["tau"])
        if centred:
            theta, spread = v["theta"], normal(v["mu"], v["tau"])
        else:
            theta, spread = v["mu"] + v["tau"] * v["theta"], normal(0.0, 1.0)
        return prior + spread.log_prob(v["theta"]).sum() + normal(theta, s).log_prob(y).sum()

    sites = {"mu": Site(), "tau": Site((), constraints.positive), "theta": Site((8,))}
    return flowvi.from_density(log_prob, sites), -31.311347


def brownian(folder: Path) -> Made:
    y = torch.tensor(np.load(folder / "brownian.npz")["y"])
    seen = ~y.isnan()

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        normal, scale = torch.distributions.Normal, torch.distributions.LogNormal(0.0, 2.0)
        x = v["x"]
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        prior = scale.log_prob(v["innovation"]) + scale.log_prob(v["noise"])
        path = normal(before, v["innovation"]).log_prob(x).sum()
        return prior + path + normal(x[seen], v["noise"]).log_prob(y[seen]).sum()

    positive = Site((), constraints.positive)
    sites = {"innovation": positive, "noise": positive, "x": Site((30,))}
    return flowvi.from_density(log_prob, sites), 1.18775


def _logistic(file: Path, scale: float, log_z: float) -> Made:
    with np.load(file) as z:
        x, y = torch.tensor(z["X"], dtype=torch.float64), torch.tensor(z["y"], dtype=torch.float64)

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        prior = torch.distributions.Normal(0.0, scale).log_prob(v["w"]).sum()
        logits = x @ v["w"].to(x.dtype)
        return prior + (y * logits - torch.nn.functional.softplus(logits)).sum()

    return flowvi.from_density(log_prob, {"w": Site((x.shape[1],))}), log_z


def ionosphere(folder: Path) -> Made:
    return _logistic(folder / "ionosphere.npz", 1.0, -111.609)


def german_credit(folder: Path) -> Made:
    return _logistic(folder / "german_credit.npz", 10.0, -585.0977)


def pines(folder: Path) -> Made:
    counts = torch.tensor(np.load(folder / "pines.npz")["counts"], dtype=torch.float64).reshape(-1)
    axis = torch.arange(40, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    distance = torch.cdist(grid, grid)
    factor = torch.linalg.cholesky(1.91 * torch.exp(-distance / (40 / 33)))
    mean = float(np.log(126) - 1.91 / 2)
    # In the coordinates of the prior: f = mean + factor u with u standard normal, which
    # changes no evidence.

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        u = v["u"].to(factor.dtype)
        f = mean + factor @ u
        prior = -0.5 * (u.square().sum() + len(u) * np.log(2 * np.pi))
        return prior + (f * counts - f.exp() / 1600).sum()

    return flowvi.from_density(log_prob, {"u": Site((1600,))}), 501.73


def many_well(folder: Path) -> Made:
    def log_prob(v: dict[str, Tensor]) -> Tensor:
        a, b = v["x"]
        return (-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2).sum()

    return flowvi.from_density(log_prob, {"x": Site((2, 16))}), 164.69568


TARGETS: dict[str, Callable[[Path], Made]] = {
    "eight_schools": eight_schools,
    "eight_schools_centred": eight_schools_centred,
    "funnel": funnel,
    "brownian": brownian,
    "ionosphere": ionosphere,
    "german_credit": german_credit,
    "many_well": many_well,
    "pines": pines,
}


def run(
    name: str, folder: Path, guide: str, seed: int, budget: float | None, draws: int
) -> tuple[str, float, float]:
    """Fit one target; a row of the table, and the error with its stated standard error."""
    began = time.perf_counter()
    target, log_z = TARGETS[name](folder)
    fit = flowvi.fit(target, guide, seed=seed, budget=budget, progress=False)
    d = flowvi.diagnose(fit.draw(draws, seed=seed))
    seconds = time.perf_counter() - began
    error = d.log_evidence - log_z
    row = (
        f"{name:<22}{target.dim:>5}{log_z:>12.4f}{log_z - d.elbo:>9.4f} +-{d.elbo_se:>7.4f}"
        f"{error:>+10.4f} +-{d.log_evidence_se:>7.4f}{d.khat:>7.2f}{seconds:>8.1f}  {d.verdict}"
    )
    return row, error, d.log_evidence_se


def summary(name: str, errors: np.ndarray) -> str:
    """Mean error of several seeds, and how often two stated errors cover the truth."""
    off, stated = errors.T
    mean, noise = off.mean(), off.std(ddof=1) / np.sqrt(len(off))
    covered = np.mean(np.abs(off) <= 2 * stated)
    return f"{name:<22}mean error {mean:+.4f} +- {noise:.4f}; 2 errors cover {covered:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--guide", default="auto")
    parser.add_argument("--budget", type=float, help="seconds for each fit; none by default")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TARGETS)}")
    options = parser.parse_args()
    print(
        f"{'target':<22}{'D':>5}{'log Z':>12}{'gap of the ELBO':>19}"
        f"{'log evidence - log Z':>20}{'k-hat':>7}{'s':>8}  verdict"
    )
    for name in options.names or TARGETS:
        found: list[list[float]] = []
        for seed in range(options.seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder, o = options.shared / "targets", options
                row, *error = run(name, folder, o.guide, seed, o.budget, o.draws)
                print(row, flush=True)
                found.append(error)
        if len(found) > 1:
            print(summary(name, np.array(found)), flush=True)


if __name__ == "__main__":
    main()
