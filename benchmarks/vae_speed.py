"""Time of an epoch of a VAE beside Pyro's SVI, with the same nets, in turn in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import flowvi
from flowvi import vae

BATCH, ROUNDS, IMAGES = 100, 5, 5000


def table(images: vae.Images) -> Iterator[str]:
    """Seconds of an epoch of each, and their ratio: medians of rounds, in turn."""
    x = images.train[:IMAGES]
    epochs = {"flowvi": _flowvi(x), "Pyro SVI": _pyro(x)}
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for i in range(ROUNDS + 1):
        for name, epoch in epochs.items():
            began = time.process_time()
            epoch()
            if i:  # The first round is for warming up.
                times[name].append(time.process_time() - began)
    ours, theirs = times["flowvi"], times["Pyro SVI"]
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    share = 50_000 / len(x)
    yield "| | CPU s an epoch of 50,000 images | ratio |"
    yield "| --- | --- | --- |"
    yield f"| flowvi | {share * statistics.median(ours):.1f} | 1 |"
    yield f"| Pyro SVI, Trace_ELBO, Adam | {share * statistics.median(theirs):.1f} | {ratio:.2f} |"


def _flowvi(x: Tensor) -> Callable[[], object]:
    """An epoch of the engine; capturing is done before, and so is what a fit prepares."""
    made = vae.build(x, 64)
    target = flowvi.from_pyro(made.model, x, local="data")
    objective = flowvi.elbo(1, "total")

    def epoch() -> object:
        return flowvi.fit(target, made.guide, objective, epochs=1, batch_size=BATCH, progress=False)

    return epoch


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


def _pyro(x: Tensor) -> Callable[[], object]:
    """An epoch of SVI, with the engine's optimiser."""
    made = vae.build(x, 64)
    encoder, decoder = made.guide.encoder, copy.deepcopy(made.generator.decoder)
    head = Head(300, 64)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(64), 1.0).expand([len(x), 64]).to_event(1))
            logits = decoder(z).squeeze(-3)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(2), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("head", head)
        with pyro.plate("data", len(x)):
            loc, scale = head(encoder(x))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def epoch() -> object:
        return [svi.step(x[rows]) for rows in torch.randperm(len(x)).split(BATCH)]

    return epoch
