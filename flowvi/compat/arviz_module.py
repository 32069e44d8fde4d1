"""ArviZ itself, imported where two processes do so at once."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def import_arviz() -> Any:
    """ArviZ's module.

    The first process of a day writes a stamp: ArviZ 0.23 makes a temporary file and renames it. Of
    two processes that do so at once, one finds its file gone. Then the stamp is there already, and
    a second import does not write it.
    """
    try:
        return import_module("arviz")
    except FileNotFoundError:
        return import_module("arviz")
