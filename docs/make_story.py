"""Draw the pictures of story.md: images/story_guides.png, story_depth.png and story_costs.png.

flowvi vae --compare planar,iaf --out results/guides
python benchmarks/story_depth.py curve --out depth.json
python benchmarks/story_costs.py > costs.md
python docs/make_story.py --guides results/guides/guides.csv --depth depth.json --costs costs.md
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

IMAGES = Path(__file__).parent / "images"


def guides(file: Path) -> None:
    """What each guide gains on the Gaussian, with two standard errors."""
    with file.open(newline="") as lines:
        first, *rows = csv.DictReader(lines)
    place = np.arange(len(rows))
    figure, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for shift, key, label in (
        (-0.1, "elbo_better", "ELBO"),
        (0.1, "bound_better", f"L_{first['particles']}"),
    ):
        value = [float(row[key]) for row in rows]
        error = [2 * float(row[f"{key}_se"]) for row in rows]
        ax.errorbar(value, place + shift, xerr=error, fmt="o", capsize=3, label=label)
    ax.axvline(0, color="0.6", lw=1)
    ax.set(yticks=place, yticklabels=[row["guide"] for row in rows], ylim=(-0.6, len(rows) - 0.4))
    ax.set(xlabel=f"nats gained on {first['guide']}, with 2 standard errors")
    ax.legend()
    figure.savefig(IMAGES / "story_guides.png", dpi=110)


def depth(file: Path) -> None:
    """The gap to the exact log evidence against layers and the time of draws."""
    facts = json.loads(file.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for name, rows in facts["rows"].items():
        layers, value, _, seconds = np.array(rows).T
        axes[0].plot(layers, value, "o-", ms=4, label=name)
        axes[1].plot(1000 * seconds, value, "o-", ms=4)
    axes[0].set(yscale="log", xlabel="layers", ylabel="log evidence - ELBO, nats")
    axes[1].set(xscale="log", xlabel="ms of 1,000 draws")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(IMAGES / "story_depth.png", dpi=110)


def costs(file: Path) -> None:
    """Ratios to a plain Gaussian's times."""
    rows = [line.strip("| \n").split(" | ") for line in file.read_text().splitlines()]
    heads, families = rows[0][1:4], rows[3:]
    place = np.arange(len(families))
    figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for i, head in enumerate(heads):
        ax.bar(place + 0.27 * (i - 1), [float(row[1 + i]) for row in families], 0.27, label=head)
    ax.set(yscale="log", ylabel="times a diagonal Gaussian's", xticks=place)
    ax.set_xticklabels([row[0] for row in families], rotation=30, ha="right")
    ax.legend()
    figure.savefig(IMAGES / "story_costs.png", dpi=110)


def main() -> None:
    """Draw what there are numbers of."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("guides", "depth", "costs"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    files = (options.guides, guides), (options.depth, depth), (options.costs, costs)
    for file, drawn in files:
        if file is not None:
            drawn(file)


if __name__ == "__main__":
    main()
