"""A recorded log density as a sum over rows of data, evaluated for some rows at a time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from flowvi.targets.recording.batched import Batched
from flowvi.targets.recording.program import lower
from flowvi.targets.recording.rules import aten

# Fewest rows for which slices pay: those of fewer lie in a processor's cache at once.
FEWEST_ROWS = 10_000
# Numbers of an intermediate result, draws times rows: a few of them fit into a processor's cache.
NUMBERS = 2**16
# Draws that are evaluated together; one product with the data serves them all.
TOGETHER = (64, 16, 4, 1)
# A density is evaluated for each of so many parts of its rows, to see whether it is their sum.
PARTS = 3
# Rounding of a sum over rows, in units of its size and its precision.
ROUNDING = 1e5
PROGRAMS_KEPT = 32
# Largest share of numbers in constants that do not belong to rows, and are read for every slice.
MOST_OTHERS = 0.05

Plan = tuple[int, int, bool]


class Carrier(NamedTuple):
    """A tensor that has an axis of rows.

    Attributes:
        node: Name of its node in the graph.
        axis: The axis.
    """

    node: str
    axis: int


class SlicedDensity:
    r"""A log density p(z) + s (l_1(z) + ... + l_N(z)), with a term for each row of the data.

    The graph is one for some rows at a time. Slices of rows and draws are so small that
    intermediate results stay in a processor's cache, and memory does not grow with the rows.

    Args:
        graph: The recorded log density of one point, for `length` rows.
        dtype: Precision in which it is evaluated.
        length: Number of rows of the graph.
        carriers: The tensors with an axis of rows.
        rows: These tensors, for all rows.
        scale: The factor s that the graph contains, where it is one of a batch of rows.

    Attributes:
        evaluated: Rows that were evaluated so far, times draws.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        dtype: torch.dtype,
        length: int,
        carriers: Sequence[Carrier],
        rows: Sequence[Tensor],
        scale: float,
    ) -> None:
        self.graph, self.dtype, self.length = graph, dtype, length
        self.carriers, self.rows, self.scale = tuple(carriers), tuple(rows), scale
        self.count = rows[0].shape[carriers[0].axis]
        self.evaluated = 0
        self._programs: OrderedDict[Plan, Callable[..., Any]] = OrderedDict()

    def subset(self, index: Tensor) -> SlicedDensity:
        """The density of some of the rows, (n) indices, without a scale."""
        pairs = zip(self.rows, self.carriers, strict=True)
        rows = [x.index_select(carrier.axis, index) for x, carrier in pairs]
        new = SlicedDensity(self.graph, self.dtype, self.length, self.carriers, rows, self.scale)
        return new

    def __call__(self, z: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate at points. (*S, D) -> (*S).

        Args:
            z: The points.
            again: The same density for autograd, where second derivatives are wanted.
        """
        flat = z.reshape(-1, z.shape[-1]).to(self.dtype)
        if z.requires_grad and torch.is_grad_enabled():
            log_p, _ = _WithGradient.apply(flat, self, again)
        else:
            log_p, _ = self.total(flat, gradient=False)
        return log_p.reshape(z.shape[:-1])

    def total(self, z: Tensor, gradient: bool, stride: int = 1) -> tuple[Tensor, Tensor]:
        """The log density and its gradient, (S, D) -> (S), (S, D); the gradient may be empty.

        Args:
            z: The points.
            gradient: Whether the gradient is wanted.
            stride: Go through every so many rows after the other.
        """
        z = z.detach()
        with torch.no_grad():
            found = [self._block(part, gradient, stride) for part in _blocks(z)]
        return torch.cat([value for value, _ in found]), torch.cat([g for _, g in found])

    def _block(self, z: Tensor, gradient: bool, stride: int) -> tuple[Tensor, Tensor]:
        """The same for a few points."""
        prior = self._evaluate(z, self._narrow(slice(0, 0)), gradient)
        total = [torch.zeros_like(x) for x in prior]
        nowhere = prior[0].isinf()
        for rows in self._slices(max(1, NUMBERS // len(z)), stride):
            found = self._evaluate(z, rows, gradient)
            nowhere = nowhere | found[0].isinf()
            for sum_, x, p in zip(total, found, prior, strict=True):
                sum_ += x - p
        values = [p + x / self.scale for x, p in zip(total, prior, strict=True)]
        # Infinite values must not meet each other.
        value = torch.where(nowhere, -torch.inf, values[0])
        return value, values[1] if gradient else z.new_zeros(0, z.shape[1])

    def _slices(self, size: int, stride: int) -> Iterator[list[Tensor]]:
        if stride > 1:
            for start in range(stride):
                yield self._narrow(slice(start, None, stride))
            return
        for start in range(0, self.count, size):
            yield self._narrow(slice(start, start + size))

    def _narrow(self, some: slice) -> list[Tensor]:
        pairs = zip(self.rows, self.carriers, strict=True)
        return [x[(*(slice(None),) * c.axis, some)] for x, c in pairs]

    def _evaluate(self, z: Tensor, rows: Sequence[Tensor], gradient: bool) -> tuple[Tensor, ...]:
        n = rows[0].shape[self.carriers[0].axis]
        self.evaluated += n * len(z)
        plan = (len(z), n, gradient)
        program = self._programs.pop(plan, None) or self._lower(z, rows, gradient, n)
        self._programs[plan] = program
        while len(self._programs) > PROGRAMS_KEPT:
            self._programs.popitem(last=False)
        found: tuple[Tensor, ...] = program(z, *rows)
        return found

    def _lower(
        self, z: Tensor, rows: Sequence[Tensor], gradient: bool, n: int
    ) -> Callable[..., Any]:
        batched = Batched(_of_rows(self.graph, self.carriers, self.length, n), "tape", self.dtype)
        return lower(batched, [z, *rows], gradient)


class _WithGradient(torch.autograd.Function):
    """A log density whose gradient was computed together with its value."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, density: SlicedDensity, again: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        log_p, gradient = density.total(z, gradient=True)
        ctx.save_for_backward(z, gradient)
        ctx.again = again
        ctx.mark_non_differentiable(gradient)
        return log_p, gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(ctx.again(z).sum(), z, create_graph=True)
        return upstream.unsqueeze(-1) * gradient, None, None


def sliced(
    batched: Batched, points: Tensor, inputs: Sequence[Tensor], plate: tuple[int, int] | None
) -> SlicedDensity | None:
    """The density as a sum over its rows; None if it has few rows or is no such sum.

    That it is one is not read from the graph, but seen at some points: values and gradients are
    those of the whole, where rows that stand far apart are evaluated together.

    Args:
        batched: The log density.
        points: Points of finite density, (P, D).
        inputs: Its further arguments, all of them indices of one subsampled plate, or none.
        plate: Size and batch size of that plate; None where there is none.
    """
    graph = batched.graph
    if batched.how != "tape" or not isinstance(graph, fx.GraphModule) or len(inputs) > 1:
        return None
    length = _row_count(graph) if plate is None else plate[1]
    if (length if plate is None else plate[0]) < FEWEST_ROWS:
        return None
    carriers, rows = _carriers(graph, length, plate)
    if not carriers:
        return None
    scale = 1.0 if plate is None else plate[0] / plate[1]
    density = SlicedDensity(graph, batched.dtype, length, carriers, rows, scale)
    # Those of a batch are compared with the batch.
    part = density if plate is None else density.subset(inputs[0])
    z = points[:2].to(batched.dtype)
    try:
        value, gradient = part.total(z, gradient=True, stride=PARTS)
    except Exception:  # a graph for another number of rows need not run
        return None
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        whole = batched(z, *inputs)
        (slope,) = torch.autograd.grad(whole.sum(), z)
    if plate is not None:
        prior, steep = part.subset(inputs[0][:0]).total(z, gradient=True)
        value, gradient = (prior + scale * (value - prior), steep + scale * (gradient - steep))
    density.evaluated = 0
    same = _close(value, whole.detach()) and _close(gradient, slope)
    return density if same else None


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two sums of the same numbers are equal up to rounding."""
    scale = 1 + a.abs().max()
    return bool((a - b).abs().max() <= ROUNDING * torch.finfo(a.dtype).eps * scale)


def _blocks(z: Tensor) -> Iterator[Tensor]:
    """Parts of points, of few different sizes."""
    start = 0
    for size in TOGETHER:
        while len(z) - start >= size:
            yield z[start : start + size]
            start += size


def _row_count(graph: fx.GraphModule) -> int:
    """Length of the longest axis of a constant."""
    return max((n for x in _constants(graph).values() for n in x.shape), default=0)


def _constants(graph: fx.GraphModule) -> dict[str, Tensor]:
    used = [node for node in graph.graph.nodes if node.op == "get_attr"]
    return {n.name: getattr(graph, str(n.target)) for n in used}


def _carriers(
    graph: fx.GraphModule, length: int, plate: tuple[int, int] | None
) -> tuple[list[Carrier], list[Tensor]]:
    """Tensors with an axis of rows, and their values; none if it is not clear which ones."""
    constants = _constants(graph)
    if plate is not None:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        device = next((x.device for x in constants.values()), None)
        return [Carrier(inputs[-1].name, 0)], [torch.arange(plate[0], device=device)]
    found, rows, others = [], [], 0
    for name, value in constants.items():
        axes = [i for i, n in enumerate(value.shape) if n == length]
        if len(axes) > 1:
            return [], []
        if axes:
            found.append(Carrier(name, axes[0]))
            rows.append(value)
        else:
            others += value.numel()
    if others > MOST_OTHERS * sum(x.numel() for x in rows):
        return [], []
    return found, rows


def _of_rows(
    whole: fx.GraphModule, carriers: Sequence[Carrier], length: int, n: int
) -> fx.GraphModule:
    """The graph for n rows, which are inputs behind the point."""
    module = fx.GraphModule(whole, copy.deepcopy(whole.graph))
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for i, carrier in enumerate(carriers):
        old = nodes[carrier.node]
        if old.op == "placeholder":
            continue
        with graph.inserting_before(first):
            new = graph.placeholder(f"rows_{i}")
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    of_point = _dependents(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if n != length:
            node.args = tuple(_resized(arg, length, n) for arg in node.args)
        if node.target in (aten.mv.default, aten.mm.default) and node.args[0] not in of_point:
            _turn(graph, node)
    graph.lint()
    module.recompile()
    return module


def _dependents(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the point, the first input."""
    found = {next(node for node in graph.nodes if node.op == "placeholder")}
    for node in graph.nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _resized(arg: Any, length: int, n: int) -> Any:
    """A shape with n in place of the number of rows."""
    if not isinstance(arg, list | tuple):
        return arg
    sizes = [
        n if isinstance(a, int) and not isinstance(a, bool) and a == length else a for a in arg
    ]
    return type(arg)(sizes)


def _turn(graph: fx.Graph, node: fx.Node) -> None:
    """Write a product with data as one that is a single call for all draws of a batch."""
    data, other = node.args
    with graph.inserting_before(node):
        if node.target is aten.mv.default:
            new = graph.call_function(linear, (other, data))
        else:
            across = graph.call_function(aten.permute.default, (other, [1, 0]))
            product = graph.call_function(linear, (across, data))
            new = graph.call_function(aten.permute.default, (product, [1, 0]))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
