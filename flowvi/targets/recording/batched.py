"""A function of one point, evaluated for many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils._pytree import tree_map

PointFunction = Callable[..., Any]


class Batched(nn.Module):
    """A function of one point, mapped over the leading dimensions of its first argument.

    Args:
        point: Function of tensors (D,), *inputs, without side effects; returns a tree.
        how: "tape" for a recorded graph, "vmap" for the function itself under
            `torch.func.vmap`, "loop" for one call a point.
        dtype: Precision in which to evaluate.
    """

    def __init__(self, point: PointFunction, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.how = how
        self.dtype = dtype
        if isinstance(point, nn.Module):
            self.graph: nn.Module | None = point
        else:
            self.graph = None
            self.__dict__["function"] = point

    @property
    def rounded(self) -> bool:
        """Whether the function that was recorded is coarser than the graph of it."""
        return self.graph is not None and bool(getattr(self.graph, "meta", {}).get("rounded"))

    @property
    def point(self) -> PointFunction:
        """The function of one point, recorded or as it was."""
        found: PointFunction = self.graph if self.graph is not None else self.__dict__["function"]
        return found

    def forward(self, z: Tensor, *inputs: Tensor) -> Any:
        """Evaluate. (*S, D) -> tree of (*S, ...)."""
        shape = z.shape[:-1]
        flat = z.reshape(-1, z.shape[-1]).to(self.dtype)
        inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        point = self.point
        if self.how == "loop":
            rows = [point(row, *inputs) for row in flat]
            out = tree_map(lambda *leaves: torch.stack(leaves), *rows)
        else:
            dims = (0, *(None for _ in inputs))
            # "same": random numbers that are left do not affect the density.
            mapped = torch.func.vmap(point, in_dims=dims, randomness="same")
            with silence_vmap_fallback():
                out = mapped(flat, *inputs)
        return tree_map(lambda t: t.reshape((*shape, *t.shape[1:])), out)


@contextmanager
def silence_vmap_fallback() -> Iterator[None]:
    """Silence the warning of vmap for operations that have no batched form."""
    announce = _functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    announce(False)
    try:
        yield
    finally:
        announce(True)
