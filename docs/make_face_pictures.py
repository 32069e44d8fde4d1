"""Draw samples of a VAE, an f-VAE and a Glow of faces, trained for the same CPU seconds.

python docs/make_face_pictures.py freyfaces.npz --seconds 120 --out docs/images
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import flowvi
from flowvi import vae
from flowvi.flows import FLOWS, Normal
from flowvi.plots import plot_images
from flowvi.vae.model import PLATE

SHOWN, BATCH, LR = 8, 50, 1e-3
# The step size falls to this share of it.
LAST = 0.02


def autoencoder(x: Tensor, seconds: float, **parts: str) -> tuple[Tensor, int]:
    """Mean images of draws from the prior of a VAE, and its epochs."""
    latent = 128 if parts.get("net") == "maps" else 32

    def trained(epochs: int) -> vae.Autoencoder:
        made = vae.build(x, latent, likelihood="gaussian", **parts)
        flowvi.fit(
            flowvi.from_pyro(made.model, x, local=PLATE),
            made.guide,
            flowvi.elbo(1, "total"),
            epochs=epochs,
            minibatch=flowvi.Minibatch(batch_size=BATCH, lr=LR),
            progress=False,
        )
        return made

    # What two epochs take tells how many there is time for: the step falls in the second half.
    began = time.process_time()
    trained(2)
    epochs = round(2 * seconds / (time.process_time() - began))
    return trained(epochs).generator.sample(SHOWN, seed=1), epochs


def glow(x: Tensor, seconds: float) -> tuple[Tensor, int]:
    """Draws of a Glow of the images themselves, fitted by maximum likelihood, and its epochs."""
    height, width = x.shape[1:]
    dim = height * width
    torch.manual_seed(0)
    # Two levels need no border, whose pixels would be known a hundred times better than others.
    flow, base = FLOWS["image_glow"](dim, shape=(1, height, width), levels=2), Normal(dim)

    def rows(index: Tensor) -> Tensor:
        # Levels become intervals.
        y = x[index].flatten(1) * (255 / 256)
        return y + torch.rand_like(y) / 256 - 0.5

    flow.initialise(rows(torch.arange(200)))
    optimiser = torch.optim.Adam(flow.parameters(), lr=LR)
    began, epochs, spent = time.process_time(), 0, 0.0
    while spent < 1.0:
        for index in torch.randperm(len(x)).split(BATCH):
            spent = (time.process_time() - began) / seconds
            optimiser.param_groups[0]["lr"] = LR * max(LAST, min(1.0, 2 * (1 - spent)))
            eps, ladj = flow.inverse(rows(index))
            optimiser.zero_grad()
            (-(base.log_prob(eps) + ladj).mean() / dim).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimiser.step()
        epochs += 1
    torch.manual_seed(1)
    with torch.no_grad():
        y, _ = flow(0.7 * base.sample((SHOWN,)))
    return (y + 0.5).unflatten(-1, (height, width)), epochs


def main() -> None:
    """Train the three and draw a row of samples of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    mpl.use("agg")
    torch.set_num_threads(1)
    x = vae.load(options.data, "grey").train
    s = options.seconds
    models: dict[str, Callable[[], tuple[Tensor, int]]] = {
        "VAE": lambda: autoencoder(x, s),
        "f-VAE": lambda: autoencoder(x, s, guide="shifted", prior="glow", net="maps"),
        "Glow": lambda: glow(x, s),
    }
    found = {"faces": x[:: len(x) // SHOWN][:SHOWN]}
    for name, train in models.items():
        found[name], epochs = train()
        print(f"{name}: {epochs} epochs in {s:g} CPU seconds", flush=True)
    # Ink is light on these photographs.
    ax = plot_images(1 - torch.stack(list(found.values())), names=list(found))
    ax.figure.savefig(options.out / "faces.png", dpi=110)


if __name__ == "__main__":
    main()
