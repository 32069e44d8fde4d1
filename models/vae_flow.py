"""A VAE whose guide is a flow that reads the image, and whose prior is a mixture.

Kingma et al. (2016), "Improving Variational Inference with Inverse Autoregressive Flow",
arXiv:1606.04934.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
LATENT, HIDDEN, COMPONENTS = 16, 128, 10


class Generator(nn.Module):
    """A mixture of normals as the prior, and the logits of the pixels. (*S, D) -> (*S, H, W)."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.size = means.shape
        self.prior = vae.MixturePrior(LATENT, COMPONENTS)
        self.layers = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, means.numel())
        )
        self.bias = nn.Parameter(means.clamp(0.01, 0.99).logit())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).unflatten(-1, self.size) + self.bias


def data(path: str | None = None) -> tuple[Tensor, Generator]:
    """Images of 0 and 1, (N, H, W), of an .npz file or scikit-learn's digits, and a generator."""
    x = vae.load(path).train
    return x, Generator(x.mean(0))


def model(x: Tensor, generator: Generator) -> None:
    pyro.module("generator", generator)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", generator.prior())
        pyro.sample("x", dist.Bernoulli(logits=generator(z)).to_event(2), obs=x)


def guide(x: Tensor) -> flowvi.Amortised:
    """Two inverse autoregressive layers; all their parameters are functions of the image."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), HIDDEN), nn.ReLU())
    flow = vae.posterior("iaf", LATENT, HIDDEN, depth=2, hidden=128)
    return flowvi.Amortised(encoder, flow)


def fit(path: str | None = None, epochs: int = 60, progress: bool = True) -> flowvi.RowFit:
    """Train guide, prior and decoder together."""
    x, generator = data(path)
    target = flowvi.from_pyro(model, x, generator, local=local)
    settings = flowvi.Minibatch(batch_size=20, warmup_epochs=epochs // 6)
    return flowvi.fit(
        target,
        guide(x),
        flowvi.elbo(1, "total"),
        epochs=epochs,
        minibatch=settings,
        progress=progress,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    file = sys.argv[1] if len(sys.argv) > 1 else None
    print(fit(file).iw_bound(vae.load(file).test, particles=500, seed=1))
