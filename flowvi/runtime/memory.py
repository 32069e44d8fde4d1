"""Memory limits of evaluations, and measurements of their memory."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from flowvi.runtime.torch_modes import EagerDispatchMode

MaxMemory = int | str | None

VARIABLE = "FLOWVI_MAX_MEMORY"
DEFAULT = 10**9
# Least limit: the evaluation of one point of a large model takes about as much.
LEAST = 32 * 10**6
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
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

_LIMIT: ContextVar[int | None] = ContextVar("max_memory", default=None)


def parse_size(max_memory: int | str, name: str = "max_memory") -> int:
    """Bytes of a number, or of words such as "500MB" or "2 GiB".

    Raises:
        ValueError: It is none, or too little for anything.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(max_memory))
    unit = UNITS.get(found[2].upper() or "B") if found else None
    try:
        size = int(float(found[1]) * unit) if found and unit else 0
    except (ValueError, OverflowError):
        size = 0
    if size < LEAST:
        raise ValueError(
            f'{name} must be a number of bytes or a size such as "2GB", and at least '
            f'"{LEAST // 10**6}MB"; got {max_memory!r}.'
        )
    return size


def limit() -> int:
    """Bytes that an evaluation may take: as asked for, as FLOWVI_MAX_MEMORY says, or 1 GB."""
    asked = _LIMIT.get()
    if asked is not None:
        return asked
    word = os.environ.get(VARIABLE)
    return parse_size(word, f"The variable {VARIABLE}") if word else DEFAULT


@contextmanager
def memory_limit(max_memory: MaxMemory) -> Iterator[None]:
    """Set the limit for what is evaluated inside; None leaves it as it is."""
    token = _LIMIT.set(limit() if max_memory is None else parse_size(max_memory))
    try:
        yield
    finally:
        _LIMIT.reset(token)


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
