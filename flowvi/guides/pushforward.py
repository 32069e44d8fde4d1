"""Guides that push a base density through a bijection."""

import copy
import math

from torch import Tensor

from flowvi.flows import Base, Diagonal, Kronecker, Layer, LowRank, Normal, Triangular
from flowvi.guides.guide import Draw, Guide, ScoredSample, mixed_precision_copy

AffineLayer = Diagonal | Triangular | LowRank | Kronecker


class Pushforward(Guide):
    """Base noise pushed through a flow and then through an affine layer.

    Abstract: a guide of this kind adds nothing but its choice of layers.
    """

    def __init__(
        self, dim: int, flow: Layer, affine: AffineLayer, base: Base | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = Normal(dim) if base is None else base
        self.flow = flow
        self.affine = affine

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        rows = () if context is None else context.shape[:-1]
        eps = self.base.sample((*shape, *rows))
        z, ladj = self.transport(eps, context)
        return Draw(z, self.base.log_prob(eps) - ladj)

    def transport(self, eps: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map base noise to z. (..., D) -> (..., D), log|det dz/deps| (...)."""
        y, flow_ladj = self.flow(eps, context)
        z, affine_ladj = self.affine(y, context)
        return z, flow_ladj + affine_ladj

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} columns but the guide has D = {self.dim}.")
        y, affine_ladj = self.affine.inverse(z, context)
        eps, flow_ladj = self.flow.inverse(y, context)
        return self.base.log_prob(eps) + flow_ladj + affine_ladj

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        rows = () if context is None else context.shape[:-1]
        eps = self.base.sample((*shape, *rows))
        y, flow_ladj, score = self.flow.push(eps, self.base.score(eps), context)
        z, affine_ladj, score = self.affine.push(y, score, context)
        # Sum in the order of `sample`, for bitwise equal results.
        log_q = self.base.log_prob(eps) - (flow_ladj + affine_ladj)
        return ScoredSample(z, log_q, log_q.new_full((), -math.log(shape[0])), score)

    def advance_rng(self, shape: tuple[int, ...]) -> None:
        self.base.sample(shape)

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.affine.set_(loc, scale_tril)


class FlowGuide(Pushforward):
    """Base noise pushed through a flow and then through an affine layer.

    The flow works in coordinates in which the target is about standard: `start`
    sets the affine layer and leaves the flow as it is, which is the identity as
    long as the guide is fresh.

    Args:
        dim: Length D of the latent vector.
        flow: Layer mapping R^D to R^D.
        affine: The layer after it; a triangular one by default.
        base: The density before it; the standard normal by default.
    """

    def __init__(
        self,
        dim: int,
        flow: Layer,
        affine: AffineLayer | None = None,
        base: Base | None = None,
    ) -> None:
        super().__init__(dim, flow, Triangular(dim) if affine is None else affine, base)

    def mixed_precision_copy(self) -> Guide | None:
        # A subclass may use the structure of its flow.
        inner = mixed_precision_copy(self.flow) if type(self) is FlowGuide else None
        if inner is None:
            return None
        new = copy.deepcopy(self)
        new.flow = inner
        return new
