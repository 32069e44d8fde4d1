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

P = ParamSpec("P")
T = TypeVar("T")


def whole(name: str, value: Any, least: int = 1) -> int:
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


def positive(name: str, value: Any, what: str = "number") -> float:
    """Check that an argument is a positive, finite number.

    Raises:
        ValueError: The value is no such number.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive {what}; got {value!r}.")
    return number


def path(name: str, value: Any) -> Path:
    """Check that an argument is the path of a folder.

    Raises:
        TypeError: The value is no path.
        ValueError: The path is empty.
    """
    wanted(name, value, (str, os.PathLike), "the path of a folder")
    if not os.fspath(value):
        raise ValueError(f"{name} must be the path of a folder; got {value!r}.")
    return Path(value)


def given(check: Callable[..., T], name: str, value: Any, *rest: Any) -> T | None:
    """Apply a check to an argument that may be None; None passes."""
    return None if value is None else check(name, value, *rest)


def wanted(name: str, value: Any, kinds: type | tuple[type, ...], like: str) -> None:
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
        came = value.__name__ if isinstance(value, type) else type(value).__name__
        article = "an" if came[0] in "aeiouAEIOU" else "a"
        article = "the class" if isinstance(value, type) else article
        raise TypeError(f"{name} must be {like}; got {article} {came}.")


def shared_alone(function: str, value: Any) -> None:
    """Refuse fits and draws of row latents in a function of latents that all rows share.

    Args:
        function: Name of the function, for the message.
        value: The fit or draws. The class attribute `FOR_ROWS` of those with row latents says
            what to do instead.

    Raises:
        TypeError: The value has latents for each row.
    """
    instead = getattr(type(value), "FOR_ROWS", "")
    if instead:
        raise TypeError(
            f"{function} is for latents that all rows share, and got a {type(value).__name__}, "
            f"with latents for each row (local=): {instead}."
        )


def known(kind: str, name: str, choices: Iterable[str]) -> str:
    """Check that a name is in a registry.

    Raises:
        ValueError: The name is not in it; the message has the nearest name.
    """
    names = list(choices)
    if name not in names:
        raise ValueError(unknown(kind, name, names))
    return name


def unknown(kind: str, name: Any, choices: Iterable[str]) -> str:
    """Message about a name that is not in a registry."""
    names = list(choices)
    hint = f" Did you mean {close}?" if (close := nearest(name, names)) else ""
    return f"No {kind} named '{name}'.{hint} Choose from {', '.join(names)}."


def nearest(name: Any, names: Iterable[str]) -> str:
    """The name that is closest to a misspelt one; empty if none is close."""
    close = difflib.get_close_matches(str(name).lower(), [*names], n=1)
    return close[0] if close else ""


def spelt(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: the error for a misspelt keyword argument suggests the nearest argument."""
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(function.__name__, kwargs, names)
        return function(*args, **kwargs)

    return call


def check_names(function: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse arguments that a function does not have.

    Raises:
        TypeError: An argument is not among the names; the message has the nearest name.
    """
    known_names = [*names]
    for key in given:
        if key not in known_names:
            close = nearest(key, known_names)
            hint = f"Did you mean '{close}'?" if close else f"It has {', '.join(known_names)}."
            raise TypeError(f"{function}() has no argument '{key}'. {hint}")
