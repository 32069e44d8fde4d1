"""How long until a posterior can be trusted, beside NUTS: whole processes, in paired runs.

    python benchmarks/time_to_trust.py --quick [--write] [NAME ...]
    python benchmarks/time_to_trust.py [--shared DIR] [--seeds 3] [--effective 400]
                                       [--python PYTHON] [--longest 1800] [--json FILE] [NAME ...]

With --quick ten small fits are counted (`ten_fits.py`): steps, points at which the density and
the guide were evaluated, and calls. Counts do not depend on the machine; they are compared with
the table in time_to_trust.json, which --write replaces.

Otherwise each posterior of the corpus is fitted by a process of its own with the default call, and
sampled by NumPyro's NUTS in another, in turn, with one thread each. NUTS doubles its draws until
every parameter has the effective ones asked for, or gives up after 8,000. Per posterior: medians of
the CPU seconds of the whole processes, imports and compilers included, their ratio, and of the
median run the largest error of a mean (in sds) and of an sd against the reference, and the
verdict; and what NUTS came to. NUTS needs NumPyro: `--python` is an interpreter that has it, this
one by default. Without NumPyro its columns are left out, and a line says so. --json appends every
run to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import corpus
import numpy as np

TABLE = Path(__file__).with_suffix(".json")
CHAINS, WARM_UP, DRAWS, MOST = 4, 1000, 1000, 8000
HEADER = f"{'posterior':<28}{'flowvi':>8}{'NUTS':>8}{'ratio':>7}{'mean':>7}{'sd':>7}  verdict; NUTS"


def quick(names: list[str], write: bool) -> None:
    """Count the small fits, and print them beside the stored counts."""
    import ten_fits

    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    print(f"{'fit':<22}{'steps':>8}{'density':>10}{'calls':>8}{'flow':>10}{'calls':>8}  verdict")
    for name in names or ten_fits.FITS:
        found = ten_fits.count(name)
        counts = asdict(found.counts)
        cells = [f"{counts[key]}" for key in ("steps", "points", "calls")]
        cells += [f"{counts[key]}" for key in ("flow_points", "flow_calls")]
        wide = "".join(f"{c:>{w}}" for c, w in zip(cells, (8, 10, 8, 10, 8), strict=True))
        before = stored.get(name)
        share = "" if before is None else f"  ({counts['points'] / before['points']:.2f} x stored)"
        print(f"{name:<22}{wide}  {found.verdict}, KL {found.gap:.2g}{share}", flush=True)
        stored[name] = {**counts, "verdict": found.verdict}
    if write:
        TABLE.write_text(json.dumps(stored, indent=1) + "\n")


def flowvi_run(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The default call, and 4,000 draws."""
    import flowvi

    module = corpus.load_model(name)
    target = flowvi.from_pyro(module.model, *corpus.arguments(module, name, folder))
    fit = flowvi.fit(target, seed=seed, progress=False)
    draws = fit.draw(4000, seed=seed)
    verdict = flowvi.diagnose(draws).verdict
    used = flowvi.resample(draws) if verdict == "trust the resampled draws" else draws
    mean, sd = corpus.errors(used.values, corpus.reference(folder))
    return {"mean": mean, "sd": sd, "verdict": verdict, "steps": fit.meta["steps"]}


def nuts_run(name: str, folder: Path, seed: int, effective: float, data: Path) -> dict[str, Any]:
    """NumPyro's NUTS, with draws doubled until there are enough effective ones."""
    import jax
    from numpyro.diagnostics import effective_sample_size
    from numpyro.infer import MCMC, NUTS
    from peers.numpyro_models import MODELS
    from peers.numpyro_series import MODELS as SERIES

    jax.config.update("jax_enable_x64", True)
    with np.load(data) as file:
        args = [file[key] for key in file.files]
    mcmc = MCMC(
        NUTS({**MODELS, **SERIES}[name]),
        num_warmup=WARM_UP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(seed), *args)
    kept = [mcmc.get_samples(group_by_chain=True)]
    reference = corpus.reference(folder)
    while True:
        chains = {k: np.concatenate([np.asarray(part[k]) for part in kept], 1) for k in kept[0]}
        least = min(float(effective_sample_size(chains[k]).min()) for k in reference)
        count = next(iter(chains.values())).shape[1]
        if least >= effective or count >= MOST:
            break
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(mcmc.post_warmup_state.rng_key, *args)
        kept.append(mcmc.get_samples(group_by_chain=True))
    mean, sd = corpus.errors(chains, reference)
    return {"mean": mean, "sd": sd, "verdict": f"{least:.0f} effective", "steps": count}


