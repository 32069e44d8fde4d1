"""The precision in which a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flowvi.targets.schema import ModelError

# Supported precisions of values and parameters.
TRAINED = (torch.float32, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let new tensors have a precision meanwhile; None leaves torch's default as it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor of real floating-point numbers in a precision; all else as it is."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if real and dtype is not None else value


def precisions(tree: Any) -> set[torch.dtype]:
    """Precisions of all floating-point tensors in a tree."""
    leaves = tree_leaves(tree)
    return {t.dtype for t in leaves if isinstance(t, Tensor) and t.is_floating_point()}


class CastLatents(Messenger):
    """Cast draws at latent sites to one precision, whatever that of the priors is."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["value"] = tree_map(lambda t: cast(t, self.dtype), msg["value"])


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a precision: float64."""
    return str(dtype).removeprefix("torch.")


def explain_mixed_precision(error: Exception, held: Mapping[str, torch.dtype]) -> str:
    """Message on an error of torch that differing precisions cause; empty for other errors.

    Args:
        error: What torch said.
        held: Name -> precision of the tensors that the model was seen with.
    """
    said = str(error)
    if not any(word in said for word in ("dtype", "scalar type", "data type")):
        return ""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, dtype in held.items():
        by_dtype.setdefault(dtype, []).append(name)
    if not by_dtype:
        return ""
    words = ", ".join(
        f"{dtype_name(dtype)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for dtype, names in by_dtype.items()
    )
    return (
        f"It mixes tensors of several types; seen were {words}. Give data, modules and constants "
        "one precision: .double() for float64 throughout, .float() for float32."
    )


def check_trainable(name: str, value: Tensor) -> None:
    """Refuse a parameter whose type has no precision to train it in.

    Raises:
        ModelError: Names the parameter and its type.
    """
    if value.dtype in TRAINED:
        return
    way_out = (
        "give it a floating-point start, such as 3.0"
        if not (value.is_floating_point() or value.is_complex())
        else "make it float32 or float64, for a module with .float()"
    )
    raise ModelError(
        f"Parameter '{name}' is {dtype_name(value.dtype)}; parameters are trained in float32 or "
        f"float64: {way_out}."
    )


def succeeds(function: Callable[[], object]) -> bool:
    """Whether a call ends without an error."""
    try:
        function()
    except Exception:  # a model of another precision can fail with errors of many types
        return False
    return True
