"""Likelihoods of images, whose parameters are a decoder's outputs."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

LEVELS = 256
# Pixel means are kept this far from 0 and 1, so that their logits are finite.
EDGE = 0.01


class Likelihood(nn.Module):
    """A family of distributions of an image, (H, W), given outputs for every pixel.

    Attributes:
        outputs: Number of outputs P for every pixel.
        top: Largest value of a pixel, by which encoders divide.
    """

    outputs: int = 1
    top: float = 1.0

    def forward(self, params: Tensor) -> TorchDistribution:
        """Outputs (*S, P, H, W) to a distribution with batch shape S and event shape (H, W)."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """The mean image. (*S, P, H, W) -> (*S, H, W)."""
        mean: Tensor = self(params).mean
        return mean

    def start(self, mean: Tensor) -> Tensor:
        """Outputs whose mean image is about this one, (H, W) -> (P, H, W)."""
        raise NotImplementedError

    def begin(self, x: Tensor, mean: Tensor) -> None:
        """Set initial values from images (N, H, W) and their mean (H, W), if there are any."""
        return

    def check(self, x: Tensor) -> None:
        """Refuse images outside of the support.

        Raises:
            ValueError: The message has the values of x and the expected ones.
        """
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Pixels that are 0 or 1; the outputs are logits."""

    def forward(self, params: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=params.squeeze(-3)).to_event(2)

    def start(self, mean: Tensor) -> Tensor:
        return mean.clamp(EDGE, 1 - EDGE).logit().unsqueeze(0)

    def check(self, x: Tensor) -> None:
        _refuse(
            x,
            (x != 0) & (x != 1),
            "a Bernoulli likelihood is a probability of pixels 0 and 1, and the cross-entropy of "
            "grey values is no log likelihood. Binarise them (binarise='static', 'dynamic' or "
            "'threshold'), or take likelihood='continuous_bernoulli'",
        )


class ContinuousBernoulli(Likelihood):
    r"""Grey values in [0, 1] with density :math:`C \lambda^x (1 - \lambda)^{1 - x}`.

    The outputs are the logits of :math:`\lambda`.

    References:
        Loaiza-Ganem and Cunningham (2019), "The continuous Bernoulli: fixing a
        pervasive error in variational autoencoders", arXiv:1907.06845.
    """

    def forward(self, params: Tensor) -> TorchDistribution:
        return StableContinuousBernoulli(logits=params.squeeze(-3)).to_event(2)

    def start(self, mean: Tensor) -> Tensor:
        # The mean of a continuous Bernoulli is nearer to 1/2 than lambda is.
        return 2 * mean.clamp(EDGE, 1 - EDGE).logit().unsqueeze(0)

    def check(self, x: Tensor) -> None:
        _refuse(
            x,
            (x < 0) | (x > 1),
            "a continuous Bernoulli likelihood needs grey values in [0, 1]; divide them by the "
            "largest one",
        )


class Categorical(Likelihood):
    """Grey levels 0 to 255, each with a probability of its own at every pixel."""

    outputs = LEVELS
    top = LEVELS - 1.0

    def forward(self, params: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=params.movedim(-3, -1)).to_event(2)

    def mean(self, params: Tensor) -> Tensor:
        levels = torch.arange(LEVELS, dtype=params.dtype, device=params.device)
        return torch.softmax(params.movedim(-3, -1), dim=-1) @ levels

    def start(self, mean: Tensor) -> Tensor:
        # A discretised normal of sd 32 around the mean.
        levels = torch.arange(LEVELS, dtype=mean.dtype).reshape(-1, 1, 1)
        return -0.5 * ((levels - mean) / 32).square()

    def check(self, x: Tensor) -> None:
        _check_levels(x, "a categorical likelihood")


class DiscretisedLogistic(Likelihood):
    """Grey levels 0 to 255: the mass of a logistic density around each, tails to the edges."""

    outputs = 2
    top = LEVELS - 1.0

    def forward(self, params: Tensor) -> TorchDistribution:
        loc, log_scale = params.unbind(-3)
        # Scales outside of this range lead to rounding errors.
        return DiscretisedLogisticLevels(loc, log_scale.clamp(-11.0, 5.0)).to_event(2)

    def mean(self, params: Tensor) -> Tensor:
        # The mean of k is the sum of P(k > j) over j = 0 ... 254.
        loc, log_scale = (t.unsqueeze(-1) for t in params.unbind(-3))
        edges = (
            torch.arange(LEVELS - 1, dtype=params.dtype, device=params.device) + 0.5
        ) / self.top
        return torch.sigmoid((loc - edges) * (-log_scale).exp()).sum(-1)

    def start(self, mean: Tensor) -> Tensor:
        loc = mean / self.top
        return torch.stack([loc, torch.full_like(loc, math.log(0.1))])

    def check(self, x: Tensor) -> None:
        _check_levels(x, "a discretised logistic likelihood")


