"""The plain autoencoder, without prior and noise: it defines no density."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowvi.runtime.progress import showing
from flowvi.vae.likelihoods import LIKELIHOODS, Likelihood
from flowvi.vae.model import named
from flowvi.vae.nets import NETS, Decoder, Encoder, pixel_means


class PlainAutoencoder(nn.Module):
    r"""A code for every image, and an image for every code.

    It is trained to maximise :math:`\log p(x \mid z = E(x))`, a score of
    reconstructions and no bound on anything.

    Args:
        encoder: Features of an image, (*B, H, W) -> (*B, C).
        code: The layer from features to codes, (*B, C) -> (*B, D).
        decoder: Outputs for every pixel, (*B, D) -> (*B, P, H, W).
        likelihood: What the outputs are the parameters of.
    """

    def __init__(
        self, encoder: Encoder, code: nn.Module, decoder: Decoder, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.encoder, self.code = encoder, code
        self.decoder, self.likelihood = decoder, likelihood

    def encode(self, x: Tensor) -> Tensor:
        """The codes of images. (*B, H, W) -> (*B, D)."""
        z: Tensor = self.code(self.encoder(x))
        return z

    @torch.no_grad()
    def mean(self, z: Tensor) -> Tensor:
        """The images of codes. (*S, D) -> (*S, H, W), from 0 to 1."""
        return self.likelihood.mean(self.decoder(z)) / self.likelihood.top

    def forward(self, x: Tensor) -> Tensor:
        """Log score of the reconstruction of every image. (*B, H, W) -> (*B)."""
        score: Tensor = self.likelihood(self.decoder(self.encode(x))).log_prob(x)
        return score


def plain_autoencoder(
    x: Tensor,
    latent: int = 64,
    likelihood: str = "bernoulli",
    net: str = "mlp",
    *,
    epochs: int = 20,
    batch_size: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PlainAutoencoder:
    """Build and train a plain autoencoder, the nets those of `build`.

    Args:
        x: Training images, (N, H, W).
        latent: Length D of a code.
        likelihood: Row of `LIKELIHOODS`.
        net: Row of `NETS`.
        epochs: Passes over the images.
        batch_size: Images a step.
        lr: Step size of Adam.
        seed: Of the initial parameters and of the order of images.
        progress: Whether to show the progress.
    """
    means = pixel_means(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = named("likelihood", LIKELIHOODS, likelihood, None)
        family.check(x)
        size = (x.shape[1], x.shape[2])
        bodies = named("net", NETS, net, None, size, latent, family.outputs)
        made = PlainAutoencoder(
            Encoder(bodies.encoder, bodies.width, means, family.top),
            nn.Linear(bodies.width, latent),
            Decoder(bodies.decoder, family.start(means)),
            family,
        )
        optimiser = torch.optim.Adam(made.parameters(), lr=lr, fused=True)
        with showing("autoencoder", progress, unit="epoch") as shown:
            shown.phase("training", epochs)
            for _ in range(epochs):
                for rows in torch.randperm(len(x)).split(batch_size):
                    optimiser.zero_grad()
                    (-made(x[rows]).mean()).backward()
                    optimiser.step()
                shown.step()
    return made
