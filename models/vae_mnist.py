"""A variational autoencoder of black-and-white images, with a normal guide.

Kingma and Welling (2014), "Auto-encoding variational Bayes", arXiv:1312.6114.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
LATENT, HIDDEN = 16, 128


class Decoder(nn.Module):
    """Logits of the pixels. (*S, D) -> (*S, H, W)."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.size = means.shape
        self.layers = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, means.numel())
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
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), HIDDEN), nn.ReLU())
    return flowvi.Amortised(encoder, vae.posterior("gaussian", LATENT, HIDDEN))


def fit(path: str | None = None, epochs: int = 60, progress: bool = True) -> flowvi.RowFit:
    """Train guide and decoder together."""
    x, decoder = data(path)
    target = flowvi.from_pyro(model, x, decoder, local=local)
    settings = flowvi.Minibatch(batch_size=20, warmup_epochs=epochs // 6)
    return flowvi.fit(target, guide(x), epochs=epochs, minibatch=settings, progress=progress)


if __name__ == "__main__":
    torch.manual_seed(0)
    file = sys.argv[1] if len(sys.argv) > 1 else None
    print(fit(file).iw_bound(vae.load(file).test, particles=500, seed=1))
