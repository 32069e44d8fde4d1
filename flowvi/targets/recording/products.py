"""Merge the products of a batch with one constant matrix in a recorded graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def merge_products(module: fx.GraphModule) -> fx.GraphModule:
    """Write each product of a batch with one constant matrix as a single product.

    Batching the product of a design matrix with a vector of coefficients gives as many
    products as there are points, each with the same matrix; (B n, k) x (k, m) is one call
    that a processor is several times faster at.

    Args:
        module: A recorded graph, changed in place.
    """
    before = len(module.graph.nodes)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.bmm.default:
            continue
        left, right = (_repeated(module, arg) for arg in node.args)
        if right is not None:
            _replace(module, node, node.args[0], right, transposed=False)
        elif left is not None:
            _replace(module, node, node.args[1], left.mT, transposed=True)
    if len(module.graph.nodes) > before:
        module.graph.eliminate_dead_code()
        used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in module.named_buffers() if name not in used]:
            delattr(module, name)
        module.recompile()
    return module


def _repeated(module: fx.GraphModule, arg: Any) -> Tensor | None:
    """The constant (B, k, m) of a node, if it repeats one matrix along B; None otherwise."""
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    value = getattr(module, str(arg.target), None)
    one = isinstance(value, Tensor) and value.dim() == 3 and value.stride(0) == 0
    return value if one else None


def _replace(
    module: fx.GraphModule, node: fx.Node, other: Any, constant: Tensor, transposed: bool
) -> None:
    """Put (B n, k) x (k, m) in place of a product; of transposes, if the matrix stood left."""
    name, graph = f"{node.name}_one", module.graph
    points, inner, outer = constant.shape
    module.register_buffer(name, constant[0])
    with graph.inserting_before(node):
        if transposed:
            other = graph.call_function(aten.permute.default, (other, [0, 2, 1]))
        flat = graph.call_function(torch.reshape, (other, (-1, inner)))
        whole = graph.call_function(aten.mm.default, (flat, graph.get_attr(name)))
        result = graph.call_function(torch.reshape, (whole, (points, -1, outer)))
        if transposed:
            result = graph.call_function(aten.permute.default, (result, [0, 2, 1]))
    node.replace_all_uses_with(result)
    graph.erase_node(node)
