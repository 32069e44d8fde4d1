"""ArviZ's statistics in its versions, whose names and arguments differ from 0.23 to 1.0."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.compat.arviz_groups import has_trees
from flowvi.compat.arviz_module import import_arviz

if TYPE_CHECKING:
    import arviz as az

TAILS = (0.05, 0.95)
# Probability of the highest-density interval of a summary.
HDI_PROBABILITY = 0.94


def rhat(chains: np.ndarray) -> float:
    """Rank-normalised split R-hat of one number, (chain, draw)."""
    return float(import_arviz().rhat(chains))


def ess(chains: np.ndarray, method: str) -> float:
    """Effective number of draws of one number, (chain, draw); the method is ArviZ's."""
    # ArviZ 1 has no default for the tails of an array.
    tails = {"prob": TAILS} if method == "tail" else {}
    return float(import_arviz().ess(chains, method=method, **tails))


def loo_record(idata: az.InferenceData, name: str, fields: dict[str, Any] | None = None) -> Any:
    """ArviZ's record of LOO, pointwise; given fields replace those of the record.

    Args:
        idata: Groups with the log likelihood.
        name: The observed site.
        fields: Values by the field names of ArviZ 0.23.
    """
    arviz = import_arviz()
    if fields is None:
        return arviz.loo(idata, var_name=name, pointwise=True)
    with warnings.catch_warnings():
        # About draws that are not corrected yet, or what was said already.
        warnings.simplefilter("ignore")
        if has_trees():
            # ArviZ 1 makes the same correction itself, but to the number of parameters.
            stats = idata["sample_stats"]
            given = {"log_p": stats["log_p"], "log_q": stats["log_q"], "var_name": name}
            record = arviz.loo_approximate_posterior(idata, pointwise=True, **given)
            record.p = fields["p_loo"]
            return record
        record = arviz.loo(idata, var_name=name, pointwise=True, reff=1.0, scale="log")
    for key, value in fields.items():
        record[key] = value
    return record
