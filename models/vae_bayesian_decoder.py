"""A variational autoencoder of few images whose decoder's last layer has a posterior.

A code z for each image and weights theta for all of them, under one bound: the ELBO over theta of
importance-weighted bounds over z. Trained with point weights first; run as a program, it goes on
from there both ways, and compares what they say of test images.
"""

import copy
import sys
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi import vae

local = "data"
LATENT, HIDDEN, UNITS, ROWS = 8, 64, 10, 500
# Spread of the weights before the data, and where their guide starts.
SCALE, WIDTH = 1.0, 0.2
# A guide's steps are in units of its width.
BATCH, PARTICLES, LR, LR_WEIGHTS = 50, 4, 3e-3, 1e-2


class Body(nn.Module):
    """The decoder below its last layer. (*S, D) -> (*S, U)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, UNITS), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        units: Tensor = self.layers(z)
        return units


def data(path: str | None = None, rows: int = ROWS) -> tuple[Tensor, Body, Tensor]:
    """Images of 0 and 1, (N, H, W), the first of a file's or of scikit-learn's digits; a decoder's
    body; and the logits of the pixel means, (H W).
    """
    x = vae.load(path).train[:rows]
    return x, Body(), x.mean(0).clamp(0.01, 0.99).logit().flatten()


def model(x: Tensor, body: Body, means: Tensor) -> None:
    pyro.module("body", body)
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(len(means), UNITS), SCALE).to_event(2))
    bias = pyro.sample("bias", dist.Normal(means, 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        logits = (body(z) @ weight.mT + bias).unflatten(-1, x.shape[1:])
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(2), obs=x)


def point_model(x: Tensor, body: Body, last: nn.Linear) -> None:
    """The same with point weights in the last layer."""
    pyro.module("body", body)
    pyro.module("last", last)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        logits = last(body(z)).unflatten(-1, x.shape[1:])
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(2), obs=x)


def guide(x: Tensor) -> flowvi.Amortised:
    """A normal code whose means and scales are functions of the image."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), HIDDEN), nn.ReLU())
    return flowvi.Amortised(encoder, vae.posterior("gaussian", LATENT, HIDDEN))


@dataclass
class Points:
    """An autoencoder with point weights: images, decoder, and the fit."""

    x: Tensor
    means: Tensor
    body: Body
    last: nn.Linear
    fit: flowvi.RowFit

    @property
    def rows(self) -> flowvi.Amortised:
        """The guide of codes."""
        return cast(flowvi.Amortised, self.fit.guide)

    def trained(self, epochs: int) -> "Points":
        """A copy, trained on."""
        body, last = copy.deepcopy(self.body), copy.deepcopy(self.last)
        return fit_points(self.x, self.means, body, last, self.rows, epochs)


def fit_points(
    x: Tensor, means: Tensor, body: Body, last: nn.Linear, rows: flowvi.Amortised, epochs: int
) -> Points:
    """Train codes, decoder and point weights together, by the bound of several codes."""
    target = flowvi.from_pyro(point_model, x, body, last, local=local)
    found = flowvi.fit(
        target,
        rows,
        flowvi.iwelbo(PARTICLES),
        epochs=epochs,
        batch_size=min(BATCH, len(x)),
        lr=LR,
        progress=False,
    )
    return Points(x, means, body, last, found)


def start(path: str | None = None, epochs: int = 60, rows: int = ROWS) -> Points:
    """An autoencoder with point weights."""
    x, body, means = data(path, rows)
    last = nn.Linear(UNITS, len(means))
    with torch.no_grad():
        last.bias.copy_(means)
    return fit_points(x, means, body, last, guide(x), epochs)


def fit_weights(points: Points, weights: str, epochs: int) -> flowvi.NestedFit:
    """Go on with a posterior of the weights of the last layer, begun around the points."""
    x, body = points.x, copy.deepcopy(points.body)
    target = flowvi.from_pyro(model, x, body, points.means, local=local)
    shared = target.shared
    assert shared is not None
    made = flowvi.Multiplicative().build(shared) if weights == "multiplicative" else None
    theta = made or flowvi.guides.make_guide(weights, shared.dim)
    loc = shared.unconstrain({"weight": points.last.weight, "bias": points.last.bias}).detach()
    theta.to(loc.dtype).start(loc, torch.full_like(loc, WIDTH))
    size = min(BATCH, len(x))
    return flowvi.nested(
        target,
        theta,
        points.rows,
        particles=PARTICLES,
        sees_theta=False,
        batch_size=size,
        steps=max(1, epochs * len(x) // size),
        draws=2,
        lr=LR_WEIGHTS,
    )


def fit(path: str | None = None, epochs: int = 200) -> flowvi.NestedFit:
    """Points first, then a multiplicative flow over the weights of the last layer."""
    return fit_weights(start(path), "multiplicative", epochs)


def main(rows: int = ROWS, before: int = 60, after: int = 200) -> None:
    """Print the bounds of test images and of those that were trained on."""
    torch.manual_seed(0)
    test, points = vae.load().test, start(epochs=before, rows=rows)
    base = points.fit.iw_bound(test, particles=100, seed=1).values

    def say(name: str, on_test: np.ndarray, on_train: np.ndarray) -> None:
        gain = on_test - base
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(
            f"{name:<28} test {on_test.mean():.2f}, paired gain {gain.mean():.2f} ± {error:.2f}, "
            f"train {on_train.mean():.2f}",
            flush=True,
        )

    for epochs in (0, after):
        found = points.trained(epochs) if epochs else points
        said = [found.fit.iw_bound(x, particles=100, seed=1).values for x in (test, points.x)]
        say(f"points, {before + epochs} epochs", *said)
    for name in ("meanfield", "multiplicative"):
        nested = fit_weights(points, name, after)
        said = [nested.predictive_bound(x, 30, particles=100, seed=1) for x in (test, points.x)]
        say(f"{name} after {before}", *said)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
