"""Draw the pictures of weights and of the joint posterior in story.md.

python docs/make_story_weights.py

images/story_gap.png: what three posteriors of a network say in a gap of the data.
images/story_minibatch.png: bounds whose weights see all rows, and a minibatch of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

import flowvi

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

ROWS, BATCH, WIDER = 100, 10, 1.5


def draw_gap(steps: int, transitions: int) -> None:
    """Bands of mean field, a flow and Markov chains."""
    import story_weights as story

    split = story.gap(0)
    target = story.target_of("gap", split)
    grid = torch.linspace(-1.2, 1.2, 97, dtype=torch.float64)[:, None]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    start = story.place(target, 0)

    def fitted(guide: str) -> flowvi.Fit:
        return flowvi.fit(target, guide, steps=steps, start=start, compile=False, progress=False)

    plain, flow = (fitted(name) for name in ("meanfield", "realnvp"))
    chains = story.by_chains(target, 0, transitions)
    panels = {
        f"mean field, ELBO {plain.bounds[0]:.1f}": plain.draw(1000),
        f"flow on all weights, ELBO {flow.bounds[0]:.1f}": flow.draw(1000),
        "Markov chains": chains,
    }
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        low, middle, high = flowvi.predict(found, grid).quantiles("output", (0.05, 0.5, 0.95))
        at = grid[:, 0]
        ax.fill_between(at, low.ravel(), high.ravel(), alpha=0.3, lw=0, label="90 % of the mean")
        ax.plot(at, middle.ravel(), label="median")
        ax.plot(at, torch.sin(4 * at), "k--", lw=0.8, label="truth")
        ax.plot(split.x[:, 0], split.y, "k.", ms=4)
        ax.set(title=title, xlabel="x", ylim=(-2.5, 2.5))
        width = (high - low).ravel()
        near = [int((at - point).abs().argmin()) for point in (0.0, 0.7)]
        print(f"{title}: width at 0 {width[near[0]]:.2f}, at 0.7 {width[near[1]]:.2f}", flush=True)
    axes[0].set_ylabel("y")
    axes[0].legend(loc="lower left", fontsize=7)
    figure.savefig(HERE / "images" / "story_gap.png", dpi=110)


def bounds(
    y: torch.Tensor, counts: list[int], repeats: int, batch: int, own: bool = False
) -> np.ndarray:
    """Estimates of E log mean w, with their errors, for numbers of draws of theta. (M, 2).

    Args:
        y: The data.
        counts: Numbers of draws.
        repeats: Estimates of each.
        batch: Rows of a minibatch, drawn without replacement.
        own: Whether each draw has a minibatch of its own, or all of an estimate the same.
    """
    generator = torch.Generator().manual_seed(1)
    loc, scale = y.sum() / (ROWS + 1), WIDER * (ROWS + 1) ** -0.5
    guide, prior = Normal(loc, scale), Normal(0.0, 1.0)
    found = []
    for many in counts:
        eps = torch.randn(repeats, many, generator=generator, dtype=y.dtype)
        theta = loc + scale * eps
        batches = torch.rand(repeats, many if own else 1, ROWS, generator=generator).argsort(-1)
        chosen = batches[..., :batch]
        log_p = Normal(theta[..., None], 1.0).log_prob(y[chosen]).sum(-1) * ROWS / batch
        log_w = log_p + prior.log_prob(theta) - guide.log_prob(theta)
        values = torch.logsumexp(log_w, 1) - math.log(many)
        found.append([float(values.mean()), float(values.std() / repeats**0.5)])
    return np.array(found)


def draw_minibatch(repeats: int) -> None:
    """The bound of M draws against M: weights of all rows, and of ten of a hundred."""
    generator = torch.Generator().manual_seed(0)
    y = 0.5 + torch.randn(ROWS, generator=generator, dtype=torch.float64)
    one = torch.ones(ROWS, ROWS, dtype=torch.float64)
    law = MultivariateNormal(0 * y, torch.eye(ROWS, dtype=torch.float64) + one)
    exact = float(law.log_prob(y))
    counts = [1, 3, 10, 30, 100]
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    kinds = {
        "all 100 rows": (ROWS, False),
        "10 rows, the same for all draws": (BATCH, False),
        "10 rows, others for each draw": (BATCH, True),
    }
    for words, (batch, own) in kinds.items():
        found = bounds(y, counts, repeats, batch, own)
        ax.errorbar(counts, found[:, 0] - exact, 2 * found[:, 1], marker="o", ms=4, label=words)
        pairs = zip(counts, found - [exact, 0.0], strict=True)
        said = ", ".join(f"M = {m}: {v:.2f} ± {e:.2f}" for m, (v, e) in pairs)
        print(f"{words}: {said}", flush=True)
    ax.axhline(0.0, color="k", lw=0.8, ls="--")
    ax.text(30, 0.1, "log evidence", fontsize=8)
    ax.set_yscale("symlog", linthresh=2.0)
    ax.set_yticks([-1, 0, 1, 2, 5, 10, 20, 40], labels=["-1", "0", "1", "2", "5", "10", "20", "40"])
    ax.set(
        ylim=(-2.5, 70),
        xscale="log",
        xlabel="draws M of theta",
        ylabel="bound less log evidence, nats",
    )
    ax.legend()
    figure.savefig(HERE / "images" / "story_minibatch.png", dpi=110)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps and draws")
    quick = parser.parse_args().quick
    draw_minibatch(100 if quick else 2000)
    draw_gap(*((50, 32) if quick else (400, 160)))


if __name__ == "__main__":
    main()
