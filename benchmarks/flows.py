"""Compare the flow families with each other, and with those of other libraries.

    python benchmarks/flows.py densities [--seconds 20] [--images DIR] [NAME ...]
    python benchmarks/flows.py speed [--dims 10 100 1000] [NAME ...]

`densities` prints KL(q || p) in nats for U1 to U4 of Rezende and Mohamed
(2015), two moons and eight Gaussians, every guide trained for the same wall
time on one thread, and writes pictures of the learnt densities. `speed` prints
the time of a step of every family with ratios to Pyro, zuko and normflows, and
what path gradients cost; it needs pip install 'flowvi[benchmark]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import densities
import flow_speed
import numpy as np
import torch
from PIL import Image

from flowvi.flows import FLOWS
from flowvi.plots.theme import style

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ["planar 2", "planar 8", "planar 32", "naf", "mixture"]
FIGURES = {
    "flow_densities.png": ["U1", "U2", "U3", "U4"],
    "flow_modes.png": ["moons", "eight"],
}
PIXELS = 160
COLOURS = 64
PATH_DIMS = [10, 100]
# No parameters, hence no gradient; and no vector of these lengths is an image.
WITHOUT_PATH = ["image_glow", "loft", "permutation"]


def draw_figures(rows: densities.Rows, folder: Path, guides: Sequence[str]) -> None:
    """One figure for each group of densities: the truth, and each guide beside it."""
    for file, names in FIGURES.items():
        draw_figure(rows, folder / file, names, guides)


def draw_figure(
    rows: densities.Rows, path: Path, names: Sequence[str], guides: Sequence[str]
) -> None:
    """A row for each density, a column for the truth and for each guide, with its KL."""
    import matplotlib.pyplot as plt

    with style():
        size = (1.35 * (1 + len(guides)), 1.5 * len(names))
        figure, grid = plt.subplots(
            len(names), 1 + len(guides), figsize=size, layout="constrained", squeeze=False
        )
        for line, name in zip(grid, names, strict=True):
            half = 6.0 if name == "eight" else 4.0
            axis = torch.linspace(-half, half, PIXELS, dtype=torch.float64)
            x, y = torch.meshgrid(axis, axis, indexing="xy")
            found = [densities.picture(name, None, x, y)]
            found += [densities.picture(name, rows[name, guide], x, y) for guide in guides]
            for ax, image in zip(line, found, strict=True):
                ax.imshow(image, origin="lower", cmap="Blues", vmax=np.max(found[0]))
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(name)
            for ax, guide in zip(line[1:], guides, strict=True):
                ax.set_xlabel(f"KL {rows[name, guide].kl:.3f}", fontsize=8, labelpad=2)
        for ax, title in zip(grid[0], ["truth", *guides], strict=True):
            ax.set_title(title, loc="center")
        figure.savefig(path, dpi=110)
        plt.close(figure)
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["densities", "speed"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, for each fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("names", nargs="*", help="of guides or families; all by default")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if options.part == "densities":
        guides = options.names or list(densities.GUIDES)
        rows = densities.table(densities.DENSITIES, guides, options.seconds, options.seed)
        draw_figures(rows, options.images, [name for name in SHOWN if name in guides])
    else:
        flow_speed.table(options.names or flow_speed.OURS, options.dims)
        paths = [name for name in options.names or FLOWS if name not in WITHOUT_PATH]
        flow_speed.path_table(paths, PATH_DIMS)


if __name__ == "__main__":
    main()
