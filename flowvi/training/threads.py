"""How many threads torch computes with during a fit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowvi.targets import Target

# Numbers in one evaluation of the density, below which threads never pay.
SMALL = 200_000
# Several threads have to be so much faster than one; they are taken from others.
WORTH = 1.3
REPEATS = 5


@contextmanager
def best_threads(target: Target, particles: int) -> Iterator[None]:
    """One thread, or as many as torch had where they were measured to pay; those afterwards.

    Args:
        target: The density, whose value and gradient are timed.
        particles: Draws a step.
    """
    before = torch.get_num_threads()
    rows = sum(t.numel() for t in target.observed.values())
    try:
        torch.set_num_threads(1)
        if before > 1 and particles * (target.dim + rows) >= SMALL:
            alone = _seconds(target, particles)
            torch.set_num_threads(before)
            if alone < WORTH * _seconds(target, particles):
                torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(target: Target, particles: int) -> float:
    """Median time of a value and gradient, after one evaluation that prepares them."""
    point = target.starts(torch.Generator(target.device).manual_seed(0))[:1].to(target.dtype)
    z = point.expand(particles, -1).clone().requires_grad_()
    batch = next(target.cover())[1] if target.subsampled else None
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.autograd.grad(target.log_prob(z, batch).sum(), z, allow_unused=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
