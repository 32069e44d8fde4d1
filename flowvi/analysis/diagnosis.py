"""The verdict on draws, with the second opinion of short chains where it is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws import diagnose as by_weights
from flowvi.draws.draws import EXPECTED, Draws
from flowvi.runtime.arguments import check_integer, check_type, suggest_spelling
from flowvi.samplers.short_chains import second_opinion
from flowvi.targets import Target


@suggest_spelling
def diagnose(draws: Draws | ArrayLike, chains: bool = False, seed: int = 0) -> Diagnosis:
    """Judge whether draws can be trusted; with a row axis, also the draws of each row.

    With chains=True, some hundreds of short Markov chains start at the draws, resampled ones
    where the weights say so. They leave the posterior unchanged: if an average drifts, the draws
    are off by at least that much, and not to be trusted. Chains see a guide that is too narrow or
    shifted, and tails that it leaves out; they do not see a mode that no draw visits.

    Args:
        draws: Draws of a fit, or log weights as an array, (draw) or (chain, draw).
            Resampled draws return the diagnosis of the original ones.
        chains: Whether to ask short chains too. A default fit has asked them; its draws have what
            they said among the reasons.
        seed: Seed of the chains; the global generators are not changed.

    Raises:
        ValueError: The draws are not those of a guide of one vector, so that no chains can start.

    References:
        Wang, Kasprzak and Huggins (2023), "A Targeted Accuracy Diagnostic for Variational
        Approximations", arXiv:2302.12419.
    """
    check_integer("seed", seed, 0)
    check_type("chains", chains, bool, "True or False: the number of short chains is fixed")
    found = by_weights.diagnose(draws)
    if not chains:
        return found
    check_type("draws", draws, Draws, f"{EXPECTED}, for chains to start at")
    assert isinstance(draws, Draws)
    _check_start(draws)
    said = second_opinion(draws, draws.guide, found.verdict == VERDICTS[1], seed)
    # What the fit's own chains said is replaced.
    before = {*draws.meta.get("reasons", ())}
    reasons = [reason for reason in found.reasons if reason not in before]
    if said.drifts:
        return replace(found, verdict=VERDICTS[-1], reasons=(said.reason, *reasons))
    return replace(found, reasons=(*reasons, said.reason))


def _check_start(draws: Draws) -> None:
    """Refuse draws at which no chains can start."""
    why = ""
    if draws.mcmc:
        why = "these are of Markov chains already: diagnose(draws) judges them"
    elif draws.resampled:
        why = "these were resampled: pass those of the fit, fit.draw(4000)"
    elif draws.by_row or not isinstance(draws.target, Target):
        why = "these have a vector of latents for each row"
    elif not np.isfinite(draws.log_p).any():
        why = "at none of these is the density finite"
    if why:
        raise ValueError(f"chains=True starts chains at draws of a guide, but {why}.")
