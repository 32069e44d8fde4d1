"""A variational autoencoder from named parts: a Pyro model and its guide."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor, nn

from flowvi.guides.amortized import Amortised
from flowvi.runtime.arguments import check_choice
from flowvi.vae.likelihoods import LIKELIHOODS, Likelihood
from flowvi.vae.nets import NETS, Decoder, Encoder, pixel_means
from flowvi.vae.posteriors import posterior
from flowvi.vae.priors import PRIORS, Prior, PriorInputs

T = TypeVar("T")
PLATE = "data"


class Generator(nn.Module):
    r"""The model of images, :math:`p(z) \, p(x \mid z)`, with a latent vector for each.

    Args:
        prior: The prior of z.
        decoder: Maps z to the parameters of the likelihood.
        likelihood: The likelihood of an image.
    """

    def __init__(self, prior: Prior, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.likelihood = likelihood

    def model(self, x: Tensor) -> None:
        """The Pyro model of images (N, H, W)."""
        for name, part in self.named_children():
            if next(part.parameters(), None) is not None:
                pyro.module(name, part)
        with pyro.plate(PLATE, len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    @torch.no_grad()
    def mean(self, z: Tensor) -> Tensor:
        """The mean image of latent vectors. (*S, D) -> (*S, H, W), from 0 to 1."""
        return self.likelihood.mean(self.decoder(z)) / self.likelihood.top

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Mean images of n draws from the prior, (n, H, W), from 0 to 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.mean(self.prior.sample((n,)))


@dataclass(frozen=True)
class Autoencoder:
    """The parts of a variational autoencoder.

    Attributes:
        generator: The model of images; `generator.model` is the Pyro model.
        guide: The guide, whose context are images.
        parts: Names and sizes that it was built from, as JSON has them.
    """

    generator: Generator
    guide: Amortised
    parts: dict[str, Any]

    @property
    def dim(self) -> int:
        """Length D of the latent vector."""
        return self.guide.dim

    def model(self, x: Tensor) -> None:
        """The Pyro model of images (N, H, W)."""
        self.generator.model(x)


def build(
    x: Tensor,
    latent: int = 64,
    guide: str = "gaussian",
    likelihood: str = "bernoulli",
    prior: str = "normal",
    net: str = "mlp",
    *,
    guide_sizes: Mapping[str, Any] | None = None,
    likelihood_sizes: Mapping[str, Any] | None = None,
    prior_sizes: Mapping[str, Any] | None = None,
    net_sizes: Mapping[str, Any] | None = None,
    means: Tensor | None = None,
    seed: int = 0,
) -> Autoencoder:
    """Build a variational autoencoder from parts that are named.

    The decoder starts at the pixel means of x. Parameters are in the default
    precision and the global generators are left as they were.

    Args:
        x: Training images, (N, H, W), with the values that the likelihood is of.
        latent: Length D of the latent vector.
        guide: Row of `POSTERIORS`.
        likelihood: Row of `LIKELIHOODS`.
        prior: Row of `PRIORS`.
        net: Row of `NETS`: the encoder and the decoder.
        guide_sizes: Of the guide, such as {"depth": 4}.
        likelihood_sizes: Of the likelihood, such as {"scale": 0.1}.
        prior_sizes: Of the prior, such as {"components": 500}.
        net_sizes: Of the networks, such as {"hidden": (300, 300)}.
        means: Pixel means, (H, W); those of x by default.
        seed: Of the initial parameters.

    Raises:
        ValueError: There is no part of that name or size, or x is not what the likelihood is of.
    """
    if x.dim() != 3 or len(x) < 1:
        raise ValueError(f"x must be images, (N, H, W); got shape {tuple(x.shape)}.")
    height, width = x.shape[1:]
    means = pixel_means(x) if means is None else means
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = named("likelihood", LIKELIHOODS, likelihood, likelihood_sizes)
        family.check(x)
        family.begin(x, means)
        bodies = named("net", NETS, net, net_sizes, (height, width), latent, family.outputs)
        encoder = Encoder(bodies.encoder, bodies.width, means, family.top)
        decoder = Decoder(bodies.decoder, family.start(means))
        inner = posterior(guide, latent, bodies.width, **(guide_sizes or {}))
        beside = PriorInputs(latent, inner, encoder, x, family.top)
        before = named("prior", PRIORS, prior, prior_sizes, beside)
    parts = {
        "latent": latent,
        "guide": guide,
        "likelihood": likelihood,
        "prior": prior,
        "net": net,
        "guide_sizes": dict(guide_sizes or {}),
        "likelihood_sizes": dict(likelihood_sizes or {}),
        "prior_sizes": dict(prior_sizes or {}),
        "net_sizes": dict(net_sizes or {}),
        "seed": seed,
    }
    return Autoencoder(Generator(before, decoder, family), Amortised(encoder, inner), parts)


def named(
    kind: str,
    registry: Mapping[str, Callable[..., T]],
    name: str,
    sizes: Mapping[str, Any] | None,
    *arguments: Any,
) -> T:
    """A row of a registry, built; an error that names the choices, or the sizes that it takes."""
    check_choice(kind, name, sorted(registry))
    takes = list(inspect.signature(registry[name]).parameters)[len(arguments) :]
    for size in sizes or {}:
        if size not in takes:
            raise ValueError(
                f"The {kind} '{name}' has no size '{size}'; it takes {', '.join(takes) or 'none'}."
            )
    return registry[name](*arguments, **(sizes or {}))
