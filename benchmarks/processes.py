"""Draws a second of one process and of several that share each step.

    python benchmarks/processes.py [--processes 2] [--draws 256] [--rounds 3]

The radon-like model of `speed.py` (919 rows, 85 groups), a RealNVP, one thread a process, and
no compiled step. A process takes so many draws a step; gradients are averaged between them (gloo).
One and several processes take turns; medians of the steps of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

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


def steps_of(processes: int, draws: int) -> list[float]:
    """Seconds of the steps of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, "--worker", "--draws", str(draws)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(x for x in done.stdout.splitlines() if x.startswith("["))
    return [float(x) for x in json.loads(line)]


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
    counts = (1, options.processes)
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(options.rounds):
        for count in counts:
            found[count] += steps_of(count, options.draws)
    one, many = (statistics.median(found[count]) for count in counts)
    print(f"1 process: {1e3 * one:.1f} ms a step of {options.draws} draws")
    print(f"{counts[1]} processes: {1e3 * many:.1f} ms a step of {counts[1] * options.draws} draws")
    print(f"throughput: {counts[1] * one / many:.2f} times")


if __name__ == "__main__":
    main()
