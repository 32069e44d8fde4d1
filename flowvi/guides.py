"""Guides: densities on R^D that can be sampled and scored."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowvi.flows import FLOWS, Chain, Diagonal, Layer, Triangular


class Draw(NamedTuple):
    """Samples z, (*S, *B, D), and their log density under the guide, (*S, *B)."""

    z: Tensor
    log_q: Tensor


class Guide(nn.Module):
    """A density q(z | context) on R^D.

    Attributes:
        dim: Length D of z.
    """

    dim: int

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw `shape` reparameterised samples for every row of the context."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score samples. (*S, *B, D) -> (*S, *B)."""
        raise NotImplementedError

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the Gaussian N(loc, L L^T), or the nearest one that the guide can be.

        Args:
            loc: Mean, (D).
            scale_tril: Lower triangular L with a positive diagonal, (D, D).
        """
        raise NotImplementedError


class Pushforward(Guide):
    """A standard normal pushed through a flow and then through an affine layer.

    Abstract: a guide of this kind adds nothing but its choice of layers.
    """

    zero: Tensor

    def __init__(self, dim: int, flow: Layer, affine: Diagonal | Triangular) -> None:
        super().__init__()
        self.dim = dim
        self.flow = flow
        self.affine = affine
        self.register_buffer("zero", torch.zeros(()))

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        rows = () if context is None else context.shape[:-1]
        size = (*shape, *rows, self.dim)
        eps = torch.randn(size, dtype=self.zero.dtype, device=self.zero.device)
        y, flow_ladj = self.flow(eps, context)
        z, affine_ladj = self.affine(y, context)
        return Draw(z, _log_normal(eps) - flow_ladj - affine_ladj)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} columns but the guide has D = {self.dim}.")
        y, affine_ladj = self.affine.inverse(z, context)
        eps, flow_ladj = self.flow.inverse(y, context)
        return _log_normal(eps) + flow_ladj + affine_ladj

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.affine.set_(loc, scale_tril)


class MeanField(Pushforward):
    """A Gaussian with independent coordinates.

    `start` takes the diagonal Gaussian nearest in KL(q || p), which is narrower
    than the marginals of a correlated one.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Diagonal(dim, context_dim))


class FullRank(Pushforward):
    """A Gaussian with a full covariance matrix.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Triangular(dim, context_dim))


class FlowGuide(Pushforward):
    """A standard normal pushed through a flow and then through an affine layer.

    The flow works in coordinates in which the target is about standard: `start`
    sets the affine layer and leaves the flow as it is, which is the identity as
    long as the guide is fresh.

    Args:
        dim: Length D of the latent vector.
        flow: Layer mapping R^D to R^D.
        affine: The layer after it; a triangular one by default.
    """

    def __init__(self, dim: int, flow: Layer, affine: Diagonal | Triangular | None = None) -> None:
        super().__init__(dim, flow, Triangular(dim) if affine is None else affine)


GUIDES: dict[str, Callable[..., Guide]] = {"fullrank": FullRank, "meanfield": MeanField}


def make_guide(name: str, dim: int, context_dim: int = 0) -> Guide:
    """Build a guide by name: a row of `GUIDES`, or a flow of `FLOWS` on a full-rank base.

    Args:
        name: Name of the guide or flow.
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
    """
    if name in GUIDES:
        return GUIDES[name](dim, context_dim)
    if name in FLOWS:
        return FlowGuide(dim, FLOWS[name](dim, context_dim), Triangular(dim, context_dim))
    choices = ", ".join(sorted({*GUIDES, *FLOWS}))
    raise ValueError(f"No guide named '{name}'; choose from {choices}.")


def _log_normal(eps: Tensor) -> Tensor:
    return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))
