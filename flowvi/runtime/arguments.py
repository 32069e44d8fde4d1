"""What users give, checked where it comes in: its name, what was expected, and what came."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

# Draws that an example asks for.
MANY = 4000

P = ParamSpec("P")
T = TypeVar("T")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number, of any library's kind.

    Raises:
        ValueError: It is none, or smaller than the least one.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return number


def positive(name: str, value: Any, what: str = "number") -> float:
    """A positive, finite number.

    Raises:
        ValueError: It is none.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive {what}; got {value!r}.")
    return number


def path(name: str, value: Any) -> Path:
    """A path.

    Raises:
        TypeError: It is none.
    """
    wanted(name, value, (str, os.PathLike), "the path of a folder")
    if not os.fspath(value):
        raise ValueError(f"{name} must be the path of a folder; got {value!r}.")
    return Path(value)


def given(check: Callable[..., T], name: str, value: Any, *rest: Any) -> T | None:
    """What a check makes of an argument, where there is one."""
    return None if value is None else check(name, value, *rest)


def wanted(name: str, value: Any, kinds: type | tuple[type, ...], like: str) -> None:
    """Refuse a thing of another kind.

    Args:
        name: Of the argument.
        value: What came.
        kinds: What may come.
        like: An example of what is expected.

    Raises:
        TypeError: It is of another kind.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {like}; got {_named(value)}.")


def _named(value: Any) -> str:
    """The type of a thing, with an article."""
    came = value.__name__ if isinstance(value, type) else type(value).__name__
    article = "an" if came[0] in "aeiouAEIOU" else "a"
    return f"{'the class' if isinstance(value, type) else article} {came}"


def draws_wanted(function: str, value: Any) -> None:
    """Refuse a fit where its draws are wanted.

    Args:
        function: What was called.
        value: What came; classes of other results say in `INSTEAD` what to do.

    Raises:
        TypeError: It is a fit, or another result of one.
    """
    came = type(value).__name__
    if hasattr(value, "draw") and hasattr(value, "history"):
        raise TypeError(
            f"{function} needs the draws of a fit, and got a {came}, the fit itself: "
            f"{function}(fit.draw({MANY}))."
        )
    instead = getattr(type(value), "INSTEAD", "")
    if instead:
        raise TypeError(f"{function} needs the draws of a fit, and got a {came}: {instead}.")


def fit_wanted(function: str, value: Any, kinds: type | tuple[type, ...], like: str) -> None:
    """Refuse what is no fit, such as its draws.

    Args:
        function: What was called.
        value: What came.
        kinds: What may come.
        like: An example of what is expected.

    Raises:
        TypeError: It is of another kind.
    """
    if isinstance(value, kinds):
        return
    drawn = hasattr(value, "log_p") and hasattr(value, "meta")
    way = ": pass the fit that made these draws" if drawn else ""
    raise TypeError(f"{function} needs {like}; got {_named(value)}{way}.")


def known(kind: str, name: str, choices: Iterable[str]) -> str:
    """A name that is in a registry.

    Raises:
        ValueError: It is not; the message has the one that it is nearest to.
    """
    names = list(choices)
    if name not in names:
        raise ValueError(unknown(kind, name, names))
    return name


def unknown(kind: str, name: Any, choices: Iterable[str]) -> str:
    """What to say of a name that is not in a registry."""
    names = list(choices)
    hint = f" Did you mean {close}?" if (close := nearest(name, names)) else ""
    return f"No {kind} named '{name}'.{hint} Choose from {', '.join(names)}."


def nearest(name: Any, names: Iterable[str]) -> str:
    """The name that another one may be a misspelling of; empty where none is near."""
    close = difflib.get_close_matches(str(name).lower(), [*names], n=1)
    return close[0] if close else ""


def spelt(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function answer a misspelt argument with the one that may have been meant."""
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(function.__name__, kwargs, names)
        return function(*args, **kwargs)

    return call


def check_names(function: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse arguments that a function does not have.

    Raises:
        TypeError: One is not among its names; the message has the nearest.
    """
    known_names = [*names]
    for key in given:
        if key not in known_names:
            close = nearest(key, known_names)
            hint = f"Did you mean '{close}'?" if close else f"It has {', '.join(known_names)}."
            raise TypeError(f"{function}() has no argument '{key}'. {hint}")
