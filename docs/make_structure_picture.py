"""Draw a fit of many units beside its exact posterior: images/structure.png.

python docs/make_structure_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import flowvi

HERE = Path(__file__).parent
for folder in ("models", "benchmarks"):
    sys.path.insert(0, str(HERE.parent / folder))
GROUPS = 200


def main() -> None:
    """Fit a Poisson hierarchy, and compare scale and groups with quadrature."""
    import poisson_groups as example
    import truths

    arguments = example.simulate(GROUPS, 0)
    exact = truths.truth("poisson_groups", *[a.numpy() for a in arguments])
    fit = flowvi.fit(flowvi.from_pyro(example.model, *arguments), progress=False)
    draws = fit.draw(4000)
    found = flowvi.diagnose(draws)
    print(found.verdict, found.log_evidence - exact.log_evidence)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3), layout="constrained", width_ratios=(1, 2)
    )
    left.hist(draws.values["tau"].ravel(), 40, density=True, alpha=0.4, label="draws")
    mean, sd = float(exact.mean["tau"]), float(exact.sd["tau"])
    left.axvline(mean, color="k", label="exact mean, and sd")
    left.axvspan(mean - sd, mean + sd, color="k", alpha=0.1, lw=0)
    left.set(title="tau, the scale of the groups", xlabel="tau", yticks=[])
    left.legend(fontsize=8)
    units = draws.values["u"].reshape(-1, GROUPS)
    order = np.argsort(units.mean(0))
    low, high = np.quantile(units[:, order], (0.05, 0.95), axis=0)
    place = np.arange(GROUPS)
    right.vlines(place, low, high, alpha=0.5, lw=1.2, label="90 % of the draws")
    right.plot(place, np.ravel(exact.mean["u"])[order], "k.", ms=3, label="exact mean")
    right.set(title=f"u of {GROUPS} groups, in order", xlabel="group")
    right.legend(fontsize=8)
    figure.savefig(HERE / "images" / "structure.png", dpi=120)


if __name__ == "__main__":
    main()
