"""The default fit beside the published record of bounds on real models.

    python benchmarks/record.py [--shared DIR] [--seeds 3] [--budget SECONDS] [NAME ...]

Fourteen models of Agrawal, Sheldon and Domke (2020), "Advances in Black-Box VI: Normalizing Flows,
Importance Weighting, and Optimization" (arXiv 2006.10343), rewritten in Pyro, with the best results
of all their guides, step sizes and estimators: 30,000 iterations of 100 draws each. Each model is
fitted by the default call in a process of its own, and 20,000 draws are taken: the ELBO and the
bound of ten draws on the published scale, beside the best published ones; the log evidence and how
many of its standard errors it is from the exact value, where that is known; k-hat, the verdict, the
CPU seconds of the process and the steps. With several seeds, a row is the one with the median ELBO.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import corpus

DRAWS = 20_000
# A bound is at the published one, which has three decimals of a mean of 10,000 draws, if it is
# not lower by more; and clearly above it, if it is higher by more.
LEVEL, ABOVE = 0.005, 0.02
COLUMNS = (
    "model",
    "D",
    "ELBO",
    "published",
    "ten draws",
    "published",
    "log evidence",
    "exact",
    "errors",
    "k-hat",
    "verdict",
    "CPU s",
    "steps",
)


def run(folder: Path, seed: int, budget: float | None) -> dict[str, Any]:
    """The default call on one model, and bounds from fresh draws, on the published scale."""
    import torch

    import flowvi

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(folder.name, folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args, named = module.load(folder)
    target = flowvi.from_pyro(module.model, *args, **named)
    fit = flowvi.fit(target, seed=seed, budget=budget, progress=False)
    draws = fit.draw(DRAWS, seed + 1)
    found = flowvi.diagnose(draws)
    evidence = flowvi.evidence(draws)
    one, ten = flowvi.bounds(draws, particles=(1, 10))
    return {
        "D": target.dim,
        "elbo": one.bound + module.OFFSET,
        "elbo_se": one.se,
        "iw10": ten.bound + module.OFFSET,
        "log_evidence": evidence.log_evidence + module.OFFSET,
        "log_evidence_se": evidence.log_evidence_se,
        "khat": found.khat,
        "verdict": found.verdict,
        "reason": found.reasons[0] if found.reasons else "",
        "guide": fit.meta["guide"],
        "steps": fit.meta["steps"],
    }


def timed(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One process, with its CPU seconds; what went wrong, if something did."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, __file__, "--run", "--seed", str(seed), name]
    words += ["--shared", str(options.shared)]
    words += [] if options.budget is None else ["--budget", str(options.budget)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=one)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}


def cells(name: str, found: dict[str, Any], published: dict[str, float]) -> list[str]:
    """A row of the table."""
    exact = published.get("exact")
    away = ""
    if exact is not None:
        error = (found["log_evidence_se"] ** 2 + published.get("exact_se", 0.0) ** 2) ** 0.5
        away = f"{(found['log_evidence'] - exact) / error:+.1f}"
    return [
        name,
        f"{found['D']}",
        f"{found['elbo']:.3f}",
        f"{published['elbo']:.3f}",
        f"{found['iw10']:.3f}",
        f"{published['iw10']:.3f}",
        f"{found['log_evidence']:.3f} +- {found['log_evidence_se']:.2g}",
        "" if exact is None else f"{exact:.3f}",
        away,
        f"{found['khat']:.2f}",
        found["verdict"],
        f"{found['seconds']:.0f}",
        f"{found['steps']}",
    ]


def published(folder: Path) -> dict[str, dict[str, float]]:
    """The record, by model."""
    with (folder / "record.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        row.pop("model"): {key: float(value) for key, value in row.items() if value} for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--budget", type=float, help="seconds of each fit; none by default")
    parser.add_argument("--run", action="store_true", help="one run, in this process")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    folder = options.shared / "record"
    if not (folder / "record.csv").exists():
        print(f"There is no record in {folder}: name the folder with --shared.")
        return
    if options.run:
        print(json.dumps(run(folder / options.names[0], options.seed, options.budget)))
        return
    record = published(folder)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    best: dict[str, float] = {}
    for name in options.names or sorted(record, key=lambda n: record[n]["D"]):
        runs = []
        for seed in range(options.seed, options.seed + options.seeds):
            found = timed(name, options, seed)
            if "error" in found:
                print(f"| {name} | seed {seed}: {found['error']} |", flush=True)
            else:
                runs.append(found)
        if not runs:
            continue
        middle = statistics.median_low([one["elbo"] for one in runs])
        found = next(one for one in runs if one["elbo"] == middle)
        best[name] = middle - record[name]["elbo"]
        print(f"| {' | '.join(cells(name, found, record[name]))} |", flush=True)
        if found["verdict"] == "do not trust":
            print(f"<!-- {name}: {found['guide']}; {found['reason']} -->", flush=True)
    level = sum(gain >= -LEVEL for gain in best.values())
    above = sum(gain > ABOVE for gain in best.values())
    print(f"\nELBO at or above the published one on {level} of {len(best)}, above on {above}")


if __name__ == "__main__":
    main()
