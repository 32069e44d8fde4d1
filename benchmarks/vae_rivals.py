"""One VAE as flowvi and other libraries train it: the same nets, optimiser, batches and images.

The libraries are imported where they are used: zuko changes torch when it is imported.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from abc import ABC, abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import flowvi
from flowvi import vae

LATENT, WIDTH, BATCH, RATE = 64, 300, 100, 1e-3
FLOWS = {"gaussian": 0, "iaf": 2}
PRIOR_LAYERS, PRIOR_WIDTH = 4, 64


class Rival(ABC):
    """A VAE of 0/1 images in one library.

    Args:
        x: Images to train on, (N, H, W).
        guide: "gaussian" or "iaf", two layers of 300 hidden units.
        prior: "normal" or "maf", four layers of 64.
    """

    def __init__(self, x: Tensor, guide: str, prior: str) -> None:
        self.x, self.guide, self.prior = x, guide, prior
        made = vae.build(x, LATENT)
        self.encoder = copy.deepcopy(made.guide.encoder)
        self.decoder = copy.deepcopy(made.generator.decoder)

    @abstractmethod
    def train(self, epochs: int) -> None:
        """Go on for some epochs."""

    @abstractmethod
    def elbo(self, x: Tensor) -> float:
        """Mean over images, of one draw each."""


class Flowvi(Rival):
    """The engine."""

    def __init__(self, x: Tensor, guide: str, prior: str) -> None:
        super().__init__(x, guide, prior)
        self.made = vae.build(x, LATENT, guide=guide, prior=prior)
        self.target = flowvi.from_pyro(self.made.model, x, local="data")
        self.fit: Any = None

    def train(self, epochs: int) -> None:
        objective = flowvi.elbo(1, "total")
        guide = self.made.guide if self.fit is None else self.fit.guide
        self.fit = flowvi.fit(
            self.target, guide, objective, epochs=epochs, batch_size=BATCH, lr=RATE, progress=False
        )

    def elbo(self, x: Tensor) -> float:
        return float(self.fit.iw_bound(x, particles=1).mean)


class Head(nn.Module):
    """Mean and scale of z from features, as the Gaussian guide has them.

    Args:
        width: Number of features.
        dim: Length of z.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.linear(features).chunk(2, dim=-1)
        return loc, log_scale.exp()


