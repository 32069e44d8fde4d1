"""Memory of a process while a fit goes on: it does not grow with the steps.

    python benchmarks/memory.py [--steps 10000]

Prints the resident memory after a tenth of the steps and after all of them, for guides of a
hierarchical model with nine latents.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import flowvi

GUIDES = ("fullrank", "realnvp", "nsf_coupling")


def model(y: Tensor) -> None:
    """A mean for each row, around a common one."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Fit, and look at the memory on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    print("| guide | steps | MB after a tenth | MB at the end |\n|---|---|---|---|")
    for guide in GUIDES:
        found: list[float] = []

        def callback(step: flowvi.Step, found: list[float] = found) -> None:
            if step.step in (steps // 10, steps - 1):
                found.append(resident())

        target = flowvi.from_pyro(model, torch.linspace(-1, 1, 8))
        flowvi.fit(target, guide, steps=steps, progress=False, callback=callback, compile=False)
        print(f"| {guide} | {steps} | {found[0]:.0f} | {found[-1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
