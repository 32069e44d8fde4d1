"""Other libraries on the posteriors of the corpus, for the seconds that flowvi took.

    python benchmarks/posteriors.py --out rows.jsonl
    python benchmarks/side_by_side.py rows.jsonl [NAME ...] --out peers.jsonl [--longest 60]

Needs `pip install "flowvi[benchmark]"`. Each fit is a process of its own with
one thread, and trains for as long as flowvi's whole fit of that posterior in
rows.jsonl, at most --longest seconds. NumPyro compiles before that time begins,
and a short fit before has PyMC's code compiled and cached. Per posterior and
library: the largest error of a mean, in posterior standard deviations, and of a
standard deviation, relative. Rows are added to peers.jsonl as they come, and
those that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from corpus import ROOT
from peers.run import METHODS
from posteriors import AIM, read

WARM = 1.0
GRACE = 600.0  # for compiling and drawing, beside training
HERE = Path(__file__).resolve().parent


def fit(method: str, name: str, seconds: float, seed: int, shared: Path) -> dict[str, Any]:
    """One row, from a process of its own."""
    command = [sys.executable, "-m", "peers.run", method, name]
    command += ["--seconds", str(seconds), "--seed", str(seed), "--shared", str(shared.resolve())]
    # XLA would take every processor for itself otherwise.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    row = {"posterior": name, "method": method, "seed": seed, "mean": None, "sd": None}
    try:
        done = subprocess.run(
            command, cwd=HERE, env=env, capture_output=True, text=True, timeout=seconds + GRACE
        )
    except subprocess.TimeoutExpired:
        return {**row, "seconds": seconds + GRACE, "note": "did not end"}
    if done.returncode:
        note = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {**row, "seconds": seconds, "note": note}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def cell(row: dict[str, Any] | None) -> str:
    """Errors of mean and sd."""
    if row is None:
        return "-"
    if row["mean"] is None or row["sd"] is None:
        return "failed"
    return "/".join(f"{x:.2f}" if x < 1000 else f"{x:.0e}" for x in (row["mean"], row["sd"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of training at most")
    parser.add_argument("--out", type=Path, help="where rows are kept, and read from")
    parser.add_argument("rows", type=Path, help="what posteriors.py --out wrote")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    ours = {name: row for (name, seed), row in read(options.rows).items() if seed == 0}
    names = options.names or sorted(ours)
    if missing := [name for name in names if name not in ours]:
        parser.error(
            f"{options.rows} has no row of seed 0 for {', '.join(missing)}; it has "
            f"{', '.join(sorted(ours)) or 'none'}. Run posteriors.py --out {options.rows} first."
        )
    peers: dict[tuple[str, str], dict[str, Any]] = {}
    if options.out and options.out.exists():
        rows = [json.loads(text) for text in options.out.read_text().splitlines()]
        peers = {(row["posterior"], row["method"]): row for row in rows}
    print(f"{'posterior':<28}{'s':>6}{'flowvi':>12}" + "".join(f"{m:>21}" for m in METHODS))
    good = dict.fromkeys(METHODS, 0)
    for name in names:
        seconds = min(ours[name]["seconds"], options.longest)
        for method in METHODS:
            if (name, method) not in peers:
                if method.startswith("pymc"):
                    fit(method, name, WARM, 0, options.shared)
                peers[name, method] = row = fit(method, name, seconds, 0, options.shared)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            row = peers[name, method]
            known = row["mean"] is not None and row["sd"] is not None
            good[method] += known and max(row["mean"], row["sd"]) <= AIM
        best = ours[name]["plain" if ours[name]["verdict"] == "trust" else "best"]
        mine = f"{best[0]:.2f}/{best[1]:.2f}"
        cells = "".join(f"{cell(peers[name, m]):>21}" for m in METHODS)
        print(f"{name:<28}{seconds:>6.0f}{mine:>12}{cells}", flush=True)
    counts = "".join(f"{good[m]:>21}" for m in METHODS)
    mine_good = sum(ours[name]["good"] for name in names)
    print(f"{f'within {AIM:g} and {AIM:.0%}, of {len(names)}':<34}{mine_good:>12}{counts}")


if __name__ == "__main__":
    main()
