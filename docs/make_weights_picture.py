"""Draw what a network says in a gap of its data, under two guides: images/bnn_gap.png.

python docs/make_weights_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import flowvi

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "models"))


def main() -> None:
    """Fit both guides and draw their bands."""
    import bnn_regression as example

    x, y = example.data()
    target = flowvi.from_pyro(example.model, x, y)
    grid = torch.linspace(-1.6, 1.6, 81, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for ax, guide in zip(axes, ("meanfield", "realnvp"), strict=True):
        fit = flowvi.fit(target, guide, budget=40, progress=False)
        found = flowvi.predict(fit.draw(1000), grid)
        low, middle, high = found.quantiles("mean", (0.05, 0.5, 0.95))
        ax.fill_between(grid, low, high, alpha=0.3, lw=0, label="90 % of the mean")
        ax.plot(grid, middle, label="median")
        ax.plot(x, y, "k.", ms=4)
        ax.set(title=f"{guide}: ELBO {fit.bounds[0]:.1f}", xlabel="x", ylim=(-3, 3))
        widths = high - low
        at = [int((grid - point).abs().argmin()) for point in (0.0, 0.7)]
        print(guide, fit.bounds[0], "width at 0:", widths[at[0]], "at 0.7:", widths[at[1]])
    axes[0].set_ylabel("y")
    axes[0].legend(loc="lower left")
    figure.savefig(HERE / "images" / "bnn_gap.png", dpi=120)


if __name__ == "__main__":
    main()
