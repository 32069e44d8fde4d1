"""Draws of a fit on top of those of Markov chains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from flowvi.compat import arviz_stats
from flowvi.draws.draws import EXPECTED, Draws
from flowvi.draws.scalars import recommended
from flowvi.draws.selection import first_scalars
from flowvi.plots.marginals import plot_marginals
from flowvi.plots.pair import scalars
from flowvi.runtime.arguments import check_type, refuse_fit

PANELS = 9


def plot_compare(
    draws: Draws, mcmc: Draws, names: Sequence[str] | None = None, columns: int = 3
) -> np.ndarray:
    """Marginals of a fit and of Markov chains on top of each other, with their differences.

    Each panel says by how many standard deviations the means differ, with the Monte Carlo error
    of this number, and the ratio of the standard deviations. The draws of the fit are those that
    its verdict recommends.

    Args:
        draws: Draws of a fit.
        mcmc: Draws of the same model by `flowvi.nuts(target)` or `flowvi.neutra(fit)`.
        names: What to show, as in `plot_pair`; the first nine scalars by default.
        columns: Panels side by side.

    Returns:
        Axes, (rows, columns); those of empty panels are switched off.

    Raises:
        ValueError: The second set is not of Markov chains, or is of a model with other values.
    """
    for one in (draws, mcmc):
        refuse_fit("plot_compare", one)
        check_type("draws", one, Draws, EXPECTED)
    if not mcmc.mcmc:
        raise ValueError(
            "mcmc must be draws of Markov chains, from flowvi.nuts(target) or flowvi.neutra(fit)."
        )
    lacking = [name for name in draws.values if name not in mcmc.values]
    if lacking:
        raise ValueError(
            f"'{lacking[0]}' is among the draws of the fit and not of the chains: both must be of "
            "the same model."
        )
    kept, word = recommended(draws)
    chosen = names or [one.label for one in islice(first_scalars(kept), PANELS)]
    label = {"plain": "fit", "resampled": "fit, resampled"}.get(word, "fit, not trusted")
    axes = plot_marginals({"NUTS": mcmc, label: kept}, chosen, columns)
    ours, theirs = scalars(kept, chosen), scalars(mcmc, chosen)
    for ax, name in zip(axes.flat, ours, strict=False):
        ax.set_title(f"{name}\n{_difference(ours[name], theirs[name], mcmc)}", fontsize=8)
    return axes


def _difference(x: np.ndarray, chains: np.ndarray, mcmc: Draws) -> str:
    """The difference of the means in sds of the chains, and the ratio of the sds, in words."""
    sd = chains.std()
    if not sd > 0:
        return ""
    ess = arviz_stats.ess(chains.reshape(mcmc.log_p.shape), "mean")
    error = np.sqrt(1 / ess + x.var() / sd**2 / len(x))
    apart = (x.mean() - chains.mean()) / sd
    return f"mean {apart:+.2f} ± {error:.2f} sd, sd × {x.std() / sd:.2f}"
