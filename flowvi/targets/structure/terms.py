"""A recorded log density as the elements of the sums that it adds up."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from flowvi.targets.recording.batched import Batched, silence_vmap_fallback
from flowvi.targets.recording.rules import aten

ADD = {aten.add.Tensor, torch.add, operator.add}
SUBTRACT = {aten.sub.Tensor, torch.sub, operator.sub}
MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, torch.mul, operator.mul}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, torch.div, operator.truediv}
NEGATE = {aten.neg.default, torch.neg, operator.neg}
TOTAL = {aten.sum.default, aten.sum.dim_IntList, torch.sum}
MEAN = {aten.mean.default, aten.mean.dim, torch.mean}
PRODUCT = {aten.dot.default, torch.dot}
# Operations on a tensor of one element that leave the element as it is.
SAME = {
    *(aten.reshape.default, torch.reshape, aten.view.default, aten.squeeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default),
    *(aten.alias.default, aten.clone.default, aten.select.int),
}
# Operations that keep all elements of a tensor, if their number is the same.
RESHAPED = {
    *(aten.reshape.default, torch.reshape, aten.view.default, aten.alias.default),
    *(aten.expand.default, aten.squeeze.dim, aten.unsqueeze.default, aten.clone.default),
}
# What the elements of a sum are multiplied or divided by: an operation and its second argument.
Factor = tuple[Any, Any]


class Terms(nn.Module):
    """The elements whose sum is a log density, (*S, D) -> (*S, T).

    A log density with plates is a sum of sums over rows. The graph is followed from its end
    through additions and constant or common factors to the sums, whose elements are returned.
    Which unit of a plate an element belongs to is found by moving the latents of units.

    Args:
        batched: The log density, as a recorded graph.
        example: Arguments of the graph: a point (D) and further inputs.
        fine: Whether sums over some axes, such as those of the events of a site, are taken apart
            too.

    Raises:
        TypeError: The log density is no recorded graph.
    """

    def __init__(self, batched: Batched, example: tuple[Tensor, ...], fine: bool = False) -> None:
        super().__init__()
        graph = batched.graph
        if batched.how != "tape" or not isinstance(graph, fx.GraphModule):
            raise TypeError("only a recorded log density has terms")
        self.dtype = batched.dtype
        example = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in example)
        self.module = _elements(graph, example, fine)

    def forward(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Evaluate the elements. (*S, D) -> (*S, T)."""
        flat = z.reshape(-1, z.shape[-1]).to(self.dtype)
        inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        dims = (0, *(None for _ in inputs))
        mapped = torch.func.vmap(self.module, in_dims=dims, randomness="same")
        with silence_vmap_fallback():
            parts = mapped(flat, *inputs)
        found = torch.cat([part.to(self.dtype) for part in parts], -1)
        return found.reshape(*z.shape[:-1], -1)


class _Shapes(fx.Interpreter):
    """The shape of every tensor of a graph."""

    def __init__(self, module: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
        super().__init__(module)
        self.shapes: dict[Any, torch.Size] = {}
        with torch.no_grad():
            self.run(*example)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def _elements(module: fx.GraphModule, example: tuple[Tensor, ...], fine: bool) -> fx.GraphModule:
    """The graph with the elements of its sums as outputs, a vector for each sum."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copied)
    shapes = {copied[n]: s for n, s in _Shapes(module, example).shapes.items() if n in copied}
    sizes = {n: shape.numel() for n, shape in shapes.items()}
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    end = copied[output.args[0]]
    vectors = []
    leaves = list(_leaves(end, (), sizes))
    if fine:
        leaves = [part for leaf, factors in leaves for part in _summands(leaf, factors, shapes)]
    for leaf, factors in leaves:
        for op, other in reversed(factors):
            if isinstance(other, fx.Node) and sizes.get(other) == 1:
                other = graph.call_function(torch.reshape, (other, ()))
            leaf = graph.call_function(op, (leaf, other))
        if not isinstance(leaf, fx.Node):
            leaf = graph.call_function(torch.full, ((1,), leaf), {"dtype": torch.float64})
        vectors.append(graph.call_function(torch.reshape, (leaf, (-1,))))
    graph.output(tuple(vectors))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _leaves(
    node: Any, factors: tuple[Factor, ...], sizes: dict[Any, int]
) -> Iterator[tuple[Any, tuple[Factor, ...]]]:
    """Tensors whose elements, times their factors, add up to a tensor of one element."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        yield node, factors
        return
    op, args = node.target, node.args
    go = partial(_leaves, sizes=sizes)
    if op in TOTAL and sizes.get(node) == 1:
        if sizes.get(args[0]) == 1:
            yield from go(args[0], factors)
        else:
            yield args[0], factors
    elif op in MEAN and sizes.get(node) == 1 and sizes.get(args[0]):
        factors = (*factors, (torch.div, sizes[args[0]]))
        yield from go(args[0], factors) if sizes[args[0]] == 1 else ((args[0], factors),)
    elif op in PRODUCT:
        yield args[0], (*factors, (torch.mul, args[1]))
    elif op in SAME and sizes.get(args[0]) == 1:
        yield from go(args[0], factors)
    elif op in NEGATE:
        yield from go(args[0], (*factors, (torch.mul, -1)))
    elif op in ADD | SUBTRACT and not node.kwargs and len(args) == 2:
        yield from go(args[0], factors)
        yield from go(args[1], (*factors, (torch.mul, -1)) if op in SUBTRACT else factors)
    elif op in DIVIDE and not node.kwargs:
        yield from go(args[0], (*factors, (torch.div, args[1])))
    elif op in MULTIPLY and any(_sums(arg, sizes) for arg in args[:2]):
        one, other = args[:2] if _sums(args[0], sizes) else args[1::-1]
        yield from go(one, (*factors, (torch.mul, other)))
    else:
        yield node, factors


def _summands(
    node: Any, factors: tuple[Factor, ...], shapes: dict[Any, torch.Size]
) -> Iterator[tuple[Any, tuple[Factor, ...]]]:
    """Tensors whose elements, times their factors, have the same total as those of a tensor."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or any(_wide(factors, shapes)):
        yield node, factors
        return
    op, args = node.target, node.args
    go = partial(_summands, shapes=shapes)
    if op in TOTAL or (op in RESHAPED and shapes[args[0]].numel() == shapes[node].numel()):
        yield from go(args[0], factors)
    elif op in NEGATE:
        yield from go(args[0], (*factors, (torch.mul, -1)))
    elif (
        op in ADD | SUBTRACT
        and not node.kwargs
        and all(shapes.get(arg) == shapes.get(node) for arg in args[:2])
    ):
        yield from go(args[0], factors)
        yield from go(args[1], (*factors, (torch.mul, -1)) if op in SUBTRACT else factors)
    else:
        yield node, factors


def _wide(factors: tuple[Factor, ...], shapes: dict[Any, torch.Size]) -> Iterator[bool]:
    """Whether the elements of a tensor have factors of their own."""
    for _, other in factors:
        yield other in shapes and shapes[other].numel() > 1


def _sums(node: Any, sizes: dict[Any, int]) -> bool:
    """Whether a tensor of one element is made of a sum of several."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    op, args = node.target, node.args
    if op in TOTAL | MEAN:
        return sizes.get(args[0], 1) > 1 or _sums(args[0], sizes)
    if op in PRODUCT:
        return True
    if op in SAME | NEGATE | DIVIDE:
        return _sums(args[0], sizes)
    if op in ADD | SUBTRACT | MULTIPLY:
        return any(_sums(arg, sizes) for arg in args[:2])
    return False
