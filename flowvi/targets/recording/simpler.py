"""A recorded graph without the operations that change nothing, for inputs of given shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from flowvi.targets.recording.rules import aten

# Operations that use only the shape of a tensor.
OF_SHAPE = {
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
}
# Largest constant, in numbers: storing larger ones costs more than computing them.
MOST_NUMBERS = 4096
# Operations that keep all numbers in order if the size does not change.
ORDERLY = {
    *(torch.reshape, aten.detach.default, aten.alias.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.slice.Tensor, aten.select.int, aten.sum.dim_IntList, aten.sum.default),
}
# Operations whose functions in `torch` take the same arguments: called in two thirds of the time.
DIRECT: dict[Any, Callable[..., Any]] = {
    getattr(getattr(aten, name), overload): getattr(torch, name)
    for overload, names in {
        "Tensor": "add sub mul div ge gt le lt eq ne",
        "Scalar": "add sub mul div ge gt le lt eq ne",
        "default": "neg exp log log1p expm1 sqrt rsqrt sigmoid tanh abs reciprocal lgamma sum "
        "logical_not unsqueeze permute",
        "int": "select",
        "self": "where",
        "dim_IntList": "sum",
        "Tensor_Scalar": "pow",
        "dim": "squeeze",
    }.items()
    for name in names.split()
}


def simpler(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Leave out of a graph what changes no number, and compute what does not depend on numbers.

    The gradient that autograd writes is full of both: views of the shape that a tensor has
    already, powers of one, sums along axes of length one, zeros of the shape of something.
    Where a density has few dimensions, each takes as long as one that counts.

    Args:
        module: A recorded graph without side effects or random numbers, changed in place.
        inputs: Tensors of the shapes for which it is to hold.
    """
    graph = module.graph
    seen = _Seen(module)
    with torch.no_grad():
        seen.run(*inputs)
    for node in list(graph.nodes):
        # Copy a constant or an input that is returned, because the caller may write to it.
        if node in seen.fixed:
            same, copy = _constant(module, node, seen.fixed[node])
            node.replace_all_uses_with(copy, _returns)
        else:
            found = _same(node, seen)
            if found is None:
                continue
            same = found
        seen.kinds[same] = seen.kinds[node]
        node.replace_all_uses_with(same, lambda user: not _returns(user))
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function" and not node.kwargs:
            node.target = DIRECT.get(node.target, node.target)
    _keep(module)
    module.recompile()
    return module


class Kind(NamedTuple):
    """What a tensor is like: its shape, its type, and how it lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    contiguous: bool

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        """Of a tensor; the stride of an axis of length one means nothing."""
        stride = tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
        return cls(tuple(x.shape), x.dtype, stride, x.is_contiguous())


class _Seen(fx.Interpreter):
    """What the values of the nodes of a graph are like, and those that are always the same.

    Args:
        module: The graph.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kinds: dict[fx.Node, Kind] = {}
        self.fixed: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Evaluate a node, and note what there is to know of its value."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.kinds[n] = Kind.of(value)
            if n.op == "call_function" and value.numel() <= MOST_NUMBERS and self._is_fixed(n):
                self.fixed[n] = value
        return value

    def _is_fixed(self, n: fx.Node) -> bool:
        inputs = n.all_input_nodes
        given = bool(inputs) and all(a in self.fixed or a.op == "get_attr" for a in inputs)
        return given or n.target in OF_SHAPE


def _same(node: fx.Node, seen: _Seen) -> fx.Node | None:
    """Another node with the value of a node, but for the sign of zeros, if there is one."""
    kinds, chain = seen.kinds, [node]
    while _is_orderly(chain[-1], kinds):
        chain.append(chain[-1].all_input_nodes[0])
    for earlier in reversed(chain[1:]):
        if kinds[earlier] == kinds[node]:
            return earlier
    if len(chain) > 2 and kinds[node].contiguous and kinds[chain[-1]].contiguous:
        graph = node.graph
        with graph.inserting_before(node):
            return graph.call_function(torch.reshape, (chain[-1], kinds[node].shape))
    return None


def _is_orderly(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether a node has the numbers of its first argument, in the same order."""
    if node.op != "call_function" or node not in kinds or not isinstance(node.args[0], fx.Node):
        return False
    known = kinds.get(node.args[0])
    if known is None or known.dtype != kinds[node].dtype:
        return False
    if node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], int | float) and node.args[1] == 1
    return node.target in ORDERLY and math.prod(known.shape) == math.prod(kinds[node].shape)


def _constant(module: fx.GraphModule, node: fx.Node, value: Tensor) -> tuple[fx.Node, fx.Node]:
    """A constant in place of a node, and a copy of it."""
    name = f"{node.name}_fixed"
    module.register_buffer(name, value)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
        return constant, module.graph.call_function(aten.clone.default, (constant,))


def _returns(node: fx.Node) -> bool:
    return node.op == "output"


def _keep(module: fx.GraphModule) -> None:
    """Leave the constants that are used, where a graph finds them at once."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, value in list(module.named_buffers(recurse=False)):
        if name not in used:
            delattr(module, name)
        else:
            # A plain attribute in addition to the buffer, because its access is faster.
            module.__dict__[name] = value
