"""Draw the pictures of `amortize.md`: calibration of an amortised guide of eight schools."""

import sys
from pathlib import Path

import matplotlib as mpl

import flowvi
from flowvi.plots import plot_recovery, plot_sbc

ROOT = Path(__file__).parents[1]
BUDGET, DATA_SETS = 60, 200


def main() -> None:
    """Train, calibrate, and write the pictures."""
    mpl.use("agg")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from amortised_models import models

    model = models()["eight_schools"]
    guide = flowvi.amortize(model.model, *model.args, budget=BUDGET)
    found = flowvi.sbc(guide, fits=DATA_SETS)
    print(guide, found, sep="\n")
    for name, draw in (("sbc", plot_sbc), ("recovery", plot_recovery)):
        figure = draw(found).flat[0].figure
        figure.savefig(ROOT / f"docs/images/amortized_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
