"""Fit models of `models/` and draw a small picture of each.

`python docs/make_gallery.py [NAME ...]` writes images/gallery/NAME.png, and gallery.md of all that
are there.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import flowvi
from flowvi.cli.model_file import load_target
from flowvi.draws.draws import Draws
from flowvi.draws.selection import first_scalars

HERE = Path(__file__).parent
MODELS, IMAGES = HERE.parent / "models", HERE / "images" / "gallery"
# Name, heading, and the seconds that a fit may take.
SHOWN = {
    "eight_schools": ("A hierarchy", 60),
    "eight_schools_centered": ("The same, centred", 60),
    "funnel": ("A funnel", 60),
    "linear_regression": ("A regression", 60),
    "logistic_regression": ("A logistic regression", 60),
    "beta_binomial": ("Overdispersed counts by group", 60),
    "poisson_groups": ("Counts by group", 60),
    "normal_groups": ("Many groups", 60),
    "local_level": ("A series", 60),
    "stochastic_volatility": ("A series of variances", 90),
    "irt_persons": ("Item response", 90),
    "gp_counts": ("A field of counts", 90),
}
PANELS, BINS = 4, 40


def main() -> None:
    """Draw the pictures that were asked for, all by default, and write the page."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or SHOWN:
        target = load_target(MODELS / f"{name}.py", None)
        fit = flowvi.fit(target, budget=SHOWN[name][1], progress=False)
        draws = fit.draw(2000)
        found = flowvi.diagnose(draws)
        figure = picture(draws, f"{found.verdict}, k-hat {found.khat:.2f}, D = {target.dim}")
        figure.savefig(IMAGES / f"{name}.png", dpi=72, pil_kwargs={"optimize": True})
        plt.close(figure)
        print(name, found.verdict, f"{fit.meta['seconds']:.0f} s", flush=True)
    (HERE / "gallery.md").write_text(page())


def picture(draws: Draws, title: str) -> plt.Figure:
    """Histograms of the scalars that come first, (PANELS) side by side."""
    shown = list(first_scalars(draws))[:PANELS]
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 1.7), squeeze=False)
    for ax, one in zip(axes[0], shown, strict=True):
        low, high = np.quantile(one.draws, (0.002, 0.998))
        ax.hist(one.draws.ravel(), np.linspace(low, high, BINS), color="#2b6a99")
        ax.set_title(one.label, fontsize=9, loc="left", parse_math=False)
        ax.set_yticks([])
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color="#555c64")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def page() -> str:
    """The page of all pictures that are there."""
    parts = [
        "# Gallery",
        "Models of `models/`, each fitted by the default call: marginals of what a reader wants\n"
        "to see first, with the verdict. The program that draws them is `docs/make_gallery.py`.",
    ]
    for name, (heading, _) in SHOWN.items():
        if (IMAGES / f"{name}.png").is_file():
            source = (MODELS / f"{name}.py").read_text()
            line = (ast.get_docstring(ast.parse(source)) or name).partition("\n\n")[0]
            command = f"`flowvi fit models/{name}.py --out results/{name}`"
            image = f"![Marginals of {name}](images/gallery/{name}.png)"
            parts += [f"## {heading}", line, image, command]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
