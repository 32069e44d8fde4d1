"""Nodes of a graph that hold the values of tensors, also after views and writes in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

Geometry = tuple[Any, ...]


def geometry_of(t: Tensor) -> Geometry:
    """Where a tensor lies in its memory."""
    return (t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)


def storage_key(t: Tensor) -> int:
    """Which memory a tensor lies in, as long as it lives."""
    return int(t.untyped_storage()._cdata)


def size_of(t: Tensor) -> int:
    """How many numbers of a tensor's type its memory holds."""
    return t.untyped_storage().nbytes() // t.element_size()


def positions(t: Tensor, geometry: Geometry) -> Tensor:
    """Positions in a tensor's memory of every element of a view of it."""
    offset, shape, stride, _ = geometry
    whole = torch.arange(size_of(t), device=t.device)
    return whole.as_strided(shape, stride, offset).reshape(-1)


@dataclass
class Block:
    """One piece of memory.

    Args:
        owner: The geometry of the first tensor seen on it.
        views: Geometry -> the node that holds its current value.
        flat: The node of the whole memory as one row, once something wrote into it.
        writes: How many times it was written to.
    """

    owner: Geometry
    views: dict[Geometry, fx.Node]
    flat: fx.Node | None = None
    writes: int = 0


@dataclass
class StorageMap:
    """The tensors that depend on inputs.

    A tensor is known by itself: two that share memory may differ in what
    gradients they pass (`detach`). One that was not seen before, or that was
    written to through another one, is known by its geometry in the memory.
    """

    _blocks: dict[int, Block] = field(default_factory=dict)
    _nodes: dict[int, tuple[fx.Node, int]] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def __contains__(self, t: Tensor) -> bool:
        # Tensors with other layouts come from the data, and share no memory.
        return t.layout == torch.strided and storage_key(t) in self._blocks

    def block(self, t: Tensor) -> Block | None:
        """The memory that a tensor lies in, if it is known."""
        return self._blocks.get(storage_key(t))

    def track(self, t: Tensor, node: fx.Node) -> Block:
        """A node holds the value of a tensor."""
        geometry = geometry_of(t)
        block = self._blocks.setdefault(storage_key(t), Block(geometry, {}))
        block.views.setdefault(geometry, node)
        self._remember(t, node, block)
        return block

    def write(self, t: Tensor, value: fx.Node, flat: fx.Node) -> None:
        """A value was written to a tensor, which leaves `flat` in its memory."""
        block = self._blocks[storage_key(t)]
        block.views, block.flat = {geometry_of(t): value}, flat
        block.writes += 1
        self._remember(t, value, block)

    def node(self, t: Tensor) -> fx.Node | None:
        """The node that holds the present value of a tensor, if there is one."""
        block = self._blocks[storage_key(t)]
        node, writes = self._nodes.get(id(t), (None, -1))
        return node if writes == block.writes else block.views.get(geometry_of(t))

    def _remember(self, t: Tensor, node: fx.Node, block: Block) -> None:
        # A reference to the tensor prevents reuse of its id and of its memory address.
        self._kept.append(t)
        self._nodes[id(t)] = (node, block.writes)
