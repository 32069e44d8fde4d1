"""The memory limit of evaluations: a size in words, and where it holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MaxMemory = int | str | None

VARIABLE = "FLOWVI_MAX_MEMORY"
DEFAULT = 10**9
# Least limit: the evaluation of one point of a large model takes about as much.
LEAST = 32 * 10**6
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

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