def timed(
    method: str, name: str, options: argparse.Namespace, seed: int, data: Path
) -> dict[str, Any]:
    """One process; its CPU seconds from start to end with what it prints."""
    python = options.python if method == "nuts" else sys.executable
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [python, __file__, "--run", method, "--seeds", str(seed), name]
    words += ["--shared", str(options.shared), "--effective", str(options.effective)]
    words += ["--data", str(data)]
    # XLA would take every processor for itself otherwise.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    one = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            env={**os.environ, **one},
            timeout=options.longest,
        )
    except subprocess.TimeoutExpired:
        return {"seconds": math.inf, "verdict": f"did not end in {options.longest:.0f} s"}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{method} on {name} failed:\n{done.stderr[-2000:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(json.dumps({"posterior": name, "method": method, "seed": seed, **found}))
            file.write("\n")
    return found


def has_numpyro(python: str) -> bool:
    """Whether an interpreter can import NumPyro."""
    command = [python, "-c", "import numpyro"]
    return subprocess.run(command, capture_output=True).returncode == 0


def compare(options: argparse.Namespace) -> None:
    """Run all posteriors by both, in turn, and print the table."""
    posteriors = options.shared / "posteriors"
    names = options.names or sorted(p.name for p in posteriors.iterdir() if p.is_dir())
    beside = has_numpyro(options.python)
    if not beside:
        print(f"{options.python} has no NumPyro (--python names one): flowvi alone is timed.")
    print(HEADER)
    ratios = []
    for name in names:
        runs: dict[str, list[dict[str, Any]]] = {"flowvi": [], "nuts": []}
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.npz"
            module = corpus.load_model(name)
            # NumPyro's interpreter need not have torch, which the model files import.
            np.savez(data, *map(np.asarray, corpus.arguments(module, name, posteriors / name)))
            for seed in range(options.seeds):
                for method in ("flowvi", "nuts") if beside else ("flowvi",):
                    runs[method].append(timed(method, name, options, seed, data))
        ours = sorted(runs["flowvi"], key=lambda r: r["seconds"])[options.seeds // 2]
        cells, last = f"{'':>8}{'':>7}", ""
        if beside:
            theirs = sorted(runs["nuts"], key=lambda r: r["seconds"])[options.seeds // 2]
            ratios.append(ours["seconds"] / theirs["seconds"])
            cells = f"{theirs['seconds']:>8.1f}{ratios[-1]:>7.2f}"
            last = f"; {theirs['verdict']}" + _errors(theirs)
        print(
            f"{name:<28}{ours['seconds']:>8.1f}{cells}{ours.get('mean', math.nan):>7.3f}"
            f"{ours.get('sd', math.nan):>7.3f}  {ours['verdict']}"
            f" ({ours.get('steps', 0)} steps){last}",
            flush=True,
        )
    if ratios:
        sooner = sum(ratio < 1 for ratio in ratios)
        print(f"sooner on {sooner} of {len(ratios)}; median ratio {statistics.median(ratios):.2f}")


def _errors(run: dict[str, Any]) -> str:
    return f", {run['mean']:.3f} / {run['sd']:.3f}" if "mean" in run else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--quick", action="store_true", help="count small fits")
    parser.add_argument("--write", action="store_true", help="store the counts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--effective", type=float, default=400.0)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has NumPyro")
    parser.add_argument("--longest", type=float, default=1800.0, help="seconds of a run")
    parser.add_argument("--json", type=Path, help="file that every run is appended to")
    parser.add_argument("--run", choices=["flowvi", "nuts"], help="one run, in this process")
    parser.add_argument("--data", type=Path, help="arguments of the model, for one run of NUTS")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.quick:
        import torch

        torch.set_num_threads(1)
        quick(options.names, options.write)
    elif options.run:
        folder = options.shared / "posteriors" / options.names[0]
        arguments = (options.names[0], folder, options.seeds)
        nuts = options.run == "nuts"
        more = (options.effective, options.data)
        print(json.dumps(nuts_run(*arguments, *more) if nuts else flowvi_run(*arguments)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
