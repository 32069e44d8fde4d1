"""Networks in which no coordinate acts on those before it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from flowvi.flows.nets import Pull, pulled, required


class MaskedLinear(nn.Module):
    """A linear map some of whose weights are fixed at zero.

    Args:
        mask: Which weights are free, (outputs, inputs).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        outputs, inputs = mask.shape
        self.linear = nn.Linear(inputs, outputs)
        # The mask is a function of the sizes, and therefore not part of the state.
        self.register_buffer("mask", mask.to(self.linear.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight(), self.linear.bias)

    def weight(self) -> Tensor:
        """The weights, (outputs, inputs), zero where they are masked."""
        return self.linear.weight * self.mask


class MaskedPerceptron(nn.Module):
    """A network whose outputs for one coordinate see only the coordinates before it.

    Two hidden layers; the output starts at zero. Every hidden unit has a
    degree, the number of coordinates it may see; a unit is connected to units
    of no higher degree. With a context, or a single coordinate, there are units
    of degree zero, which see the context alone.

    Args:
        dim: Length D of the input vector.
        size: Number of outputs for each coordinate.
        context_dim: Length C of the context; 0 for none.
        hidden: Width of the two hidden layers.
        reverse: Take the coordinates from the last to the first.

    References:
        Germain, Gregor, Murray and Larochelle (2015), "MADE: Masked
        Autoencoder for Distribution Estimation", arXiv:1502.03509.
    """

    def __init__(
        self, dim: int, size: int, context_dim: int, hidden: int, *, reverse: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.order = range(dim)[::-1] if reverse else range(dim)
        place = 1 + torch.tensor(self.order)
        lowest = 0 if context_dim or dim == 1 else 1
        degree = lowest + torch.arange(hidden) * (dim - lowest) // hidden
        self.first = MaskedLinear(degree[:, None] >= place)
        self.context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.middle = MaskedLinear(degree[:, None] >= degree)
        self.last = MaskedLinear((place[:, None] > degree).repeat(size, 1))
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Vectors (*S, *B, D), context (*B, C) -> (*S, *B, size, D)."""
        return self.linearised(x, context)[0]

    def linearised(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Pull]:
        """The output, and the function that takes a gradient there to the input."""
        weights = (self.first.weight(), self.middle.weight(), self.last.weight())
        h = linear(x, weights[0], self.first.linear.bias)
        if self.context is not None:
            h = h + self.context(required(context, self.context.in_features))
        m = linear(silu(h), weights[1], self.middle.linear.bias)
        out = linear(silu(m), weights[2], self.last.linear.bias)
        return out.unflatten(-1, (self.size, -1)), partial(self._pull, weights, (h, m))

    @staticmethod
    def _pull(
        weights: tuple[Tensor, Tensor, Tensor], units: tuple[Tensor, Tensor], gradient: Tensor
    ) -> Tensor:
        return pulled(weights, units, gradient.flatten(-2))

    def visit(
        self,
        solve: Callable[[int, Tensor], Tensor],
        context: Tensor | None,
        lead: tuple[int, ...],
    ) -> None:
        """Find the coordinates in their order, each from the outputs that those before it give.

        Args:
            solve: Function of the place of a coordinate and its outputs,
                (*lead, size, 1), that returns its value, (*lead, 1).
            context: Context, (*B, C).
            lead: The shape (*S, *B).
        """
        columns = self.first.weight().unbind(1)
        middle, b = self.middle.weight(), self.middle.linear.bias
        rows = self.last.weight().unflatten(0, (self.size, -1)).unbind(1)
        biases = self.last.linear.bias.unflatten(0, (self.size, -1)).unbind(1)
        h = self.first(middle.new_zeros(len(columns)))
        if self.context is not None:
            h = h + self.context(required(context, self.context.in_features))
        h = h.expand(*lead, -1)
        for i in self.order:
            hidden = silu(linear(silu(h), middle, b))
            x = solve(i, linear(hidden, rows[i], biases[i]).unsqueeze(-1))
            h = torch.addcmul(h, x, columns[i])
