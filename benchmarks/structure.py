"""Models of many latents: the default call, and beside it NUTS, Pyro's guides and Laplace's method.

    python benchmarks/structure.py [--only NAME] [--groups G] [--seed 0] [--draws 1000]
                                   [--nuts] [--pyro] [--laplace] [--python PYTHON]
                                   [--shared DIR] [--longest 1800] [--json FILE]

Each method is a process of its own with one thread. Errors of means are in posterior sds, errors of
sds are relative: of the shared latents the largest, of the units the largest and the median. The
truth is quadrature (truths.py); where there is none, NUTS, if it ran (marked *). Errors include
those of the draws: of 1,000 units some mean is off by 0.1 sds by chance with 1,000 draws.
`evidence` is the log evidence minus the truth (without a truth: itself, in brackets); Pyro's
guides have their bound there. `s` is seconds of the processor, from capture to draws, all
compilation included; Pyro's guides train for as long as flowvi took, at least 20 s. NUTS runs until
every parameter has 400 effective draws. MB is the most that the process held.

NUTS needs NumPyro: `--python` is an interpreter that has it, this one by default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import truths
from scipy.special import gammaln

HERE = Path(__file__).resolve().parent
PEERS = ("pyro_normal", "pyro_lowrank", "pyro_hierarchical")
LEAST = 20.0  # seconds of the training of Pyro's guides
COLUMNS = ("case", "method", "D", "verdict", "k-hat", "shared", "units", "evidence", "s", "MB", "")


@dataclass(frozen=True)
class Case:
    """A model with data of some size.

    Args:
        model: File in models/.
        groups: Groups, persons, times, or cells a side.
        units: Sites of the local latents.
        dim: Of the slopes, where there are any.
        pines: Whether the data are the pines of the corpus.
    """

    model: str
    groups: int
    units: tuple[str, ...]
    dim: int | None = None
    pines: bool = False

    def arguments(self, groups: int | None, seed: int, shared: Path) -> list[np.ndarray]:
        """The arguments of the model."""
        module = corpus.load_model(self.model)
        if self.pines:
            with np.load(shared / "targets" / "pines.npz") as file:
                count = file["counts" if "counts" in file.files else file.files[0]].astype(float)
            return [count, module.scale_tril(len(count)).numpy()]
        more = {} if self.dim is None else {"dim": self.dim}
        return [a.numpy() for a in module.simulate(groups or self.groups, seed, **more)]

    def truth(self, arguments: list[np.ndarray]) -> truths.Truth | None:
        """By quadrature, if there is one."""
        if self.pines:
            return truths.Truth(pines_evidence(arguments[0]), {}, {})
        if self.model in truths.PROBLEMS and self.dim in (None, 2):
            return truths.truth(self.model, *arguments)
        return None


CASES = {
    "normal": Case("normal_groups", 1000, ("u",)),
    "normal_noncentered": Case("normal_groups_noncentered", 1000, ("u", "offset")),
    "logistic": Case("logistic_groups", 1000, ("u",)),
    "poisson": Case("poisson_groups", 1000, ("u",)),
    "beta_binomial": Case("beta_binomial", 1000, ("p",)),
    "radon": Case("radon_slopes", 85, ("intercept", "slope")),
    "slopes_2": Case("random_slopes", 1000, ("u",), dim=2),
    "slopes_3": Case("random_slopes", 1000, ("u",), dim=3),
    "irt": Case("irt_persons", 500, ("ability",)),
    "volatility": Case("stochastic_volatility", 1000, ("h",)),
    "local_level": Case("local_level", 1000, ("level",)),
    "cox": Case("cox_grid", 40, ("field",)),
    "pines": Case("cox_grid", 40, ("field",), pines=True),
    "gp": Case("gp_counts", 150, ("f",)),
    "crossed": Case("crossed_groups", 500, ("u",)),
    "tied": Case("tied_groups", 200, ("u",)),
    "dense": Case("dense_logistic", 60, ("w",)),
}


def pines_evidence(count: np.ndarray) -> float:
    """That of shared/targets, with the terms of Poisson's density that it leaves out."""
    return 501.73 - float(count.sum() * np.log(count.size) + gammaln(count + 1).sum())


