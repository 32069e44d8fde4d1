"""Checks of arguments: a message has the argument's name, what was expected, and what came."""

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

# Number of draws in the examples of messages.
EXAMPLE_DRAWS = 4000

P = ParamSpec("P")
T = TypeVar("T")


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Check that an argument is a whole number; NumPy's and torch's integers count.

    Raises:
        ValueError: The value is no whole number, or is smaller than `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return number


def check_positive(name: str, value: Any, what: str = "number") -> float:
    """Check that an argument is a positive, finite number.

    Raises:
        ValueError: The value is no such number.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive {what}; got {value!r}.")
    return number


def check_path(name: str, value: Any) -> Path:
    """Check that an argument is the path of a folder.

    Raises:
        TypeError: The value is no path.
        ValueError: The path is empty.
    """
    check_type(name, value, (str, os.PathLike), "the path of a folder")
    if not os.fspath(value):
        raise ValueError(f"{name} must be the path of a folder; got {value!r}.")
    return Path(value)


def optional(check: Callable[..., T], name: str, value: Any, *rest: Any) -> T | None:
    """Apply a check to an argument that may be None; None passes."""
    return None if value is None else check(name, value, *rest)


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], like: str) -> None:
    """Check the type of an argument.

    Args:
        name: Name of the argument.
        value: Its value.
        kinds: Types that are allowed.
        like: The expected type in words.

    Raises:
        TypeError: The value has another type.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {like}; got {_named(value)}.")


def _named(value: Any) -> str:
    """The type of a thing, with an article."""
    came = value.__name__ if isinstance(value, type) else type(value).__name__
    article = "an" if came[0] in "aeiouAEIOU" else "a"
    return f"{'the class' if isinstance(value, type) else article} {came}"


def refuse_fit(function: str, value: Any) -> None:
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
            f"{function}(fit.draw({EXAMPLE_DRAWS}))."
        )
    instead = getattr(type(value), "INSTEAD", "")
    if instead:
        raise TypeError(f"{function} needs the draws of a fit, and got a {came}: {instead}.")


def require_fit(function: str, value: Any, kinds: type | tuple[type, ...], like: str) -> None:
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


def check_choice(kind: str, name: str, choices: Iterable[str]) -> str:
    """Check that a name is in a registry.

    Raises:
        ValueError: The name is not in it; the message has the nearest name.
    """
    names = list(choices)
    if name not in names:
        raise ValueError(unknown_choice(kind, name, names))
    return name


def unknown_choice(kind: str, name: Any, choices: Iterable[str]) -> str:
    """Message about a name that is not in a registry."""
    names = list(choices)
    hint = f" Did you mean {close}?" if (close := closest_name(name, names)) else ""
    return f"No {kind} named '{name}'.{hint} Choose from {', '.join(names)}."


def closest_name(name: Any, names: Iterable[str]) -> str:
    """The name that is closest to a misspelt one; empty if none is close."""
    close = difflib.get_close_matches(str(name).lower(), [*names], n=1)
    return close[0] if close else ""


def suggest_spelling(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: the error for a misspelt keyword argument suggests the nearest argument."""
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check_keywords(function.__name__, kwargs, names)
        return function(*args, **kwargs)

    return call


def check_keywords(function: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse arguments that a function does not have.

    Raises:
        TypeError: An argument is not among the names; the message has the nearest name.
    """
    known_names = [*names]
    for key in given:
        if key not in known_names:
            close = closest_name(key, known_names)
            hint = f"Did you mean '{close}'?" if close else f"It has {', '.join(known_names)}."
            raise TypeError(f"{function}() has no argument '{key}'. {hint}")
