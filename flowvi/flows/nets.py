"""The functions that give a layer its parameters."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

Pull = Callable[[Tensor], Tensor]


class ContextParameter(nn.Module):
    """A vector of parameters, plus a linear function of the context.

    The linear part starts at zero: a fresh layer ignores its context.

    Args:
        initial: Value of the vector at the start, (P).
        context_dim: Length C of the context; 0 for a plain vector.
    """

    def __init__(self, initial: Tensor, context_dim: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(initial)
        self.weight = nn.Parameter(torch.zeros(len(initial), context_dim)) if context_dim else None

    def forward(self, context: Tensor | None) -> Tensor:
        """Context (*B, C) -> (*B, P); (P) without one."""
        if self.weight is None:
            return self.value
        return linear(required(context, self.weight.shape[1]), self.weight, self.value)

    @torch.no_grad()
    def lean(self, slope: Tensor) -> None:
        """Let the first parameters be linear in the context, by (n, C) slopes."""
        if self.weight is None:
            raise ValueError("A layer without a context cannot depend on one.")
        self.weight[: len(slope)] = slope


class Perceptron(nn.Module):
    """A network with two hidden layers whose output starts at zero.

    The context enters by its own linear map, once for all samples of a row.

    Args:
        inputs: Length of the input vector.
        outputs: Length of the output vector.
        context_dim: Length C of the context; 0 for none.
        hidden: Width of the two hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, context_dim: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        # SiLU and ReLU are many times cheaper than tanh on a CPU; SiLU keeps log q smooth.
        self.middle = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, outputs)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.linearised(x, context)[0]

    def linearised(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Pull]:
        """The output, and the function that takes a gradient there to the input."""
        h, lifted = self.first(x), self.lifted(context)
        if lifted is not None:
            h = h + lifted
        m = self.middle(silu(h))
        weights = (self.first.weight, self.middle.weight, self.last.weight)
        return self.last(silu(m)), partial(pulled, weights, (h, m))

    def lifted(self, context: Tensor | None) -> Tensor | None:
        """Contribution of the context to the first hidden units, (*B, hidden); None without one."""
        if self.context is None:
            return None
        return cast(Tensor, self.context(required(context, self.context.in_features)))


def pulled(
    weights: tuple[Tensor, Tensor, Tensor], units: tuple[Tensor, Tensor], gradient: Tensor
) -> Tensor:
    """Take a gradient from the output of a network with two SiLU layers to its input.

    Args:
        weights: Of the three linear maps, first to last.
        units: Values of the hidden units before the SiLU.
        gradient: At the output; a constant, and so is the result.
    """
    with torch.no_grad():
        gradient = torch.ops.aten.silu_backward(gradient @ weights[2], units[1])
        gradient = torch.ops.aten.silu_backward(gradient @ weights[1], units[0])
        return gradient @ weights[0]


def required(context: Tensor | None, context_dim: int) -> Tensor:
    """The context, or an error if it is missing."""
    if context is None:
        raise ValueError(f"This flow is conditional: pass context=, a tensor (*B, {context_dim}).")
    if context.shape[-1] != context_dim:
        raise ValueError(
            f"context has {context.shape[-1]} columns but the flow was built with "
            f"context_dim={context_dim}."
        )
    return context


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrices (*B, M, N) times vectors (*S, *B, N), with no copy of a matrix for each sample."""
    if matrix.dim() == 2:
        return x @ matrix.mT
    return torch.einsum("...mn,...n->...m", matrix, x)
