"""Find the fastest correct way to evaluate a function at many points."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowvi.targets.recording.batched import Batched, PointFunction
from flowvi.targets.recording.tape import LatentValueRead, RandomNumber, record
from flowvi.targets.schema import ModelError


@dataclass(frozen=True)
class Trial:
    """Where to compare ways of evaluating a function.

    Args:
        points: Points, (P, D).
        inputs: Further arguments of the function: its parameters, and rows.
        others: Other inputs, which show whether an input was recorded as a constant.
    """

    points: Tensor
    inputs: Sequence[Tensor] = ()
    others: Sequence[Sequence[Tensor]] = ()

    def calls(self) -> list[tuple[Tensor, Sequence[Tensor]]]:
        """All points with the first inputs, and one with each of the others."""
        return [(self.points, self.inputs), *((self.points[:1], other) for other in self.others)]


def capture(
    function: PointFunction, trial: Trial, name: str, reads: bool = False, double: bool = True
) -> Batched:
    """Find the fastest way to evaluate a log density for many points that agrees with it.

    Tried in turn: a recorded graph, written in double precision; the same in
    the function's own precision; `torch.func.vmap` over the function; a loop,
    with a warning. Value and gradient must agree with the function's own.

    Args:
        function: Of a point (D,) and further inputs, returns ().
        trial: Where to compare.
        name: What to call the function in messages.
        reads: Whether the function may read values into Python, as a loop allows.
        double: Whether to try double precision first.

    Raises:
        ModelError: The function does not agree with itself, draws random numbers, or
            reads values that depend on the point.
    """
    own = trial.points.dtype
    ways = [("tape", torch.float64), ("tape", own), ("vmap", own)]
    reasons: list[str] = []
    for how, dtype in ways[own == torch.float64 or not double :]:
        try:
            batched = _batched(function, trial, how, dtype)
            if not reasons:
                # Tried after the tape, whose error names the line that draws a random number.
                _check_repeatable(function, trial, name)
            if all(_agrees(batched, function, *call) for call in trial.calls()):
                return batched
            reasons.append(f"the {how} differs from the model")
        except LatentValueRead as error:
            if not reads:
                raise ModelError(_reads(name, error)) from None
            reasons.append(f"a value is read into Python, {error}")
        except RandomNumber as error:
            raise ModelError(_random(name, error)) from None
        except ModelError:
            raise
        except Exception as error:  # whatever one way cannot do, the next one may
            reasons.append(f"{type(error).__name__}: {error}".split("\n")[0])
    return _looped(function, trial, name, reasons[0])


def capture_values(function: PointFunction, trial: Trial, like: Batched) -> Batched:
    """Batch a function that returns a tree of values, in the way that was found for its density."""
    batched = _batched(function, trial, like.how, like.dtype)
    for points, inputs in trial.calls():
        with torch.no_grad():
            found = tree_leaves(batched(points, *inputs))
            rows = zip(*(tree_leaves(function(p, *inputs)) for p in points), strict=True)
        for column, expected in zip(found, rows, strict=True):
            if not agree((column,), (torch.stack(expected),), rounded=batched.rounded):
                return Batched(function, "loop", points.dtype)
    return batched


def agree(
    a: Sequence[Tensor], b: Sequence[Tensor], strict: bool = False, rounded: bool = False
) -> bool:
    """Whether two rows of tensors are equal up to the rounding of the coarser one.

    Args:
        a: One row.
        b: The other.
        strict: Whether they come of the same operations.
        rounded: Whether some of these operations were in single precision.
    """
    # With double data and single latents, the value is double, but the gradient is single.
    double = not rounded
    double = double and all(x.dtype == torch.float64 for x in (*a, *b) if x.is_floating_point())
    rtol = (1e-12 if strict else 1e-7) if double else 2e-4
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        if x.numel() == 0:
            continue
        scale = 1 + x.abs().nan_to_num(posinf=0.0).max()
        same_kind = torch.equal(x.isfinite(), y.isfinite())
        if not same_kind or ((x - y).nan_to_num(0.0, 0.0, 0.0).abs() > rtol * scale).any():
            return False
    return True


def _batched(function: PointFunction, trial: Trial, how: str, dtype: torch.dtype) -> Batched:
    own = trial.points.dtype
    if how != "tape":
        return Batched(function, how, own)
    with torch.no_grad():
        double = dtype == torch.float64
        graph = record(function, [trial.points[0], *trial.inputs], double=double)
    return Batched(graph, "tape", dtype)


def _check_repeatable(function: PointFunction, trial: Trial, name: str) -> None:
    first, second = (
        _value_and_gradients(function, trial.points[0], trial.inputs) for _ in range(2)
    )
    if agree(first, second, strict=True):
        return
    raise ModelError(
        f"Two evaluations of {name} at the same point differ: it draws random numbers that are "
        "not sites, or keeps state between calls. Draw them before the model, as data, and put "
        "modules into evaluation mode (.eval())."
    )


def _looped(function: PointFunction, trial: Trial, name: str, reason: str) -> Batched:
    """The function itself, point by point, if its own gradient is its slope."""
    point = trial.points[0]
    direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(0)).to(point)
    _, gradient, *_ = _value_and_gradients(function, point, trial.inputs)
    slope = _slope(function, point, trial.inputs, direction)
    found = gradient @ direction
    scale = 1 + (gradient * direction).abs().sum()
    tolerance = 1e-4 if point.dtype == torch.float64 else 5e-2
    if found.isfinite() and slope.isfinite() and (found - slope).abs() > tolerance * scale:
        raise ModelError(
            f"The gradient of {name} is not the slope of its value: {reason}. A number that was "
            "read out of a tensor (.item(), .numpy(), .detach()) carries no gradient. Use "
            "torch's own functions, or a torch.autograd.Function with a backward."
        )
    warnings.warn(f"Evaluating {name} one draw at a time, which is slow: {reason}", stacklevel=5)
    return Batched(function, "loop", point.dtype)


def _agrees(
    batched: Batched, function: PointFunction, points: Tensor, inputs: Sequence[Tensor]
) -> bool:
    """Whether values and gradients of a batch are those of the function, row by row."""
    expected = [_value_and_gradients(function, p, inputs) for p in points]
    with torch.enable_grad():
        z = points.detach().clone().requires_grad_()
        log_p = batched(z, *inputs)
        learned = [x for x in inputs if x.requires_grad]
        gradient, *others = _gradients(log_p.sum(), [z, *learned])
    rows = zip(log_p.detach(), gradient, strict=True)
    totals = (torch.stack(o).sum(0) for o in list(zip(*expected, strict=True))[2:])
    same = partial(agree, rounded=batched.rounded)
    return all(same(e[:2], row) for e, row in zip(expected, rows, strict=True)) and all(
        total.isnan().all() or same((total,), (o,)) for total, o in zip(totals, others, strict=True)
    )


def _value_and_gradients(
    function: PointFunction, point: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Value, gradient, and gradients with respect to inputs that have them (NaN: unknown)."""
    learned = [x for x in inputs if x.requires_grad]
    try:
        with torch.enable_grad():
            z = point.detach().clone().requires_grad_()
            log_p = function(z, *inputs)
            return (log_p.detach(), *_gradients(log_p, [z, *learned]))
    except RuntimeError:
        # Autograd cannot go back through some writes in place; the recorded graph can.
        with torch.no_grad():
            value = function(point, *inputs)
        steps = torch.eye(len(point)).to(point)
        gradient = torch.stack([_slope(function, point, inputs, e) for e in steps])
        return (value, gradient, *(torch.full_like(x, torch.nan) for x in learned))


def _gradients(log_p: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not log_p.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(log_p, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _slope(
    function: PointFunction, point: Tensor, inputs: Sequence[Tensor], direction: Tensor
) -> Tensor:
    """Derivative along a direction, by central differences with an error of order h^4."""
    h = 1e-3 if point.dtype == torch.float64 else 3e-2
    with torch.no_grad():
        far_down, down, up, far_up = (
            function(point + k * h * direction, *inputs) for k in (-2, -1, 1, 2)
        )
    slope: Tensor = (8 * (up - down) - (far_up - far_down)) / (12 * h)
    return slope


def _reads(name: str, error: Exception) -> str:
    return (
        f"{name} reads into Python a value that depends on a latent, a parameter or the rows of a "
        f"subsampled plate: {error}. The density would be that of one branch only. Use torch.where "
        "for a choice, tensors instead of numbers, and `with plate as rows` instead of a loop."
    )


def _random(name: str, error: Exception) -> str:
    return (
        f"{name} draws random numbers that are not sites: {error}. Make them a pyro.sample site, "
        "or draw them before and pass them as data; put modules with dropout into evaluation "
        "mode (.eval())."
    )
