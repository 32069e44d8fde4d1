"""An importance-weighted autoencoder: the same model and guide as a VAE's, a tighter bound.

Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", arXiv:1509.00519.
Gradients of Tucker et al. (2019), arXiv:1810.04152.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
LATENT, HIDDEN, PARTICLES = 16, 100, 10


class Decoder(nn.Module):
    """Logits of the pixels, by two tanh layers. (*S, D) -> (*S, H, W)."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.size = means.shape
        self.layers = nn.Sequential(
            nn.Linear(LATENT, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, means.numel()),
        )
        self.bias = nn.Parameter(means.clamp(0.01, 0.99).logit())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).unflatten(-1, self.size) + self.bias


def data(path: str | None = None) -> tuple[Tensor, Decoder]:
    """Images of 0 and 1, (N, H, W), of an .npz file or scikit-learn's digits, and a decoder."""
    x = vae.load(path).train
    return x, Decoder(x.mean(0))


def model(x: Tensor, decoder: Decoder) -> None:
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(2), obs=x)


def guide(x: Tensor) -> flowvi.Amortised:
    """A normal whose means and scales are functions of the image."""
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(x[0].numel(), HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Tanh(),
    )
    return flowvi.Amortised(encoder, vae.posterior("gaussian", LATENT, HIDDEN))


def fit(path: str | None = None, epochs: int = 60, progress: bool = True) -> flowvi.RowFit:
    """Train by the bound of several draws, weighted for each image by itself."""
    x, decoder = data(path)
    target = flowvi.from_pyro(model, x, decoder, local=local)
    return flowvi.fit(
        target,
        guide(x),
        flowvi.iwelbo(PARTICLES, "dreg"),
        epochs=epochs,
        batch_size=20,
        progress=progress,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    file = sys.argv[1] if len(sys.argv) > 1 else None
    print(fit(file).iw_bound(vae.load(file).test, particles=500, seed=1))
