"""Guides: densities on R^D that can be sampled and scored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowvi.flows import Layer, SinglePrecision

# Beyond this number of dimensions a D x D matrix is too large.
FULL_RANK_DIM = 2000
# Points (*S, D) to log densities (*S).
LogDensity = Callable[[Tensor], Tensor]


class Draw(NamedTuple):
    """Samples z, (*S, *B, D), and their log density under the guide, (*S, *B)."""

    z: Tensor
    log_q: Tensor


class StratifiedSample(NamedTuple):
    """Stratified samples: the same number from every component of a guide, in their order.

    Attributes:
        z: Samples, (N, *S, *B, D), N the number of parts times the draws of each.
        log_q: Log density under the whole guide, (N, *S, *B).
        log_share: Log weight of each draw in an average over the guide, broadcastable to
            (N, *S, *B); the weights add up to one over N.
    """

    z: Tensor
    log_q: Tensor
    log_share: Tensor


class ScoredSample(NamedTuple):
    """Stratified samples with the score of the guide at each draw.

    Attributes:
        z: As in `StratifiedSample`; for a joint guide, the other variables stand behind z.
        log_q: As in `StratifiedSample`; for a joint guide, that of all variables.
        log_share: As in `StratifiedSample`.
        score: Gradient of log q at z, (N, *S, *B, D): a constant, as if parameters and
            context did not depend on anything.
    """

    z: Tensor
    log_q: Tensor
    log_share: Tensor
    score: Tensor


class Guide(nn.Module):
    """A density q(z | context) on R^D.

    Attributes:
        dim: Length D of z.
        pathwise: Whether the gradient of an average over draws is that of the draws.
        flat: Whether `start` uses only the scales of a Gaussian, not its correlations.
        partial: Whether `start` uses some of its correlations, and drops the others.
        joint: Whether z is drawn with other variables, so that its own density is an integral.
        kind: Name of such guides in `make_guide`, if it can make them.
        spec: Arguments with which `make_guide` makes this guide, if it can.
    """

    dim: int
    pathwise: ClassVar[bool] = True
    flat: bool = False
    partial: bool = False
    joint: ClassVar[bool] = False
    kind: ClassVar[str] = ""
    spec: dict[str, Any] | None = None

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw `shape` reparameterised samples for every row of the context."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score samples. (*S, *B, D) -> (*S, *B)."""
        raise NotImplementedError

    def stratified_sample(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> StratifiedSample:
        """Draw `shape` samples from every part of the guide; a plain guide is one part."""
        z, log_q = self.sample(shape, context)
        return StratifiedSample(z, log_q, log_q.new_full((), -math.log(shape[0])))

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        """Draw from every part, with the gradient of log q at each draw, for path gradients."""
        z, log_q, log_share = self.stratified_sample(shape, context)
        with torch.enable_grad():
            fixed = z.detach().requires_grad_()
            log_prob = self.log_prob(fixed, None if context is None else context.detach())
            (score,) = torch.autograd.grad(log_prob.sum(), fixed)
        return ScoredSample(z, log_q, log_share, score)

    def joint_density(self, log_p: LogDensity) -> LogDensity:
        """The density of z and of the other variables that a joint guide draws behind it."""
        return log_p

    def advance_rng(self, shape: tuple[int, ...]) -> None:
        """Advance the generator as a draw of this shape does, without computing the draw."""
        with torch.no_grad():
            self.stratified_sample(shape)

    def log_component_ratio(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of each draw's own component, less that of the whole guide."""
        return z.new_zeros(())

    def mixed_precision_copy(self) -> Guide | None:
        """A copy of a guide in double precision whose flow is evaluated in single precision.

        Its parameters are those of the guide, in the same order. None if the guide has no
        layer for which single precision is enough.
        """
        return None

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the Gaussian N(loc, L L^T), or the nearest one that the guide can be.

        Args:
            loc: Mean, (D).
            scale_tril: Lower triangular L with a positive diagonal, (D, D).
        """
        raise NotImplementedError


def mixed_precision_copy(flow: Layer) -> Layer | None:
    """A copy of a flow that works in single precision, if that is enough."""
    double = {p.dtype for p in flow.parameters()} == {torch.float64}
    return SinglePrecision(copy.deepcopy(flow)) if double and flow.single else None


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Treat the parameters of modules as constants inside the block."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
