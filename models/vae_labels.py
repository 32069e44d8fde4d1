"""A semi-supervised VAE: a class and a code for every image, classes known for a few of them.

Kingma, Rezende, Mohamed and Welling (2014), "Semi-supervised Learning with Deep Generative
Models", arXiv:1406.5298: model M2. Classes that are not known are summed out.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
LATENT, HIDDEN, CLASSES, KNOWN = 8, 128, 10, 200


class Decoder(nn.Module):
    """Logits of the pixels of a code and a class. (*S, D), (*S, C) -> (*S, H, W)."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.size = means.shape
        self.layers = nn.Sequential(
            nn.Linear(LATENT + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, means.numel())
        )
        self.bias = nn.Parameter(means.clamp(0.01, 0.99).logit())

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        both = torch.cat([z.expand(*lead, -1), y.expand(*lead, -1)], dim=-1)
        return self.layers(both).unflatten(-1, self.size) + self.bias


def data(path: str | None = None, known: int = KNOWN) -> tuple[Tensor, Tensor, Decoder]:
    """Images of 0 and 1, (N, H, W), their classes or -1 where they are not known, and a decoder."""
    images = vae.load(path)
    assert images.labels is not None
    label = torch.full((len(images.train),), -1)
    label[:known] = images.labels["train"][:known]
    return images.train, label, Decoder(images.train.mean(0))


def model(x: Tensor, label: Tensor, decoder: Decoder) -> None:
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        every = dist.Categorical(logits=x.new_zeros(CLASSES))
        y = pyro.sample("y", every, infer={"enumerate": "parallel"})
        hot = (y.unsqueeze(-1) == torch.arange(CLASSES)).to(x.dtype)
        # A known class leaves no probability to the others.
        pyro.factor("label", torch.where((label < 0) | (label == y), 0.0, -1e4).to(x.dtype))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z, hot)).to_event(2), obs=x)


class Encoder(nn.Module):
    """Features of an image and of its class, where that is known. (B, H, W), (B) -> (B, F)."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels + CLASSES + 1, HIDDEN), nn.ReLU())

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        hot = (label.unsqueeze(-1) == torch.arange(-1, CLASSES)).to(x.dtype)
        out: Tensor = self.layers(torch.cat([x.flatten(1), hot], dim=-1))
        return out


def guide(x: Tensor) -> flowvi.Amortised:
    """A normal code, whose mean and scales are functions of the image."""
    inner = vae.posterior("gaussian", LATENT, HIDDEN)
    return flowvi.Amortised(Encoder(x[0].numel()), inner)


def fit(path: str | None = None, epochs: int = 60, progress: bool = True) -> flowvi.RowFit:
    """Train guide and decoder on images with and without classes."""
    x, label, decoder = data(path)
    target = flowvi.from_pyro(model, x, label, decoder, local=local)
    return flowvi.fit(
        target,
        guide(x),
        flowvi.elbo(1, "total"),
        epochs=epochs,
        batch_size=20,
        progress=progress,
    )


def classify(fitted: flowvi.RowFit, x: Tensor, draws: int = 50) -> Tensor:
    """Probabilities of the classes of images without one, (N, C), by weighted draws of the code.

    p(y | x) is in the ratio of the evidence of image and class, for each class.
    """
    assert isinstance(fitted.guide, flowvi.Amortised)
    unknown = torch.full((len(x),), -1)
    with torch.no_grad():
        z, log_q = fitted.guide.sample((draws,), (x, unknown))
        scores = []
        for y in range(CLASSES):
            log_p = fitted.target.log_prob(z, (x, torch.full((len(x),), y)))
            scores.append(torch.logsumexp(log_p - log_q, dim=0))
    return torch.stack(scores, dim=-1).softmax(-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    file = sys.argv[1] if len(sys.argv) > 1 else None
    images = vae.load(file)
    assert images.labels is not None
    right = classify(fit(file), images.test).argmax(-1) == images.labels["test"]
    print(f"{right.double().mean():.1%} of {len(right)} test images classified rightly")
