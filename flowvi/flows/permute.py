"""Layers that reorder the coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.flows.coupling_kernel import Order, Plan
from flowvi.flows.layer import Chain, Layer


class Flip(Layer):
    """Reverse the order of the coordinates; its own inverse."""

    @property
    def single(self) -> bool:
        return True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(-1), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(y)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self(x), score.flip(-1)


class Permutation(Layer):
    """Reorder the coordinates; the order is kept in the state dict.

    Args:
        order: Coordinate of the input that each coordinate of the output is, (D).
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    @property
    def single(self) -> bool:
        return True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.order), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.back), y.new_zeros(y.shape[:-1])

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self(x), score.index_select(-1, self.order)

    def plan(self) -> Plan | None:
        return Order(self.order, self.back)


def permutation(dim: int, context_dim: int = 0, seed: int = 0) -> Permutation:
    """A fixed random order of the coordinates; it has no parameters and ignores the context."""
    return Permutation(random_order(dim, seed))


def random_order(dim: int, seed: int) -> Tensor:
    """A random permutation of 0 ... D - 1; the global generator is not touched."""
    return torch.randperm(dim, generator=torch.Generator().manual_seed(seed))


def mixed(layers: Sequence[Layer], dim: int) -> Chain:
    """Layers with a random order of the coordinates between them, put back at the end."""
    steps: list[Layer] = [layers[0]]
    where = torch.arange(dim)
    for seed, layer in enumerate(layers[1:]):
        order = random_order(dim, seed)
        where = where[order]
        steps += [Permutation(order), layer]
    return Chain([*steps, Permutation(where.argsort())])
