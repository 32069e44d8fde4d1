"""Layers that shape the tails and the skew of each coordinate."""

import math

import torch
from torch import Tensor

from flowvi.flows.autograd import in_graph
from flowvi.flows.layer import Layer
from flowvi.flows.nets import ContextParameter
from flowvi.flows.score import through_elementwise

# Tail weights between 1/4.5 and 4.5: |x|^4.5 and its square do not overflow single precision.
BOUND = 1.5
# At e^LINEAR beyond the threshold, the tangent replaces the logarithm of LOFT.
LINEAR = 20.0


class SinhArcsinh(Layer):
    r"""Skew each coordinate and make its tails heavier or lighter.

    .. math::
        y = \sinh(v), \quad v = \tau \, (\operatorname{arsinh} x + \epsilon), \qquad
        \frac{dy}{dx} = \tau \, \frac{\cosh v}{\sqrt{1 + x^2}}

    :math:`\epsilon` sets the skew; :math:`\tau` sets the tails, heavier than
    before for :math:`\tau > 1`, and is bounded, :math:`|\log \tau| < 1.5`. Both
    directions cost O(D). Both parameters may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.

    References:
        Jones and Pewsey (2009), "Sinh-arcsinh distributions", Biometrika 96;
        their delta is 1 / tau.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.params = ContextParameter(torch.zeros(2 * dim), context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self._map(x, context)
        return y, ladj.sum(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = in_graph(x)
        y, ladj = self._map(x, context)
        return y, ladj.sum(-1), through_elementwise(x, ladj, score)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        skew, log_tau = self._params(context)
        v = torch.asinh(y)
        u = (-log_tau).exp() * v - skew
        return torch.sinh(u), (_log_cosh(u) - _log_cosh(v) - log_tau).sum(-1)

    def _map(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image, and the log slope of each coordinate."""
        skew, log_tau = self._params(context)
        u = torch.asinh(x)
        v = log_tau.exp() * (u + skew)
        return torch.sinh(v), log_tau + _log_cosh(v) - _log_cosh(u)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        skew, raw = self.params(context).chunk(2, dim=-1)
        return skew, BOUND * torch.tanh(raw / BOUND)


class Loft(Layer):
    r"""Compress the tails logarithmically; the identity near the centre.

    .. math:: y = \operatorname{sign}(x) \, (\log(\max(|x| - t, 0) + 1) + \min(|x|, t))

    The slope is :math:`1 / (\max(|x| - t, 0) + 1)`. From a distance of
    :math:`e^{20}` on the logarithm continues as its tangent, so that the inverse,
    an exponential, does not overflow. No parameters; both directions cost O(D).

    Args:
        threshold: The t within which the layer is the identity.

    References:
        Andrade (2024), "Stable Training of Normalizing Flows for
        High-dimensional Variational Inference", arXiv:2402.16408.
    """

    def __init__(self, threshold: float = 100.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        near, beyond = self._split(x)
        curved = beyond.clamp_max(math.expm1(LINEAR))
        log = torch.log1p(curved)
        return near + x.sign() * (log + (beyond - curved) * math.exp(-LINEAR)), -log.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        near, beyond = self._split(y)
        curved = beyond.clamp_max(LINEAR)
        far = torch.expm1(curved) + (beyond - curved) * math.exp(LINEAR)
        return near + y.sign() * far, curved.sum(-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of each coordinate within the threshold, and how far it lies beyond."""
        near = x.clamp(-self.threshold, self.threshold)
        return near, (x - near).abs()


def loft(dim: int, context_dim: int = 0) -> Loft:
    """LOFT with its threshold of 100; it has no parameters and ignores the context."""
    return Loft()


def _log_cosh(x: Tensor) -> Tensor:
    # cosh(x) overflows for large x; its logarithm does not.
    size = x.abs()
    return size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
