"""Columns of tables among the arguments of a model: conversion to tensors, and refusals."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from flowvi.targets.recording.source_lines import lines_of

NUMBERS = "biufc"
ZEROS_AND_ONES = "columns of 0 and 1 (pd.get_dummies({x}, dtype=float))"
CURES = {
    "strings": "codes (pd.factorize({x})[0], or {x}.astype('category').cat.codes), or "
    + ZEROS_AND_ONES,
    "categories": f"their codes, {{x}}.cat.codes, or {ZEROS_AND_ONES}",
    "dates": "numbers since a date, such as ({x} - {x}.min()) / pd.Timedelta(days=1)",
    "time spans": "numbers, such as {x} / pd.Timedelta(days=1)",
    "objects": "numbers, pd.to_numeric({x}), or codes of what is none, pd.factorize({x})[0]",
    "table": "its columns one by one, or torch.as_tensor({x}.to_numpy(float)) of those of numbers",
}
# Types of errors that values other than tensors cause.
TYPES = (
    "Series", "DataFrame", "Index", "Categorical", "ndarray", "numpy", "object", "str", "string",
    "Array", "array", "Timestamp", "Timedelta", "datetime", "dtype", "data type",
)  # fmt: skip


def as_tensor(value: Any) -> Any:
    """An array of numbers, or a column of a table, as a tensor; all else as it is.

    What is missing in a column of whole numbers or booleans is NaN, as in one of floats.
    """
    array = _array(value) if is_column(value) else value
    if isinstance(array, np.ndarray) and array.dtype.kind in NUMBERS:
        if is_column(value) and array.dtype.kind in "iu" and array.dtype != np.int32:
            # Codes of categories have a small integer type, which is no index for torch.
            array = array.astype(np.int64)
        # Torch warns about read-only arrays, and rejects negative strides.
        return torch.as_tensor(np.require(array, requirements=["C", "W"]))
    return value


def is_column(value: Any) -> bool:
    """Whether a value is a column of a pandas or polars table, or an index of one."""
    return _is(value, "pandas", "Series", "Index") or _is(value, "polars", "Series")


def is_table(value: Any) -> bool:
    """Whether a value is a table of pandas or polars."""
    return _is(value, "pandas", "DataFrame") or _is(value, "polars", "DataFrame")


def kind_of(value: Any) -> str | None:
    """Kind of the entries of a column, array, list or table that are no numbers; None otherwise."""
    if is_table(value):
        return "table"
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return "strings"
    if not (is_column(value) or isinstance(value, np.ndarray)):
        return None
    if _is_categorical(value):
        return "categories"
    array = _array(value)
    kinds = {"M": "dates", "m": "time spans", "U": "strings", "S": "strings", "T": "strings"}
    if array.dtype.kind in NUMBERS:
        return None
    if array.dtype.kind == "O":
        known = [v for v in array.reshape(-1)[:100] if v is not None and v == v]
        return "strings" if known and all(isinstance(v, str) for v in known) else "objects"
    return kinds.get(array.dtype.kind, "objects")


def remedy(kind: str, name: str = "x") -> str:
    """Advice on what to pass in place of values of some kind."""
    return CURES[kind].format(x=name)


def not_numbers(arguments: Mapping[str, Any], error: Exception) -> str:
    """The argument of a model that may have caused an error because it holds no numbers.

    Args:
        arguments: What the model was called with, by name, as it was given.
        error: What it raised.

    Returns:
        A sentence that names the argument, what it holds and what to pass; empty if none is.
    """
    named, lines = any(word in str(error) for word in TYPES), lines_of(error)
    for argument, own in arguments.items():
        # The argument is not the cause if the failing line does not contain it.
        if not (named or re.search(rf"\b{re.escape(argument)}\b", lines)):
            continue
        for name, value, kind in _odd({argument: own}):
            what = "an array" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            what += _columns(value) if kind == "table" else f" of {kind}"
            return f"Its argument '{name}' is {what}; pass {remedy(kind, name)}."
    return ""


def _odd(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Values among the arguments that are no numbers, by name, and what they hold."""
    for name, value in arguments.items():
        kind = kind_of(value)
        if kind is not None:
            yield name, value, kind
        elif isinstance(value, Mapping):
            yield from _odd({f"{name}[{key!r}]": v for key, v in value.items()})
        elif isinstance(value, list | tuple):
            yield from _odd({f"{name}[{i}]": v for i, v in enumerate(value)})


def _columns(table: Any) -> str:
    """Which columns of a table hold no numbers, in words."""
    found = [(str(name), kind_of(table[name])) for name in table.columns]
    words = ", ".join(f"'{name}' ({kind})" for name, kind in found if kind is not None)
    return f" with {words}" if words else ""


def _array(value: Any) -> np.ndarray:
    """A column as an array; what is missing in one that has a mask of its own is NaN."""
    if isinstance(value, np.ndarray):
        return value
    dtype = value.dtype
    like = getattr(dtype, "numpy_dtype", None)
    if like is None or isinstance(dtype, np.dtype) or like.kind not in NUMBERS:
        return np.asarray(value.to_numpy())
    if bool(value.isna().any()):
        wide = like if like.kind == "f" else np.dtype(float)
        return np.asarray(value.to_numpy(dtype=wide, na_value=np.nan))
    return np.asarray(value.to_numpy(dtype=like))


def _is_categorical(value: Any) -> bool:
    return type(getattr(value, "dtype", None)).__name__ in (
        "CategoricalDtype",
        "Categorical",
        "Enum",
    )


def _is(value: Any, library: str, *names: str) -> bool:
    found = sys.modules.get(library)
    return found is not None and isinstance(value, tuple(getattr(found, name) for name in names))
