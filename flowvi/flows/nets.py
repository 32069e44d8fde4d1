"""The functions that give a layer its parameters."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Amortised(nn.Module):
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
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )
        for p in self.rest[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(required(context, self.context.in_features))
        return self.rest(h)


def required(context: Tensor | None, context_dim: int) -> Tensor:
    """The context, or an error that says which one is missing."""
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
