"""Draws a second of one process and of several that share each step.

    python benchmarks/processes.py [--processes 2] [--draws 256] [--rounds 3]

The radon-like model of `speed.py` (919 rows, 85 groups), a RealNVP, one thread a process, and
no compiled step. A process takes so many draws a step; gradients are averaged between them (gloo).
So many processes at once that know nothing of each other show what the machine allows: processors
that share a core do not make it twice as fast. All take turns; medians of the steps of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

STEPS, BEFORE = 120, 20


def worker(draws: int) -> None:
    """Time the steps of a fit in this process, one of a group."""
    import torch
    import torch.distributed as dist
    from step_models import radon

    import flowvi

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    problem, ends = radon(), list[float]()

    def told(_: object) -> None:
        ends.append(time.perf_counter())

    flowvi.fit(
        flowvi.from_pyro(problem.model, *problem.args),
        "realnvp",
        particles=draws,
        steps=STEPS,
        lr=1e-3,
        compile=False,
        progress=False,
        callback=told,
    )
    steps = [b - a for a, b in zip(ends[BEFORE:], ends[BEFORE + 1 :], strict=False)]
    if dist.get_rank() == 0:
        print(json.dumps(steps), flush=True)
    dist.destroy_process_group()


def started(processes: int, draws: int) -> subprocess.Popen[str]:
    """A group of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, "--worker", "--draws", str(draws)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def steps_of(groups: Sequence[int], draws: int) -> list[float]:
    """Seconds of the steps of groups of so many processes each, at the same time."""
    found: list[float] = []
    for running in [started(processes, draws) for processes in groups]:
        out, err = running.communicate()
        if running.returncode:
            raise SystemExit(err)
        line = next(x for x in out.splitlines() if x.startswith("["))
        found += [float(x) for x in json.loads(line)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.draws)
        return
    p, draws = options.processes, options.draws
    ways = {"1 process": [1], f"{p} processes": [p], f"{p} without each other": [1] * p}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, groups in ways.items():
            found[name] += steps_of(groups, draws)
    ms = {name: 1e3 * statistics.median(steps) for name, steps in found.items()}
    one, many, apart = ms.values()
    for name, each in ms.items():
        print(f"{name}: {each:.1f} ms a step of {draws} draws each")
    print(f"throughput: {p * one / many:.2f} times; the machine allows {p * one / apart:.2f}")


if __name__ == "__main__":
    main()
