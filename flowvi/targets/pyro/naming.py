"""Name and signature of a user's model, behind handlers and decorators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from pyro.poutine.messenger import _context_wrap
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.trace_messenger import TraceHandler
from torch.nn import Module

LAMBDA = "<lambda>"
# Largest number of nested wrappers that are unwrapped.
MOST = 100


def name_of(model: Any) -> str:
    """Name of a model in messages and results: the name that the user gave it."""
    for _ in range(MOST):
        behind = _inner(model) or _called(model)
        if behind is None:
            break
        model = behind
    name = getattr(model, "__name__", type(model).__name__)
    return "model" if name == LAMBDA else str(name)


def signature_of(model: Callable[..., Any]) -> inspect.Signature:
    """The arguments of a model, where a wrapper does not name them those of what it calls.

    Raises:
        ValueError, TypeError: They are not known.
    """
    for _ in range(MOST):
        behind = _inner(model) if _takes_anything(model) else None
        if behind is None:
            break
        model = behind
    return inspect.signature(model.forward if isinstance(model, Module) else model)


def _inner(model: Any) -> Any:
    """The function that a wrapper calls; None for the user's own function."""
    if isinstance(model, functools.partial):
        # A handler of Pyro's is this function with the handler and the model.
        return model.args[1] if model.func is _context_wrap else model.func
    if isinstance(model, ReparamHandler | TraceHandler):
        return model.fn
    behind = getattr(model, "__wrapped__", None)
    if callable(behind):
        return behind
    if isinstance(model, FunctionType) and _takes_anything(model):
        # A decorator without functools.wraps: the single function in its closure.
        return _only(cell.cell_contents for cell in model.__closure__ or ())
    return None


def _called(model: Any) -> Any:
    """The one model that a lambda calls."""
    if not isinstance(model, FunctionType) or model.__name__ != LAMBDA:
        return None
    code = model.__code__
    names = [n for n in code.co_names if n in model.__globals__]
    held = [cell.cell_contents for cell in model.__closure__ or ()]
    return _only([*(model.__globals__[n] for n in names), *held])


def _only(values: Any) -> Any:
    kinds = (FunctionType, MethodType, functools.partial, ReparamHandler, TraceHandler, Module)
    found = [value for value in values if isinstance(value, kinds)]
    return found[0] if len(found) == 1 else None


def _takes_anything(model: Any) -> bool:
    """Whether a callable passes on whatever it is called with, as a handler does."""
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return True
    kinds = [p.kind for p in parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
