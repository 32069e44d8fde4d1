"""Random numbers that leave the caller's generators unchanged."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from flowvi.runtime.arguments import check_integer

# Torch's generators and Pyro's handlers are shared by all threads of the process.
_TURN = threading.RLock()


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore torch's random states after the block. One thread at a time enters; others wait.

    Args:
        seed: Seed inside of the block; None continues the caller's random numbers.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with _TURN, torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def get_rng_state() -> list[Tensor]:
    """States of torch's generators: that of the CPU, then those of GPUs in use."""
    used = torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def set_rng_state(state: Sequence[Tensor]) -> None:
    """Set torch's generators to saved states."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(list(state[1:]))


def derive_seed(seed: int, *purpose: int) -> int:
    """Derive a seed for one purpose, independent of other purposes and other seeds.

    Args:
        seed: The user's seed.
        *purpose: Whole numbers that name the purpose.
    """
    source = np.random.SeedSequence(check_integer("seed", seed, 0), spawn_key=purpose)
    return int(source.generate_state(1, np.uint64)[0] >> np.uint64(1))
