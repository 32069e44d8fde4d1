"""Draw the pictures of verdict.md: what the weights of a guide's draws show, and what they do not.

python docs/make_verdict_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.stats import norm, t

from flowvi.diagnostics import diagnose
from flowvi.plots import plot_khat
from flowvi.plots.theme import BLUE, GREY, ORANGE, style

mpl.use("agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent / "images"
DRAWS = 4000
X = np.linspace(-6, 11, 600)


def two(x: np.ndarray) -> np.ndarray:
    """Log density of two bumps, one of a fifth of the mass."""
    return np.logaddexp(np.log(0.8) + norm.logpdf(x), np.log(0.2) + norm.logpdf(x, 8.0, 0.6))


CASES = {
    "close": (norm.logpdf, t(12, scale=1.02)),
    "too narrow": (t(3).logpdf, norm(0, 0.8)),
    "a mode is missing": (two, t(12, scale=1.02)),
}


def main() -> None:
    """Draw and save."""
    rng = np.random.default_rng(0)
    with style():
        figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.2), layout="constrained")
        for (name, (log_p, q)), (top, bottom) in zip(CASES.items(), axes.T, strict=True):
            draws = q.rvs(DRAWS, random_state=rng)
            log_w = log_p(draws) - q.logpdf(draws)
            top.fill_between(X, np.exp(log_p(X)), color=GREY, alpha=0.3, lw=0, label="posterior p")
            top.plot(X, q.pdf(X), color=BLUE, lw=1.4, label="guide q")
            top.plot(draws[:150], np.full(150, -0.012), "|", color=ORANGE, ms=5, label="draws")
            verdict = diagnose(log_w, {"x": draws}).verdict
            top.set(title=f"{name}: “{verdict}”", yticks=[], ylim=(-0.03, 0.55))
            plot_khat(log_w, bottom)
        axes[0, 0].legend(loc="upper right")
    figure.savefig(IMAGES / "verdict.png", dpi=110)


if __name__ == "__main__":
    main()
