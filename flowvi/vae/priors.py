"""Priors of the latent vector: densities whose parameters are trained with the decoder's."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from flowvi.flows import FLOWS, Diagonal, Normal
from flowvi.flows.bases import LOG_2PI
from flowvi.guides.guide import Guide
from flowvi.guides.pushforward import FlowGuide
from flowvi.vae.maps import code_shape

# Least distance of pseudo-inputs from the limits of a pixel.
EDGE = 0.02


class Prior(nn.Module):
    """A density p(z) on R^D.

    Attributes:
        dim: Length D of z.
    """

    dim: int

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Draw samples, (*shape, D); not reparameterised."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """Score samples. (..., D) -> (...)."""
        raise NotImplementedError

    def forward(self) -> "PriorDistribution":
        """The prior for a `pyro.sample` statement."""
        return PriorDistribution(self)


class PriorDistribution(TorchDistribution):
    """A prior with the methods of a distribution.

    Args:
        prior: The prior.
        batch_shape: Shape of independent copies.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, prior: Prior, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.prior = prior
        event_shape = torch.Size([prior.dim])
        super().__init__(batch_shape, event_shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "PriorDistribution":
        return PriorDistribution(self.prior, torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.prior.sample((*sample_shape, *self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.prior.log_prob(value)


class StandardNormal(Prior):
    """The standard normal, which has nothing to train.

    Args:
        dim: Length D of z.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.base = Normal(dim)

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        return self.base.sample(shape)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.base.log_prob(z)


class FlowPrior(Prior):
    """A standard normal pushed through a flow.

    Every step scores z, so a flow whose inverse takes one pass is wanted.

    Args:
        dim: Length D of z.
        flow: Row of `FLOWS`.
        **sizes: Of the flow, such as its depth.
    """

    def __init__(self, dim: int, flow: str = "maf", **sizes: Any) -> None:
        super().__init__()
        self.dim = dim
        self.density = FlowGuide(dim, FLOWS[flow](dim, **sizes), Diagonal(dim))

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        return self.density.sample(shape).z

    def log_prob(self, z: Tensor) -> Tensor:
        return self.density.log_prob(z)


class MixturePrior(Prior):
    r"""A mixture of K normals with diagonal covariances.

    .. math:: p(z) = \sum_k \pi_k \, N(z; \mu_k, \mathrm{diag}(e^{2 s_k}))

    Args:
        dim: Length D of z.
        components: Number of components K.
    """

    def __init__(self, dim: int, components: int = 10) -> None:
        super().__init__()
        self.dim = dim
        self.logits = nn.Parameter(torch.zeros(components))
        # Different means, so that components can separate; the total variance is about one.
        self.loc = nn.Parameter(0.5 * torch.randn(components, dim))
        self.log_scale = nn.Parameter(torch.full((components, dim), 0.5 * math.log(0.75)))

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        which = torch.multinomial(self.logits.softmax(-1), math.prod(shape), replacement=True)
        loc, log_scale = self.loc[which], self.log_scale[which]
        return (loc + log_scale.exp() * torch.randn_like(loc)).reshape(*shape, self.dim)

    def log_prob(self, z: Tensor) -> Tensor:
        # Squared distances by matrix products, without a tensor of shape (..., K, D).
        rate = (-2 * self.log_scale).exp()
        squares = z.square() @ rate.mT - 2 * z @ (self.loc * rate).mT
        squares = squares + (self.loc.square() * rate).sum(-1)
        norm = self.logits.log_softmax(-1) - self.log_scale.sum(-1) - 0.5 * self.dim * LOG_2PI
        return torch.logsumexp(norm - 0.5 * squares, dim=-1)


class VampPrior(Prior):
    r"""The guide itself, averaged over learnt images: the aggregate posterior, in short.

    .. math:: p(z) = \sum_k \pi_k \, q(z \mid u_k), \qquad u_k = t \, \sigma(v_k)

    The guide's parameters are trained through it as well. A step scores every
    z K times under the guide, so the guide's density must be cheap.

    Args:
        dim: Length D of z.
        guide: The guide q.
        encoder: Module whose features of an image are the context of the guide.
        images: Pseudo-inputs u at the start, (K, H, W).
        top: Largest value t of a pixel.

    References:
        Tomczak and Welling (2018), "VAE with a VampPrior", arXiv:1705.07120.
    """

    def __init__(
        self, dim: int, guide: Guide, encoder: nn.Module, images: Tensor, top: float = 1.0
    ) -> None:
        super().__init__()
        self.dim, self.top = dim, top
        self.guide, self.encoder = guide, encoder
        start = (images.to(torch.get_default_dtype()) / top).clamp(EDGE, 1 - EDGE)
        self.raw = nn.Parameter(start.logit())
        self.logits = nn.Parameter(torch.zeros(len(images)))

    @property
    def images(self) -> Tensor:
        """The pseudo-inputs, (K, H, W)."""
        return self.top * self.raw.sigmoid()

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        which = torch.multinomial(self.logits.softmax(-1), math.prod(shape), replacement=True)
        context = self.encoder(self.images)[which]
        return self.guide.sample((), context).z.reshape(*shape, self.dim)

    def log_prob(self, z: Tensor) -> Tensor:
        context = self.encoder(self.images)
        every = z.unsqueeze(-2).expand(*z.shape[:-1], len(context), -1)
        scores = self.guide.log_prob(every, context)
        return torch.logsumexp(self.logits.log_softmax(-1) + scores, dim=-1)


class PriorInputs(NamedTuple):
    """Parts of the model from which a prior can be built, beside its own sizes.

    Attributes:
        dim: Length D of z.
        guide: The guide, whose context are features.
        encoder: Module from an image to features.
        images: Images of the training set, (N, H, W).
        top: Largest value of a pixel.
    """

    dim: int
    guide: Guide
    encoder: nn.Module
    images: Tensor
    top: float


def normal(beside: PriorInputs) -> StandardNormal:
    """The standard normal."""
    return StandardNormal(beside.dim)


def mixture(beside: PriorInputs, components: int = 10) -> MixturePrior:
    """A mixture of normals with diagonal covariances."""
    return MixturePrior(beside.dim, components)


def maf(beside: PriorInputs, depth: int = 4, hidden: int = 64) -> FlowPrior:
    """A masked autoregressive flow: one pass to score."""
    return FlowPrior(beside.dim, "maf", depth=depth, hidden=hidden)


def coupling(beside: PriorInputs, depth: int = 4, hidden: int = 64) -> FlowPrior:
    """Affine couplings: one pass to score, and one to sample."""
    return FlowPrior(beside.dim, "realnvp", depth=depth, hidden=hidden)


def glow(
    beside: PriorInputs,
    shape: tuple[int, int, int] | None = None,
    levels: int = 2,
    steps: int = 4,
    hidden: int = 64,
) -> FlowPrior:
    """A multi-scale Glow of codes that are feature maps; of net "maps", unless shape says else."""
    shape = code_shape(beside.images[0].shape, beside.dim) if shape is None else shape
    return FlowPrior(
        beside.dim, "image_glow", shape=shape, levels=levels, steps=steps, hidden=hidden
    )


def vamp(beside: PriorInputs, components: int | None = None) -> VampPrior:
    """A VampPrior whose pseudo-inputs start at images of the training set, a hundred or all."""
    components = min(100, len(beside.images)) if components is None else components
    if not 1 <= components <= len(beside.images):
        raise ValueError(
            f"components must lie between 1 and the number of images, {len(beside.images)}; "
            f"got {components}."
        )
    every = len(beside.images) // components
    images = beside.images[::every][:components]
    return VampPrior(beside.dim, beside.guide, beside.encoder, images, beside.top)


PRIORS: dict[str, Callable[..., Prior]] = {
    "coupling": coupling,
    "glow": glow,
    "maf": maf,
    "mixture": mixture,
    "normal": normal,
    "vamp": vamp,
}
