"""Variational autoencoders from named parts: a Pyro model and a guide for the same engine."""

from flowvi.vae.autoencoder import PlainAutoencoder, plain_autoencoder
from flowvi.vae.columns import Column, columns_of, decoded, encoded
from flowvi.vae.data import Binarise, Images, Proposal, load, propose_likelihood
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
from flowvi.vae.mixed import MixedLikelihood
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
from flowvi.vae.table import Table, build_table, by_column, independent, load_table, simulated

__all__ = [
    "LIKELIHOODS",
    "NETS",
    "POSTERIORS",
    "PRIORS",
    "ActiveUnits",
    "Autoencoder",
    "Binarise",
    "Bodies",
    "Column",
    "Decoder",
    "Encoder",
    "FlowPrior",
    "Generator",
    "Images",
    "Likelihood",
    "MixedLikelihood",
    "MixturePrior",
    "PlainAutoencoder",
    "Prior",
    "Proposal",
    "StandardNormal",
    "Table",
    "VampPrior",
    "active_units",
    "build",
    "build_table",
    "by_column",
    "code_shape",
    "columns_of",
    "decoded",
    "encoded",
    "independent",
    "interpolation",
    "load",
    "load_table",
    "moments",
    "plain_autoencoder",
    "posterior",
    "propose_likelihood",
    "reconstructions",
    "simulated",
    "traversal",
]
