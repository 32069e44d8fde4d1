"""Fit every posterior of the corpus with the default call and compare with its reference draws.

    python benchmarks/posteriors.py [--shared DIR] [--seeds 1] [--out FILE.jsonl] [NAME ...]

Per posterior: D, Pareto k-hat (R-hat where the fit ended in Markov chains), the
largest error of any mean (in posterior standard deviations) and of any standard
deviation (relative), over all parameters, of the plain draws and of the draws
that the verdict recommends; the log evidence with its standard error; the
verdict; whether it is right; and the seconds from capture to draws.

A fit is good if no mean is off by more than 0.1 sds and no sd by more than 10 %.
A verdict is right if the draws that it recommends have no mean off by more than
0.15 sds and no sd by more than 15 %, beyond two standard errors of the
comparison (the reference draws are a sample too, and the sd of a heavy-tailed
parameter is known to 10 % at best), and, where it says "do not trust", if the
resampled draws have some mean off by more than 0.1 sds or sd by more than 10 %.
Rows are added to FILE.jsonl as they come, and those that it holds are not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import corpus

import flowvi

HEADER = (
    f"{'posterior':<28}{'seed':>5}{'D':>4}{'k-hat':>7}{'mean':>7}{'sd':>7}{'mean*':>7}{'sd*':>7}"
    f"{'log evidence':>14}{'+-':>8}{'s':>7}  verdict"
)
# Errors of a mean in sds, and of a sd relative to it: what trust allows, and what is aimed at.
TOLERANCE, AIM = 0.15, 0.1


def run(name: str, folder: Path, guide: str, seed: int) -> dict[str, Any]:
    """Fit one posterior; the facts of a row."""
    reference = corpus.reference(folder)
    module = corpus.load_model(name)
    args = corpus.arguments(module, name, folder)
    began = time.perf_counter()
    target = flowvi.from_pyro(module.model, *args)
    fit = flowvi.fit(target, guide, seed=seed, progress=False)
    draws = fit.draw(4000, seed=seed)
    seconds = time.perf_counter() - began
    diagnosis = flowvi.diagnose(draws)
    plain = corpus.errors(draws.values, reference)
    resampled = draws if draws.mcmc else flowvi.resample(draws)
    best = corpus.errors(resampled.values, reference)
    used, recommended = (plain, draws) if diagnosis.verdict == "trust" else (best, resampled)
    right = max(corpus.errors(recommended.values, reference, slack=2.0)) <= TOLERANCE
    if diagnosis.verdict == "do not trust":
        right = max(best) > AIM
    return {
        "name": name,
        "seed": seed,
        "dim": target.dim,
        "khat": diagnosis.khat,
        "plain": plain,
        "best": best,
        "log_evidence": diagnosis.log_evidence,
        "log_evidence_se": diagnosis.log_evidence_se,
        "seconds": seconds,
        "verdict": diagnosis.verdict,
        "right": right,
        "good": max(used) <= AIM and diagnosis.verdict != "do not trust",
        "guide": "NUTS" if draws.mcmc else fit.meta["guide"],
        "steps": fit.meta["steps"],
        "log": fit.log,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['name']:<28}{row['seed']:>5}{row['dim']:>4}{row['khat']:>7.2f}"
        f"{row['plain'][0]:>7.3f}{row['plain'][1]:>7.3f}{row['best'][0]:>7.3f}{row['best'][1]:>7.3f}"
        f"{row['log_evidence']:>14.3f}{row['log_evidence_se']:>8.4f}{row['seconds']:>7.1f}"
        f"  {row['verdict']} ({row['guide']}){'' if row['right'] else ' WRONG'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--guide", default="auto")
    parser.add_argument("--out", type=Path, help="where rows are kept, and read from")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    posteriors = options.shared / "posteriors"
    names = options.names or sorted(p.name for p in posteriors.iterdir() if p.is_dir())
    rows = read(options.out)
    print(HEADER)
    for seed in range(options.seeds):
        for name in names:
            if (name, seed) not in rows:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows[name, seed] = run(name, posteriors / name, options.guide, seed)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(rows[name, seed]) + "\n")
            print(line(rows[name, seed]), flush=True)
    mine = [row for (name, seed), row in rows.items() if name in names and seed < options.seeds]
    for what in ("good", "right"):
        print(f"{what}: {sum(row[what] for row in mine)} of {len(mine)}")


def read(file: Path | None) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of an earlier run."""
    if file is None or not file.exists():
        return {}
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    return {(row["name"], row["seed"]): row for row in rows}


if __name__ == "__main__":
    main()