class Pyro(Rival):
    """SVI with Trace_ELBO."""

    def __init__(self, x: Tensor, guide: str, prior: str) -> None:
        super().__init__(x, guide, prior)
        head, encoder, decoder = Head(WIDTH, LATENT), self.encoder, self.decoder

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                standard = dist.Normal(torch.zeros(LATENT), 1.0).expand([len(x), LATENT])
                logits = decoder(pyro.sample("z", standard.to_event(1))).squeeze(-3)
                pixels = dist.Bernoulli(logits=logits, validate_args=False).to_event(2)
                pyro.sample("x", pixels, obs=x)

        def q(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            pyro.module("head", head)
            with pyro.plate("data", len(x)):
                loc, scale = head(encoder(x))
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        pyro.clear_param_store()
        self.svi = SVI(model, q, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for rows in torch.randperm(len(self.x)).split(BATCH):
                self.svi.step(self.x[rows])

    def elbo(self, x: Tensor) -> float:
        return -float(self.svi.evaluate_loss(x)) / len(x)


class Zuko(Rival):
    """Its distributions in a loop of torch, as its tutorial has them."""

    def __init__(self, x: Tensor, guide: str, prior: str) -> None:
        super().__init__(x, guide, prior)
        from zuko.distributions import DiagNormal
        from zuko.flows import (
            MAF,
            Flow,
            LazyInverse,
            MaskedAutoregressiveTransform,
            UnconditionalDistribution,
        )

        class Base(Head):
            def forward(self, features: Tensor) -> Any:
                return DiagNormal(*super().forward(features))

        layers = [
            LazyInverse(
                MaskedAutoregressiveTransform(LATENT, context=WIDTH, hidden_features=[WIDTH] * 2)
            )
            for _ in range(FLOWS[guide])
        ]
        base = Base(WIDTH, LATENT)
        self.q = Flow(layers, base) if layers else base
        self.p: nn.Module = UnconditionalDistribution(
            DiagNormal, torch.zeros(LATENT), torch.ones(LATENT), buffer=True
        )
        if prior == "maf":
            hidden = [PRIOR_WIDTH] * 2
            self.p = MAF(LATENT, transforms=PRIOR_LAYERS, hidden_features=hidden)
        parts = nn.ModuleList([self.encoder, self.decoder, self.q, self.p])
        self.optimiser = torch.optim.Adam(parts.parameters(), lr=RATE)

    def _bounds(self, x: Tensor) -> Tensor:
        q = self.q(self.encoder(x))
        if self.guide == "gaussian":
            z = q.rsample()
            log_q = q.log_prob(z)
        else:
            z, log_q = q.rsample_and_log_prob()
        return _log_bits(self.decoder(z), x) + self.p().log_prob(z) - log_q

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for rows in torch.randperm(len(self.x)).split(BATCH):
                self.optimiser.zero_grad()
                (-self._bounds(self.x[rows]).mean()).backward()
                self.optimiser.step()

    def elbo(self, x: Tensor) -> float:
        with torch.no_grad():
            return float(self._bounds(x).mean())


class Pythae(Rival):
    """Its trainer; its IAF reads the image through the normal alone."""

    def __init__(self, x: Tensor, guide: str, prior: str) -> None:
        super().__init__(x, guide, prior)
        from pythae.models import VAE, VAE_IAF, VAE_IAF_Config, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder

        class Encoder(BaseEncoder):
            def __init__(self, body: nn.Module) -> None:
                super().__init__()
                self.body, self.head = body, nn.Linear(WIDTH, 2 * LATENT)

            def forward(self, x: Tensor) -> Any:
                loc, log_variance = self.head(self.body(x.squeeze(1))).chunk(2, dim=-1)
                return ModelOutput(embedding=loc, log_covariance=log_variance)

        class Decoder(BaseDecoder):
            def __init__(self, body: nn.Module) -> None:
                super().__init__()
                self.body = body

            def forward(self, z: Tensor) -> Any:
                return ModelOutput(reconstruction=self.body(z).sigmoid())

        sizes: dict[str, Any] = {
            "input_dim": (1, *x.shape[1:]),
            "latent_dim": LATENT,
            "reconstruction_loss": "bce",
        }
        nets = {"encoder": Encoder(self.encoder), "decoder": Decoder(self.decoder)}
        if guide == "iaf":
            flow = {"n_made_blocks": FLOWS[guide], "n_hidden_in_made": 2, "hidden_size": WIDTH}
            self.model: Any = VAE_IAF(VAE_IAF_Config(**sizes, **flow), **nets)
        else:
            self.model = VAE(VAEConfig(**sizes), **nets)

    def train(self, epochs: int) -> None:
        from pythae.data.datasets import BaseDataset
        from pythae.trainers import BaseTrainer, BaseTrainerConfig

        data = BaseDataset(self.x[:, None], torch.zeros(len(self.x)))
        logging.disable(logging.CRITICAL)
        quiet = contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, quiet:
            settings = BaseTrainerConfig(
                output_dir=folder,
                num_epochs=epochs,
                per_device_train_batch_size=BATCH,
                learning_rate=RATE,
                no_cuda=True,
            )
            BaseTrainer(self.model, data, training_config=settings).train()
        logging.disable(logging.NOTSET)

    def elbo(self, x: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            found = self.model({"data": x[:, None]})
        return -float(found.loss)


def _log_bits(logits: Tensor, x: Tensor) -> Tensor:
    """Log likelihood of 0/1 images, (N, 1, H, W) and (N, H, W) -> (N)."""
    loss = nn.functional.binary_cross_entropy_with_logits
    return -loss(logits.squeeze(-3), x, reduction="none").sum((-2, -1))


CASES: dict[tuple[str, str], tuple[type[Rival], ...]] = {
    ("gaussian", "normal"): (Flowvi, Pyro, Pythae, Zuko),
    ("iaf", "normal"): (Flowvi, Pythae, Zuko),
    ("gaussian", "maf"): (Flowvi, Zuko),
}
