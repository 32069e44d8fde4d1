"""Random numbers of one's own: the caller's generators are left as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Torch's generators and Pyro's handlers belong to the process, not to a thread.
_TURN = threading.RLock()


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Give torch's random states back as they were; one thread at a time, others wait.

    Args:
        seed: Where the numbers inside begin; where the caller's go on, without.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with _TURN, torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
