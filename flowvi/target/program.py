"""Evaluate a function of one point for many points at a time, the fastest way that is right."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves, tree_map

from flowvi.target.tape import LatentValueRead, RandomNumber, record

PROGRAMS_KEPT = 12

PointFunction = Callable[..., Any]


class CaptureError(Exception):
    """No way of evaluating the function for many points agrees with the function itself."""


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

    def forward(self, z: Tensor, *inputs: Tensor) -> Any:
        """Evaluate. (*S, D) -> tree of (*S, ...)."""
        shape = z.shape[:-1]
        flat = z.reshape(-1, z.shape[-1]).to(self.dtype)
        inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        point = self.graph if self.graph is not None else self.__dict__["function"]
        if self.how == "loop":
            rows = [point(row, *inputs) for row in flat]
            out = tree_map(lambda *leaves: torch.stack(leaves), *rows)
        else:
            dims = (0, *(None for _ in inputs))
            # "same": whatever random number is left has nothing to do with the density.
            out = torch.func.vmap(point, in_dims=dims, randomness="same")(flat, *inputs)
        return tree_map(lambda t: t.reshape((*shape, *t.shape[1:])), out)


class Density(nn.Module):
    """A log density of one point, evaluated for many, with its gradient compiled to plain calls.

    The first evaluation at a batch size runs the batched function as it is.
    From the second on, the value and the gradient at that size are one
    straight list of tensor operations, without autograd and without vmap.

    Args:
        batched: The log density, (*S, D) -> (*S).
        frozen: Whether z is the only input that gradients are wanted for.
    """

    def __init__(self, batched: Batched, frozen: bool) -> None:
        super().__init__()
        self.batched = batched
        self.lowers = frozen and batched.how == "tape"
        self.__dict__["_programs"] = OrderedDict()

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
        # Programs hold constants of their own; they are written anew where those have gone.
        self.__dict__["_programs"].clear()
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Density:
        return Density(copy.deepcopy(self.batched, memo), self.lowers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": OrderedDict()}

    def _program(
        self, z: Tensor, inputs: Sequence[Tensor], gradient: bool
    ) -> Callable[..., Any] | None:
        programs = self.__dict__["_programs"]
        key = (tuple(z.shape), gradient, tuple(tuple(x.shape) for x in inputs))
        if key not in programs:
            # Lowering pays from the second use on.
            programs[key] = None
            while len(programs) > PROGRAMS_KEPT:
                programs.popitem(last=False)
            return None
        programs.move_to_end(key)
        if programs[key] is None:
            programs[key] = self._lower(z, inputs, gradient)
        return programs[key]

    def _lower(
        self, z: Tensor, inputs: Sequence[Tensor], gradient: bool
    ) -> Callable[..., Any] | None:
        def value(z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self.batched(z, *inputs),)

        def value_and_gradient(z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                log_p = self.batched(z, *inputs)
                (gradient,) = torch.autograd.grad(log_p.sum(), z)
            return log_p.detach(), gradient

        try:
            return _no_grad(record(value_and_gradient if gradient else value, [z, *inputs]))
        except Exception as error:
            self.lowers = False
            warnings.warn(
                f"Keeping the slower evaluation of the density: {error}", stacklevel=5
            )
            return None


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
            # A second derivative is wanted: the plain path has all of them.
            batched, inputs = ctx.rest
            log_p = batched(z, *inputs)
            (gradient,) = torch.autograd.grad(log_p.sum(), z, create_graph=True)
        return upstream.unsqueeze(-1) * gradient, None, None, None


def capture(
    function: PointFunction, points: Tensor, inputs: Sequence[Tensor], name: str
) -> Batched:
    """Find the fastest way to evaluate a log density for many points that agrees with it.

    Tried in turn: a recorded graph, written in double precision; the same in
    the function's own precision; `torch.func.vmap` over the function; a loop,
    with a warning. Value and gradient must agree with the function's own at
    every one of the given points.

    Args:
        function: Of a point (D,) and further inputs, returns ().
        points: Where to compare, (P, D).
        inputs: Further inputs.
        name: What to call the function in messages.

    Raises:
        LatentValueRead: A value that depends on the point was read into Python.
        RandomNumber: Random numbers are drawn inside.
        CaptureError: The function does not agree with itself.
    """
    expected = [_value_and_gradient(function, p, inputs) for p in points]
    if not _agree(expected[0], _value_and_gradient(function, points[0], inputs), strict=True):
        raise CaptureError(
            f"Two evaluations of {name} at the same point differ: it draws random numbers that "
            "are not sites, or keeps state between calls. Draw them before the model, as data."
        )
    reason = ""
    for how, dtype in (("tape", torch.float64), ("tape", points.dtype), ("vmap", points.dtype)):
        try:
            batched = _batched(function, points, inputs, how, dtype)
            if _verify(batched, points, inputs, expected):
                return batched
            reason = reason or "the recorded graph differs from the model"
        except (LatentValueRead, RandomNumber):
            raise
        except Exception as error:  # whatever one path cannot do, the next one may
            reason = reason or f"{type(error).__name__}: {error}".split("\n")[0]
    warnings.warn(f"Evaluating {name} one draw at a time, which is slow: {reason}", stacklevel=4)
    return Batched(function, "loop", points.dtype)


def capture_values(
    function: PointFunction, points: Tensor, inputs: Sequence[Tensor], like: Batched
) -> Batched:
    """Batch a function that returns a tree of values, in the way that was found for its density."""
    expected = [tree_leaves(function(p, *inputs)) for p in points]
    batched = _batched(function, points, inputs, like.how, like.dtype)
    with torch.no_grad():
        found = tree_leaves(batched(points, *inputs))
    for column, rows in zip(found, zip(*expected, strict=True), strict=True):
        if not _agree((column,), (torch.stack(rows),)):
            return Batched(function, "loop", points.dtype)
    return batched


def _batched(
    function: PointFunction,
    points: Tensor,
    inputs: Sequence[Tensor],
    how: str,
    dtype: torch.dtype,
) -> Batched:
    if how != "tape":
        return Batched(function, how, points.dtype)
    with torch.no_grad():
        graph = record(function, [points[0], *inputs], double=dtype != points.dtype)
    return Batched(graph, "tape", dtype)


def _value_and_gradient(
    function: PointFunction, point: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = point.detach().clone().requires_grad_()
        log_p = function(z, *inputs)
        if not log_p.requires_grad:
            return log_p.detach(), torch.zeros_like(z)
        try:
            (gradient,) = torch.autograd.grad(log_p, z, allow_unused=True)
        except RuntimeError:
            # Autograd cannot go back through some writes in place; the recorded graph can.
            return log_p.detach(), _differences(function, point, inputs)
    return log_p.detach(), torch.zeros_like(z) if gradient is None else gradient


def _differences(function: PointFunction, point: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Gradient by central differences."""
    step = 1e-5 if point.dtype == torch.float64 else 1e-2
    with torch.no_grad():
        up, down = (
            [function(point + h * e, *inputs) for e in torch.eye(len(point)).to(point)]
            for h in (step, -step)
        )
    return (torch.stack(up) - torch.stack(down)) / (2 * step)


def _verify(
    batched: Batched,
    points: Tensor,
    inputs: Sequence[Tensor],
    expected: list[tuple[Tensor, Tensor]],
) -> bool:
    with torch.enable_grad():
        z = points.detach().clone().requires_grad_()
        log_p = batched(z, *inputs)
        gradient = torch.zeros_like(z)
        if log_p.requires_grad:
            (gradient,) = torch.autograd.grad(log_p.sum(), z)
    rows = zip(log_p.detach(), gradient, strict=True)
    return all(_agree(e, row) for e, row in zip(expected, rows, strict=True))


def _agree(a: Sequence[Tensor], b: Sequence[Tensor], strict: bool = False) -> bool:
    """Whether two rows of tensors are equal up to the rounding of the coarser one."""
    double = a[0].dtype == b[0].dtype == torch.float64
    rtol = (1e-12 if strict else 1e-7) if double else 2e-4
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        scale = 1 + x.abs().nan_to_num(posinf=0.0).max()
        same_kind = torch.equal(x.isfinite(), y.isfinite())
        if not same_kind or ((x - y).nan_to_num(0.0, 0.0, 0.0).abs() > rtol * scale).any():
            return False
    return True
