"""The evidence of a model, from draws or from a saved table of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowvi import diagnostics
from flowvi.diagnostics import LADDER, VERDICTS, Evidence
from flowvi.draws import Draws, check_proper, diagnose

if TYPE_CHECKING:
    import arviz as az


def evidence(
    draws: Draws | az.InferenceData,
    mcmc: Draws | az.InferenceData | None = None,
    particles: Sequence[int] = LADDER,
) -> Evidence:
    """Estimate the log evidence, bound it, and say whether to believe the estimate.

    Args:
        draws: Draws of a fit, or what `to_inference_data` made of them.
        mcmc: Draws of the posterior from `neutra`, for an upper bound.
        particles: Numbers of particles K of the lower bounds.

    Raises:
        ValueError: A prior is improper, so that there is no evidence; or the
            draws carry no weights.
    """
    table = _read(draws)
    check_proper(table.improper)
    if table.kind != "guide":
        raise ValueError(
            f"The evidence comes from the weights of a guide's draws; these are {table.kind} draws, "
            "which have none. Pass the draws of the fit: fit.draw(4000), or posterior.nc."
        )
    doubts, above = list(table.missed), None
    if mcmc is not None:
        posterior = _read(mcmc)
        if posterior.kind != "MCMC":
            raise ValueError(
                "mcmc must be draws of the posterior from neutra(fit); these are "
                f"{posterior.kind} draws."
            )
        above = posterior.log_weights
        if posterior.verdict != VERDICTS[0]:
            notes = [f"The MCMC draws are not trusted, hence neither is the upper bound."]
            return diagnostics.evidence(
                table.log_weights, above, particles=particles, doubts=doubts, notes=notes,
                title=table.title,
            )
    return diagnostics.evidence(
        table.log_weights, above, particles=particles, doubts=doubts, title=table.title
    )


class _Table(NamedTuple):
    """What the evidence needs of draws: their log p - log q, and where they come from."""

    kind: str
    log_weights: np.ndarray
    improper: Sequence[str]
    missed: Sequence[str]
    verdict: str
    title: str
