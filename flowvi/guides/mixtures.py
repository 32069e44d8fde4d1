"""Mixtures of guides."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from flowvi.flows.nets import ContextParameter
from flowvi.guides.guide import Draw, Guide, StratifiedSample
from flowvi.guides.prefixes import PrefixGuide


class MixtureGuide(Guide):
    r"""A mixture of guides, for posteriors with several modes.

    .. math:: q(z) = \sum_m \pi_m q_m(z), \qquad \pi = \mathrm{softmax}(\lambda)

    The density is exact. `sample` picks a component for each draw, so its draws
    have no gradient with respect to the weights. Objectives draw from
    every component instead, by `stratified_sample`: an average over the guide is then
    :math:`\sum_m \pi_m E_{q_m}[\cdot]`, in which the weights stand openly.
    Scoring the draws of all M components takes M^2 calls of a component.

    Args:
        components: The M guides, all of one D and one context.
        logits: Weights :math:`\lambda` at the start, (M); equal by default.
        context_dim: Length C of the context that the weights depend on; 0 for none.

    References:
        Morningstar et al. (2021), "Automatic Differentiation Variational
        Inference with Mixtures", arXiv:2003.01687: stratified bounds.
        Roeder, Wu and Duvenaud (2017), arXiv:1703.09194: their path gradients.
    """

    pathwise: ClassVar[bool] = False

    def __init__(
        self, components: Iterable[Guide], logits: Tensor | None = None, context_dim: int = 0
    ) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        dims = sorted({part.dim for part in self._parts()})
        if len(dims) != 1:
            raise ValueError(f"A mixture needs components of one D; got components of D = {dims}.")
        if any(isinstance(part, PrefixGuide) for part in self._parts()):
            raise ValueError("A guide of prefixes cannot be part of a mixture: take a flow.")
        if any(part.joint for part in self._parts()):
            raise ValueError("A guide that draws other variables cannot be part of a mixture.")
        self.dim = dims[0]
        start = torch.zeros(len(self.components)) if logits is None else logits.clone()
        self.logits = ContextParameter(start, context_dim)

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        z = torch.stack([part.sample(shape, context).z for part in self._parts()])
        which = Categorical(logits=self.logits(context)).sample(shape)
        index = which[None, ..., None].expand(1, *z.shape[1:])
        chosen = z.gather(0, index).squeeze(0)
        return Draw(chosen, self.log_prob(chosen, context))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._mix(self.log_component_densities(z, context), context)

    def stratified_sample(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> StratifiedSample:
        z = torch.cat([part.sample(shape, context).z for part in self._parts()])
        share = self.log_weights(context).movedim(-1, 0) - math.log(shape[0])
        share = share.repeat_interleave(shape[0], dim=0)
        return StratifiedSample(z, self.log_prob(z, context), _between(share, z.dim() - 1))

    def advance_rng(self, shape: tuple[int, ...]) -> None:
        for part in self._parts():
            part.advance_rng(shape)

    def mixed_precision_copy(self) -> Guide | None:
        parts = [part.mixed_precision_copy() for part in self._parts()]
        if not any(parts):
            return None
        new = copy.deepcopy(self)
        for i, part in enumerate(parts):
            new.components[i] = new.components[i] if part is None else part
        return new

    def log_component_ratio(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        scores = self.log_component_densities(z, context)
        own = [score.chunk(len(scores))[m] for m, score in enumerate(scores)]
        return torch.cat(own) - self._mix(scores, context)

    def log_component_densities(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score samples under each component. (*S, *B, D) -> (M, *S, *B)."""
        return torch.stack([part.log_prob(z, context) for part in self._parts()])

    def log_weights(self, context: Tensor | None = None) -> Tensor:
        """Log weights of the components, (*B, M); (M) without a context."""
        return torch.log_softmax(self.logits(context), dim=-1)

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.start_components([(loc, scale_tril)] * len(self.components))

    def start_components(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start every component at a Gaussian of its own, at a mode of the target say.

        Args:
            starts: Mean (D) and lower triangular L (D, D), one pair for each component.
        """
        if len(starts) != len(self.components):
            raise ValueError(
                f"A mixture of {len(self.components)} components needs as many starts; "
                f"got {len(starts)}."
            )
        for part, (loc, scale_tril) in zip(self._parts(), starts, strict=True):
            part.start(loc, scale_tril)

    def _parts(self) -> list[Guide]:
        return cast(list[Guide], list(self.components))

    def _mix(self, scores: Tensor, context: Tensor | None) -> Tensor:
        weights = self.log_weights(context).movedim(-1, 0)
        return torch.logsumexp(_between(weights, scores.dim()) + scores, dim=0)


def _between(values: Tensor, dims: int) -> Tensor:
    """Put sample dimensions of size 1 behind the first: (N, *B) -> (N, 1, ..., *B)."""
    return values.reshape(len(values), *[1] * (dims - values.dim()), *values.shape[1:])
