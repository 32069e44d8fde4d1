"""Variational autoencoders from named parts: a Pyro model and a guide for the same engine."""

from flowvi.vae.autoencoder import PlainAutoencoder, plain_autoencoder
from flowvi.vae.data import Binarise, Images, load
from flowvi.vae.likelihoods import LIKELIHOODS, Likelihood
from flowvi.vae.maps import code_shape
from flowvi.vae.measures import (
    ActiveUnits,
    active_units,
    interpolation,
    moments,
    reconstructions,
    traversal,
)
from flowvi.vae.model import Autoencoder, Generator, build
from flowvi.vae.nets import NETS, Bodies, Decoder, Encoder
from flowvi.vae.posteriors import POSTERIORS, posterior
from flowvi.vae.priors import (
    PRIORS,
    FlowPrior,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
)

__all__ = [
    "LIKELIHOODS",
    "NETS",
    "POSTERIORS",
    "PRIORS",
    "ActiveUnits",
    "Autoencoder",
    "Binarise",
    "Bodies",
    "Decoder",
    "Encoder",
    "FlowPrior",
    "Generator",
    "Images",
    "Likelihood",
    "MixturePrior",
    "PlainAutoencoder",
    "Prior",
    "StandardNormal",
    "VampPrior",
    "active_units",
    "build",
    "code_shape",
    "interpolation",
    "load",
    "moments",
    "plain_autoencoder",
    "posterior",
    "reconstructions",
    "traversal",
]
