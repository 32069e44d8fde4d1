"""Random numbers in recorded graphs: drawn anew, for every point, when the graph is evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def is_random(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function draws from the global random state; a generator of its own is data."""
    if not isinstance(function, OpOverload):
        return function in DRAWS
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return False
    names = [a.name for a in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # Attention is marked as random also without dropout.
    drops = given.get("dropout_p", 0.0 if "dropout_p" in names else 1.0) > 0
    return drops and given.get("generator") is None


# `torch.func.vmap` writes the same numbers for all points into memory that they share. These
# return what a random write leaves in its memory, made of numbers that differ.


def normal(memory: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """What `normal_` would have written."""
    return mean + std * torch.randn(memory.shape, dtype=memory.dtype, device=memory.device)


def uniform(memory: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """What `uniform_` would have written."""
    return low + (high - low) * torch.rand(memory.shape, dtype=memory.dtype, device=memory.device)


def exponential(memory: Tensor, rate: float = 1.0) -> Tensor:
    """What `exponential_` would have written."""
    return -torch.log1p(-uniform(memory)) / rate


def cauchy(memory: Tensor, median: float = 0.0, scale: float = 1.0) -> Tensor:
    """What `cauchy_` would have written."""
    return median + scale * torch.tan(math.pi * (uniform(memory) - 0.5))


def binomial(count: Tensor, probability: Tensor) -> Tensor:
    """`torch.binomial`, which complains under vmap unless both arguments are mapped."""
    both = torch.broadcast_tensors(count, probability)
    return torch.binomial(both[0] + 0 * both[1], both[1] + 0 * both[0])


WRITES = {
    "aten::normal_": normal,
    "aten::uniform_": uniform,
    "aten::exponential_": exponential,
    "aten::cauchy_": cauchy,
}
READS = {torch.ops.aten.binomial.default: binomial}
DRAWS = {*WRITES.values(), *READS.values()}
