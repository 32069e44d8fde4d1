"""Amortised guides of six models, each judged at data sets that it simulates.

    python benchmarks/amortised.py
    python benchmarks/amortised.py --only eight_schools --budget 60 --datasets 200 --json

For each model: ranks of true values among plain and resampled draws (Kolmogorov-Smirnov and
width, p-values after Bonferroni's correction for scalars and tests), the share of data sets that
are trusted without a fit of their own, errors of the evidence in standard errors where it is
known, milliseconds for draws and verdict of a data set, and what the training took.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from amortised_models import Model, models

import flowvi
from flowvi.amortized.guide import AmortizedGuide

DRAWS = 1000


def evidence_errors(guide: AmortizedGuide, model: Model, n: int, seed: int) -> np.ndarray:
    """Errors of the log evidence of trusted data sets, in standard errors."""
    errors: list[float] = []
    for data in guide.simulate(n, seed)[0]:
        found = flowvi.diagnose(guide.draw(data, DRAWS, seed))
        if found.verdict != "do not trust" and model.evidence is not None:
            exact = model.evidence({k: torch.as_tensor(v) for k, v in data.items()})
            errors.append((found.log_evidence - exact) / found.log_evidence_se)
    return np.array(errors)


def measure(name: str, model: Model, budget: float, datasets: int, seed: int) -> dict[str, Any]:
    """All numbers of one model."""
    guide = flowvi.amortize(model.model, *model.args, budget=budget, seed=seed, progress=False)
    began = time.perf_counter()
    found = flowvi.sbc(guide, fits=datasets, draws=DRAWS, seed=seed, progress=False)
    each = 1000 * (time.perf_counter() - began) / len(found.plain)
    errors = np.zeros(0)
    if model.evidence is not None:
        errors = evidence_errors(guide, model, min(datasets, 200), seed + 1)
    return {
        "model": name,
        "latents": guide.problem.target.dim,
        "guide": guide.meta["guide"].removeprefix("amortized "),
        "encoder": guide.meta["encoder"],
        "seconds": round(guide.meta["seconds"], 1),
        "simulations": guide.meta["simulations"],
        "steps": guide.meta["steps"],
        "loss": guide.meta["loss"],
        "p plain": found.uniform["plain"],
        "p resampled": found.uniform["resampled"],
        "trusted": found.trusted,
        "trusted plain": found.verdicts.count("trust") / len(found.verdicts),
        "evidence within 3 se": float(np.mean(np.abs(errors) < 3)) if len(errors) else None,
        "milliseconds": each,
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table in Markdown."""
    evidence = result["evidence within 3 se"]
    cells = (
        result["model"],
        result["latents"],
        f"{result['guide']}, {result['encoder']}",
        f"{result['seconds']:.0f}",
        f"{result['simulations'] / 1e6:.2f}",
        f"{result['p plain']:.2g}",
        f"{result['p resampled']:.2g}",
        f"{100 * result['trusted plain']:.0f} %",
        f"{100 * result['trusted']:.1f} %",
        "" if evidence is None else f"{100 * evidence:.0f} %",
        f"{result['milliseconds']:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = (
    *("model", "D", "guide, encoder", "s", "10^6 simulations", "p plain", "p resampled"),
    *("plain trusted", "trusted", "evidence within 3 se", "ms"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n| {' | '.join('---' for _ in COLUMNS)} |"


def main() -> None:
    known = models()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=sorted(known), action="append")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of a training")
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not options.json:
        print(HEAD)
    for name in options.only or known:
        result = measure(name, known[name], options.budget, options.datasets, options.seed)
        print(json.dumps(result) if options.json else row(result), flush=True)


if __name__ == "__main__":
    main()
