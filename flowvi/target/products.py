"""Products of many matrices with one and the same, in a recorded graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def merged(module: fx.GraphModule) -> fx.GraphModule:
    """Write each product of a batch with one constant matrix as a single product.

    Batching the product of a design matrix with a vector of coefficients gives as many
    products as there are points, each with the same matrix; (B n, k) x (k, m) is one call
    that a processor is several times faster at.

    Args:
        module: A recorded graph, changed in place.
    """
    found = False
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.bmm.default:
            continue
        left, right = (_repeated(module, arg) for arg in node.args)
        if right is not None:
            _replace(module, node, node.args[0], right, transpose=False)
        elif left is not None:
            _replace(module, node, node.args[1], left.mT, transpose=True)
        found = found or right is not None or left is not None
    if found:
        module.graph.eliminate_dead_code()
        used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
        for name, _ in list(module.named_buffers()):
            if name not in used:
                delattr(module, name)
        module.recompile()
    return module


def _repeated(module: fx.GraphModule, arg: Any) -> Tensor | None:
    """The matrix of which a constant has nothing but repeats."""
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    value = getattr(module, str(arg.target), None)
    one = isinstance(value, Tensor) and value.dim() == 3 and value.stride(0) == 0
    return value[0] if one and value is not None else None


def _replace(
    module: fx.GraphModule, node: fx.Node, other: Any, matrix: Tensor, transpose: bool
) -> None:
    """Put (..., k) x (k, m) in place of a product; of transposes, if the matrix stood left."""
    name = f"{node.name}_one"
    module.register_buffer(name, matrix)
    graph = module.graph
    size = _batch(module, node)
    with graph.inserting_before(node):
        if transpose:
            other = graph.call_function(aten.permute.default, (other, [0, 2, 1]))
        flat = graph.call_function(torch.reshape, (other, (-1, matrix.shape[0])))
        whole = graph.call_function(aten.mm.default, (flat, graph.get_attr(name)))
        result = graph.call_function(torch.reshape, (whole, (size, -1, matrix.shape[1])))
        if transpose:
            result = graph.call_function(aten.permute.default, (result, [0, 2, 1]))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _batch(module: fx.GraphModule, node: fx.Node) -> int:
    held = next(arg for arg in node.args if _repeated(module, arg) is not None)
    assert isinstance(held, fx.Node)
    return int(getattr(module, str(held.target)).shape[0])