class Gaussian(Likelihood):
    r"""Real pixels around the outputs, with one scale for all, learnt or fixed.

    .. math:: \sigma = \sigma_0 + e^s

    The floor :math:`\sigma_0` keeps the density of images that are reconstructed
    exactly from growing without bound.

    Args:
        scale: The scale at the start, above the floor; a learnt one by default half of what the
            pixels vary by, which `begin` measures. With a larger scale the KL term outweighs the
            reconstruction at first, and the guide collapses to the prior.
        learned: Whether it is learnt.
        floor: The least scale.
    """

    log_excess: Tensor

    def __init__(
        self, scale: float | None = None, learned: bool = True, floor: float = 0.01
    ) -> None:
        super().__init__()
        self.chosen = scale is not None or not learned
        scale = 0.3 if scale is None else scale
        if not scale > floor > 0:
            raise ValueError(
                f"scale must lie above the floor, and that above 0; got {scale} and {floor}."
            )
        self.floor = floor
        start = torch.tensor(math.log(scale - floor))
        if learned:
            self.log_excess = nn.Parameter(start)
        else:
            self.register_buffer("log_excess", start)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of every pixel, ()."""
        return self.floor + self.log_excess.exp()

    def forward(self, params: Tensor) -> TorchDistribution:
        return dist.Normal(params.squeeze(-3), self.scale).to_event(2)

    def start(self, mean: Tensor) -> Tensor:
        return mean.unsqueeze(0).clone()

    @torch.no_grad()
    def begin(self, x: Tensor, mean: Tensor) -> None:
        width = float((x - mean).square().mean().sqrt()) / 2
        if not self.chosen and width > self.floor:
            self.log_excess.fill_(math.log(width - self.floor))

    def check(self, x: Tensor) -> None:
        _refuse(x, ~x.isfinite(), "a Gaussian likelihood needs finite numbers")


def gaussian_fixed(scale: float = 0.1) -> Gaussian:
    """Real pixels around the outputs, with a known scale."""
    return Gaussian(scale, learned=False, floor=scale / 2)


LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "continuous_bernoulli": ContinuousBernoulli,
    "discretised_logistic": DiscretisedLogistic,
    "gaussian": Gaussian,
    "gaussian_fixed": gaussian_fixed,
}


class StableContinuousBernoulli(dist.ContinuousBernoulli):
    r"""A continuous Bernoulli whose norm is right for logits of any size.

    .. math:: \log C(\eta) = \log \frac{\eta}{\tanh(\eta / 2)}

    torch's own takes it from clamped probabilities: it is constant, and the
    density no longer integrates to one, beyond logits of about 16.
    """

    def _cont_bern_log_norm(self) -> Tensor:
        logits = self.logits.abs()
        small = logits < 0.05
        safe = torch.where(small, torch.ones_like(logits), logits)
        square = logits.square()
        series = math.log(2) + square / 12 - 7 * square.square() / 1440
        return torch.where(small, series, safe.log() - torch.tanh(safe / 2).log())


class DiscretisedLogisticLevels(TorchDistribution):
    r"""Levels k = 0 ... 255 of a logistic variable on [0, 1], rounded.

    With half a level :math:`h = 1 / 510`, :math:`a = (k / 255 + h - m) / s` and
    :math:`b = (k / 255 - h - m) / s`,

    .. math::
        P(k) = \sigma(a) - \sigma(b) = \sigma(a) \, \sigma(-b) \, (1 - e^{b - a}),

    where :math:`\sigma(a) = 1` at k = 255 and :math:`\sigma(b) = 0` at k = 0: the edges
    take the tails, and the levels add up to one.

    Args:
        loc: The centre m.
        log_scale: Log of s, of the same shape.

    References:
        Kingma et al. (2016), arXiv:1606.04934, section 5.2; Salimans et al.
        (2017), "PixelCNN++", arXiv:1701.05517, section 2.1: edges.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real,
        "log_scale": constraints.real,
    }
    support = constraints.integer_interval(0, LEVELS - 1)

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "DiscretisedLogisticLevels":
        loc, log_scale = self.loc.expand(batch_shape), self.log_scale.expand(batch_shape)
        return DiscretisedLogisticLevels(loc, log_scale, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape)).to(self.loc)
            x = self.loc + self.log_scale.exp() * u.clamp(1e-6, 1 - 1e-6).logit()
            return (x * (LEVELS - 1)).round().clamp(0, LEVELS - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half, rate = 0.5 / (LEVELS - 1), (-self.log_scale).exp()
        centred = value / (LEVELS - 1) - self.loc
        first, last = value <= 0, value >= LEVELS - 1
        below = logsigmoid((centred + half) * rate).masked_fill(last, 0.0)
        above = logsigmoid((half - centred) * rate).masked_fill(first, 0.0)
        width = (-torch.expm1(-2 * half * rate)).log().masked_fill(first | last, 0.0)
        return below + above + width


def _check_levels(x: Tensor, what: str) -> None:
    _refuse(
        x,
        (x < 0) | (x > LEVELS - 1) | (x != x.round()),
        f"{what} needs whole grey levels from 0 to {LEVELS - 1}; load them with "
        "binarise='levels', or round them",
    )


def _refuse(x: Tensor, wrong: Tensor, why: str) -> None:
    if bool(wrong.any()):
        value = x[wrong].flatten()[0].item()
        raise ValueError(f"The images hold the value {value:g}, but {why}.")
