"""Layers of flows: the contract of a layer, and chains of layers."""

from collections.abc import Iterable
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from flowvi.flows import coupling_kernel
from flowvi.flows.score import through_inverse, through_jacobian


class Layer(nn.Module):
    """A bijection of R^D, applied to the last dimension.

    A layer keeps nothing between calls: what it returns depends on its
    arguments and parameters alone. A fresh layer is the identity, up to the
    order of the coordinates.

    A conditional layer takes a context, (*B, C), whose rows B are the last
    dimensions before D: x is (*S, *B, D). A layer built without a context
    ignores the one it is given, so both kinds can stand in one chain.

    Attributes:
        single: Whether single precision is enough for training, in coordinates in which the
            target is about standard. False where something is iterated, solved or cancels.
    """

    @property
    def single(self) -> bool:
        return False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map base to target. (..., D) -> (..., D), log|det dy/dx| (...)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map target to base. (..., D) -> (..., D), log|det dx/dy| (...)."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse; use gradient='total'.")

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map base to target, and carry the score of a density along.

        Args:
            x: Points, (..., D).
            score: Gradient of a log density at x, (..., D).
            context: Context of the layer, (*B, C).

        Returns:
            y (..., D) and log|det dy/dx| (...), as from `forward`, and the gradient at y of the
            log density that x -> y makes of the first, (..., D), a constant.
        """
        y, ladj = self(x, context)
        try:
            return y, ladj, through_inverse(self, y, score, context)
        except NotImplementedError:
            return y, ladj, through_jacobian(self, x, score, context)

    def plan(self) -> coupling_kernel.Plan | None:
        """The layer as affine couplings and orders, if it is nothing else."""
        return None

    def planned(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The result of `push` by one fused operation, if there is one."""
        # A plan has one precision, so autocast excludes it.
        plan = None if torch.is_autocast_enabled(x.device.type) else self.plan()
        return None if plan is None else coupling_kernel.push(plan, x, score, context)

    def initialise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Map data to the base, and initialise layers on the way. (..., D) -> (..., D).

        Nothing is set in most layers; see `ActNorm` for one that is.
        """
        with torch.no_grad():
            return self.inverse(y, context)[0]


class Chain(Layer):
    """Layers applied one after the other; their log determinants add up."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def single(self) -> bool:
        return all(cast(Layer, layer).single for layer in self.layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ladjs = []
        for layer in self.layers:
            x, ladj = layer(x, context)
            ladjs.append(ladj)
        return x, _sum(ladjs, x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ladjs = []
        for layer in reversed(self.layers):
            y, ladj = cast(Layer, layer).inverse(y, context)
            ladjs.append(ladj)
        return y, _sum(ladjs, y)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (pushed := self.planned(x, score, context)) is not None:
            return pushed
        ladjs = []
        for layer in self.layers:
            x, ladj, score = cast(Layer, layer).push(x, score, context)
            ladjs.append(ladj)
        return x, _sum(ladjs, x), score

    def plan(self) -> coupling_kernel.Plan | None:
        plans = tuple(cast(Layer, layer).plan() for layer in self.layers)
        known = tuple(plan for plan in plans if plan is not None)
        return coupling_kernel.Series(known) if plans and len(known) == len(plans) else None

    def initialise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in reversed(self.layers):
            y = cast(Layer, layer).initialise(y, context)
        return y


class SinglePrecision(Layer):
    """A layer in single precision between others in double."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.layer(*_floats(x, context))
        return y.to(x.dtype), ladj.to(x.dtype)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.layer.inverse(*_floats(y, context))
        return x.to(y.dtype), ladj.to(y.dtype)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, pushed = self.layer.push(x.float(), *_floats(score, context))
        return y.to(x.dtype), ladj.to(x.dtype), pushed.to(x.dtype)


class Inverse(Layer):
    """A layer run backwards."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.layer(y, context))


def _sum(ladjs: list[Tensor], x: Tensor) -> Tensor:
    """The sum of log determinants; zero without any."""
    return reduce(torch.add, ladjs) if ladjs else x.new_zeros(x.shape[:-1])


def _floats(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.float(), None if context is None else context.float()
