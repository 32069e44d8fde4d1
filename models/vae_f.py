"""An f-VAE of grey images: codes that are images, a multi-scale flow over them, normal pixels.

Su and Wu (2018), "f-VAEs: Improve VAEs with Conditional Flows", arXiv:1809.05861: the model
that they ran. Its posterior N(E(x), s_1) has one scale for all images, its flow is the prior.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
CHANNELS, CODE, FLOOR = 16, 2, 0.01


class Generator(nn.Module):
    """A Glow as the prior of codes, and the mean image. (*S, C h w) -> (*S, H, W).

    Args:
        size: (H, W) of an image.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        bodies, shape = nets(size)
        latent = shape[0] * shape[1] * shape[2]
        self.prior = vae.FlowPrior(latent, "image_glow", shape=shape, levels=2, steps=2, hidden=32)
        self.body = bodies.decoder
        # Less than the pixels vary by: codes pay for their divergence from the beginning.
        self.log_scale = nn.Parameter(torch.tensor(-2.5))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.body(z.reshape(-1, z.shape[-1]))
        return out.reshape(*z.shape[:-1], *out.shape[-2:])


def nets(size: tuple[int, int]) -> tuple[vae.Bodies, tuple[int, int, int]]:
    """Convolutions to a code that is an image and back, and the shape of the code."""
    shape = vae.code_shape(size, channels=CODE)
    latent = shape[0] * shape[1] * shape[2]
    return vae.NETS["maps"](size, latent, 1, channels=CHANNELS), shape


def data(path: str | None = None) -> tuple[Tensor, Generator]:
    """Grey images in [0, 1], (N, H, W), of a file or scikit-learn's digits, and a generator."""
    images = vae.load(path, "grey")
    return images.train, Generator(images.size)


def model(x: Tensor, generator: Generator) -> None:
    pyro.module("generator", generator)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", generator.prior())
        scale = FLOOR + generator.log_scale.exp()
        pyro.sample("x", dist.Normal(generator(z), scale).to_event(2), obs=x)


def guide(x: Tensor) -> flowvi.Amortised:
    """A normal whose mean alone depends on the image."""
    bodies, _ = nets((x.shape[1], x.shape[2]))
    encoder = nn.Sequential(nn.Unflatten(-2, (1, x.shape[1])), bodies.encoder)
    return flowvi.Amortised(encoder, vae.posterior("shifted", bodies.width, bodies.width))


def fit(path: str | None = None, epochs: int = 30, progress: bool = True) -> flowvi.RowFit:
    """Train guide, flow and decoder together."""
    x, generator = data(path)
    target = flowvi.from_pyro(model, x, generator, local=local)
    return flowvi.fit(
        target,
        guide(x),
        flowvi.elbo(1, "total"),
        epochs=epochs,
        batch_size=20,
        progress=progress,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    file = sys.argv[1] if len(sys.argv) > 1 else None
    print(fit(file).iw_bound(vae.load(file, "grey").test, particles=100, seed=1))