def run(
    method: str, case: Case, folder: Path, options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Facts and moments of one method, from a process of its own."""
    module, python = "peers.many", sys.executable
    if method == "nuts":
        module, python = "peers.numpyro_many", options.python
    out = folder / f"{method}.npz"
    command = [python, "-m", module, method, case.model, "--seed", str(options.seed)]
    command += ["--data", str(folder / "data.npz"), "--out", str(out), "--seconds", str(seconds)]
    if method != "nuts":
        command += ["--draws", str(options.draws), "--guide", options.guide]
    # XLA would take every processor for itself otherwise.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = f"{corpus.ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    try:
        done = subprocess.run(
            command, cwd=HERE, env=env, capture_output=True, text=True, timeout=options.longest
        )
    except subprocess.TimeoutExpired:
        return {"method": method, "note": f"did not end in {options.longest:.0f} s"}
    if done.returncode:
        note = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        if "No module named 'jax" in note or "No module named 'numpyro" in note:
            note = f"{python} has no NumPyro: name one that has it with --python"
        return {"method": method, "note": note}
    facts = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    with np.load(out) as file:
        facts["moments"] = {name: file[name] for name in file.files}
    return {"method": method, **facts}


def errors(
    moments: dict[str, np.ndarray], truth: truths.Truth, sites: set[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of means in sds, and of sds, of all entries that vary; (entries,) each."""
    of_mean, of_sd = [np.empty(0)], [np.empty(0)]
    for name in sorted(sites):
        sd, wanted = np.ravel(truth.sd[name]), np.ravel(truth.mean[name])
        # A constant has an sd that is rounding alone.
        varies = sd > 1e-6 * np.maximum(1.0, np.abs(wanted))
        mean, found = (moments[f"{kind}/{name}"].ravel()[varies] for kind in ("mean", "sd"))
        of_mean.append(np.abs(mean - wanted[varies]) / sd[varies])
        of_sd.append(np.abs(found / sd[varies] - 1))
    return np.concatenate(of_mean), np.concatenate(of_sd)


def compared(
    row: dict[str, Any], case: Case, truth: truths.Truth | None, sampled: bool
) -> dict[str, Any]:
    """Errors of a row beside its facts; moments are left out."""
    moments = row.pop("moments", {})
    row["truth"] = "none" if truth is None else "NUTS" if sampled else "quadrature"
    if truth is None:
        return row
    known = {name for name in truth.mean if f"mean/{name}" in moments}
    for part, sites in {
        "shared": known - set(case.units),
        "units": known & set(case.units),
    }.items():
        of_mean, of_sd = errors(moments, truth, sites)
        if len(of_mean):
            middle = float(np.median(of_mean)), float(np.median(of_sd))
            row[part] = [float(of_mean.max()), float(of_sd.max()), *middle]
    value = row.get("log_evidence", row.get("bound"))
    if value is not None and not sampled:
        row["log_evidence_error"] = value - truth.log_evidence
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""

    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    mark = "*" if row["truth"] == "NUTS" else ""
    shared, units = row.get("shared"), row.get("units")
    evidence = number("log_evidence_error", "+.3f")
    if evidence == "-" and (value := row.get("log_evidence", row.get("bound"))) is not None:
        evidence = f"({value:.2f})"
    cells = [
        name,
        row["method"],
        number("dim", "d"),
        row.get("verdict", "-"),
        number("khat", ".2f"),
        f"{shared[0]:.3f}/{shared[1]:.3f}{mark}" if shared else "-",
        f"{units[0]:.3f}/{units[1]:.3f}, {units[2]:.3f}/{units[3]:.3f}{mark}" if units else "-",
        evidence,
        number("cpu", ".1f"),
        number("peak_mb", ".0f"),
        row.get("note", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods on one case."""
    case = CASES[name]
    arguments = case.arguments(options.groups, options.seed, options.shared)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        np.savez(folder / "data.npz", *arguments)
        if not options.skip_flowvi:
            rows.append(run("flowvi", case, folder, options, 0.0))
        seconds = max(LEAST, rows[0].get("cpu", 0.0)) if rows else LEAST
        methods = ["laplace"] * options.laplace + [*PEERS] * options.pyro
        rows += [
            run(method, case, folder, options, min(seconds, options.longest)) for method in methods
        ]
        if options.nuts:
            rows.append(run("nuts", case, folder, options, options.longest / 2))
    truth = case.truth(arguments)
    sampled = truth is None and options.nuts and "moments" in rows[-1]
    if sampled:
        moments = rows[-1]["moments"]
        mean, sd = (
            {key.split("/")[1]: v for key, v in moments.items() if key.startswith(kind)}
            for kind in ("mean/", "sd/")
        )
        truth = truths.Truth(np.nan, mean, sd)
    facts = {"case": name, "groups": options.groups or case.groups, "seed": options.seed}
    return [facts | compared(row, case, truth, sampled) for row in rows]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--only", choices=CASES, action="append", help="may be given again")
    parser.add_argument("--groups", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--guide", default="auto")
    parser.add_argument("--nuts", action="store_true")
    parser.add_argument("--pyro", action="store_true")
    parser.add_argument("--laplace", action="store_true")
    parser.add_argument("--skip-flowvi", action="store_true")
    parser.add_argument("--python", default=sys.executable, help="that has NumPyro")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--longest", type=float, default=1800.0, help="seconds of any method")
    parser.add_argument("--json", type=Path, help="file to which a line is added for each row")
    return parser


def main() -> None:
    options = parser().parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for name in options.only or CASES:
        for row in rows_of(name, options):
            print(line(name, row), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
