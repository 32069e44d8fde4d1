"""What prompts and notebooks show: the printed text, or a card."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


class Printed:
    """Base class of results whose `repr` is what `print` says."""

    def __repr__(self) -> str:
        return str(self)


class Displayed(Printed):
    """Base class of results that notebooks show as a card.

    Cards are drawn by the package above all results, which is imported when one is shown.
    """

    def _repr_html_(self) -> str:
        return str(later("flowvi.reporting.cards", "card")(self))


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a higher package, imported now: for methods that only forward to it.

    Args:
        module: Its module.
        name: Its name.
    """
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
