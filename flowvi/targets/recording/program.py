"""A log density for many points, whose value and gradient become one list of plain operations."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from flowvi.targets.recording.batched import Batched
from flowvi.targets.recording.products import merge_products
from flowvi.targets.recording.simpler import simpler
from flowvi.targets.recording.tape import record

PROGRAMS_KEPT = 12
# Evaluations before a program is written: writing it costs what five to ten of them save.
PATIENCE = 5


class CompiledDensity(nn.Module):
    """A log density of one point, evaluated for many, with its gradient compiled to plain calls.

    The first evaluations at a batch size run the batched function as it is.
    After that, the value and the gradient at that size are one straight list
    of tensor operations, without autograd and without vmap.

    Args:
        batched: The log density, (*S, D) -> (*S).
        frozen: Whether z is the only input that gradients are wanted for.
    """

    def __init__(self, batched: Batched, frozen: bool) -> None:
        super().__init__()
        self.batched = batched
        self.lowers = frozen and batched.how == "tape"
        self.__dict__["_programs"], self.__dict__["_uses"] = OrderedDict(), OrderedDict()

    def begin(self, uses: Sequence[tuple[list[int], bool, list[list[int]], int]] = ()) -> None:
        """Reset the counts of evaluations, so that earlier evaluations do not affect rounding.

        Args:
            uses: What `uses` returned, to go on from there.
        """
        self.__dict__["_uses"] = OrderedDict(
            ((tuple(shape), gradient, tuple(map(tuple, inputs))), count)
            for shape, gradient, inputs, count in uses
        )

    def uses(self) -> list[tuple[list[int], bool, list[list[int]], int]]:
        """Number of evaluations at each batch size, the least recent first."""
        return [
            (list(shape), gradient, [list(s) for s in inputs], count)
            for (shape, gradient, inputs), count in self.__dict__["_uses"].items()
        ]

    def forward(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Evaluate the log density. (*S, D) -> (*S)."""
        if not self.lowers or is_functorch_wrapped_tensor(z) or z.numel() == 0:
            return self.batched(z, *inputs)
        needs_grad = z.requires_grad and torch.is_grad_enabled()
        flat = z.reshape(-1, z.shape[-1]).to(self.batched.dtype)
        program = self._program(flat.detach(), inputs, needs_grad)
        if program is None:
            return self.batched(z, *inputs)
        if needs_grad:
            log_p, _ = _Lowered.apply(flat, program, self.batched, inputs)
        else:
            (log_p,) = program(flat.detach(), *inputs)
        return log_p.reshape(z.shape[:-1])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A program refers to constants; it is written again if they no longer exist.
        self.__dict__["_programs"].clear()
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledDensity:
        return CompiledDensity(copy.deepcopy(self.batched, memo), self.lowers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": OrderedDict(), "_uses": OrderedDict()}

    def _program(
        self, z: Tensor, inputs: Sequence[Tensor], gradient: bool
    ) -> Callable[..., Any] | None:
        programs, uses = self.__dict__["_programs"], self.__dict__["_uses"]
        key = (tuple(z.shape), gradient, tuple(tuple(x.shape) for x in inputs))
        uses[key] = uses.pop(key, 0) + 1
        _shorten(uses)
        if uses[key] <= PATIENCE:
            return None
        programs[key] = programs.pop(key, None) or self._lower(z, inputs, gradient)
        _shorten(programs)
        return programs[key]

    def _lower(
        self, z: Tensor, inputs: Sequence[Tensor], gradient: bool
    ) -> Callable[..., Any] | None:
        try:
            return lower(self.batched, [z, *inputs], gradient)
        except Exception as error:
            self.lowers = False
            warnings.warn(f"Keeping the slower evaluation of the density: {error}", stacklevel=5)
            return None


def lower(batched: Batched, inputs: Sequence[Tensor], gradient: bool) -> Callable[..., Any]:
    """Write a log density, and its gradient if wanted, as a list of operations.

    Args:
        batched: The log density.
        inputs: Points (S, D), and its further arguments, of the shapes for which the list holds.
        gradient: Whether the gradient is wanted, too.

    Returns:
        A function of such inputs that returns the values (S) and the gradients (S, D), if wanted.
    """

    def value(z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (batched(z, *inputs),)

    def value_and_gradient(z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = batched(z, *inputs)
            (gradient,) = torch.autograd.grad(log_p.sum(), z)
        return log_p.detach(), gradient

    graph = merge_products(record(value_and_gradient if gradient else value, inputs))
    return _no_grad(simpler(graph, inputs))


def _shorten(table: OrderedDict[Any, Any]) -> None:
    """Drop the least recently used entries."""
    while len(table) > PROGRAMS_KEPT:
        table.popitem(last=False)


def _no_grad(graph: fx.GraphModule) -> Callable[..., Any]:
    def call(*args: Tensor) -> Any:
        with torch.no_grad():
            return graph(*args)

    return call


class _Lowered(torch.autograd.Function):
    """A log density whose gradient was computed together with its value."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, program: Any, batched: Batched, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        log_p, gradient = program(z, *inputs)
        ctx.save_for_backward(z, gradient)
        ctx.rest = (batched, inputs)
        ctx.mark_non_differentiable(gradient)
        return log_p, gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives need the plain evaluation.
            batched, inputs = ctx.rest
            log_p = batched(z, *inputs)
            (gradient,) = torch.autograd.grad(log_p.sum(), z, create_graph=True)
        return upstream.unsqueeze(-1) * gradient, None, None, None
