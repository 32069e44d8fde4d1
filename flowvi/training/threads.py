"""Choose the number of torch threads of a fit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowvi.targets import Target

# Size of one density evaluation, in numbers, below which threads never pay.
SMALL = 200_000
# Required speed-up of several threads over one.
WORTH = 1.3
REPEATS = 5
# Largest size of an evaluation that is timed; larger ones take fewer draws.
LARGEST = 5_000_000


@contextmanager
def best_threads(target: Target, particles: int) -> Iterator[None]:
    """Use one thread, or torch's setting if a measurement shows a gain; restore it afterwards.

    Args:
        target: The density; its value and gradient are timed.
        particles: Draws in a step.
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
    """Median time of a value and its gradient, after one evaluation to warm up."""
    rows = sum(t.numel() for t in target.observed.values())
    particles = min(particles, max(1, LARGEST // max(rows, 1)))
    point = target.starts(torch.Generator(target.device).manual_seed(0))[:1].to(target.dtype)
    z = point.expand(particles, -1).clone().requires_grad_()
    batch = next(target.cover())[1] if target.subsampled else None
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.autograd.grad(target.log_prob(z, batch).sum(), z, allow_unused=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
