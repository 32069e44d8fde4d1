"""Memory limits of evaluations, and measurements of their memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from flowvi.runtime.memory_limit import _LIMIT as _LIMIT
from flowvi.runtime.memory_limit import DEFAULT as DEFAULT
from flowvi.runtime.memory_limit import LEAST as LEAST
from flowvi.runtime.memory_limit import MaxMemory as MaxMemory
from flowvi.runtime.memory_limit import limit as limit
from flowvi.runtime.memory_limit import memory_limit as memory_limit
from flowvi.runtime.memory_limit import parse_size as parse_size
from flowvi.runtime.torch_modes import EagerDispatchMode

# Shares of the limit for the tensors of an evaluation, and for the table of its results. The
# rest is for temporary memory of operations, and for memory that the allocator keeps.
EVALUATED, TABLED = 0.4, 0.2
# Memory of one call of a guide's sampler, in bytes. It is constant, so that draws do not depend
# on the limit.
PIECE = 32 * 10**6
# Largest number of points in one evaluation; more are not faster.
MOST = 2000
# Number of points without a limit other than memory.
ANY = 10**9


def evaluation_bytes() -> int:
    """Bytes of the limit for the tensors of an evaluation."""
    return int(EVALUATED * limit())


def table_bytes() -> int:
    """Bytes of the limit for a table of results; a larger one lies on disk."""
    return int(TABLED * limit())


class Cost(NamedTuple):
    """Bytes that an evaluation takes for any number of points, and for each of them."""

    fixed: float
    per_point: float

    def points_within(self, size: int, most: int = MOST) -> int:
        """How many points fit into a number of bytes; one, where none does."""
        return int(np.clip((size - self.fixed) // self.per_point, 1, most))


def measure_cost(function: Callable[[int], object]) -> Cost:
    """Measure the memory of a function, from calls with one point and with several.

    Args:
        function: Takes a number of points. A first call is not measured.
    """
    function(1)
    one = peak_bytes(lambda: function(1))
    more = int(np.clip(PIECE // max(one, 1), 1, 16))
    each = max((peak_bytes(lambda: function(1 + more)) - one) / more, 1.0)
    return Cost(max(one - each, 0.0), each)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made by a function hold at the same time.

    Temporary memory inside of an operation is not counted.
    """
    with _Meter() as meter:
        result = function()
    del result
    return meter.most


class _Meter(EagerDispatchMode):
    """Counts the memory of tensors when operations make them, and when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and t.layout == torch.strided and _key(t) not in given:
                self._count(t)
        return out

    def _count(self, t: Tensor) -> None:
        storage, key = t.untyped_storage(), _key(t)
        if key in self._known:
            return
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        self._known[key] = weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.held -= size
        self._known.pop(key, None)


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)
