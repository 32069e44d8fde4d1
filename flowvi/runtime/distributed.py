"""Data parallel fits: the processes of a torch.distributed group share the draws of each step.

Every process runs the whole fit. What is random comes from the same seeds
everywhere, so that all processes make the same choices; in a step each takes its
own draws, and the gradients are averaged. P processes of K draws take the steps
of one with P K.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """Number of processes P; 1 outside a group."""
    return dist.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _is_initialized() else 0


def all_reduce_mean(
    bound: Tensor, gradient: Tensor, extra: Sequence[float] = (), dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, list[float]]:
    """Means over the processes of a scalar and of a vector (P), in one exchange.

    Args:
        bound: The scalar, ().
        gradient: The vector, (P).
        extra: Numbers that the first process sends to the others.
        dtype: Precision in which the vector travels; its own by default.

    Returns:
        Both means, and the numbers of the first process.
    """
    if size() == 1:
        return bound, gradient, list(extra)
    own = extra if rank() == 0 else [0.0] * len(extra)
    numbers = torch.cat([bound.detach().double().reshape(1), bound.new_tensor(own).double()])
    # Numbers are sent in single precision, together with their rounding errors.
    high = numbers.to(dtype or gradient.dtype)
    low = (numbers - high).to(high)
    both = torch.cat([high, low, gradient.to(high)])
    dist.all_reduce(both)
    high, low, mean = both.split([len(high), len(low), len(gradient)])
    sums = high.double() + low
    return sums[0] / size(), mean.to(gradient) / size(), sums[1:].tolist()


def broadcast_number(value: float) -> float:
    """The value of the first process, such as a clock's time or a callback's answer."""
    if size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(told, src=0)
    return float(told)


def broadcast(vector: Tensor) -> Tensor:
    """The vector of the first process, in all processes."""
    if size() > 1:
        vector = vector.clone()
        dist.broadcast(vector, src=0)
    return vector


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def join_process_group() -> Iterator[None]:
    """Join the group of `torchrun`, if that started this process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or _is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
