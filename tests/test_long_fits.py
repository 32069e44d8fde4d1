"""Memory does not grow while a fit goes on; `benchmarks/memory.py` takes ten thousand steps."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import flowvi

WARM, STEPS = 60, 300
# What is kept of a step are a few numbers; the rest of the room is the allocator's.
MOST = 12e6
# Tensors of the step at hand, of which the two looks may find more or fewer.
SPARE = 20


def model(y: torch.Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rows(y: torch.Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def watch(first: int, last: int, found: list[tuple[int, int]]) -> Callable[[object], None]:
    """Look at the memory after two numbers of steps or epochs."""
    seen = iter(range(1, last + 1))

    def callback(_: object) -> None:
        if next(seen) in (first, last):
            found.append((tensors(), resident()))

    return callback


def test_steps_leave_nothing_behind(brief):
    target = flowvi.from_pyro(model, torch.linspace(-1, 1, 8))
    found: list[tuple[int, int]] = []

    flowvi.fit(target, "realnvp", steps=STEPS, progress=False, callback=watch(WARM, STEPS, found))

    (before, start), (after, end) = found
    assert after <= before + SPARE
    assert end - start < MOST


def test_epochs_leave_nothing_behind():
    target = flowvi.from_pyro(rows, torch.linspace(-1, 1, 40), local="row")
    found: list[tuple[int, int]] = []

    flowvi.fit(target, epochs=60, batch_size=20, progress=False, callback=watch(20, 60, found))

    (before, start), (after, end) = found
    assert after <= before + SPARE
    assert end - start < MOST
