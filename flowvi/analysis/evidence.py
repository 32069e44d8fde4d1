"""Estimate the evidence of a model from draws or from a saved table of draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowvi import diagnostics
from flowvi.compat.arviz_groups import has_group
from flowvi.diagnostics import LADDER, VERDICTS, Estimate, Evidence
from flowvi.draws.diagnose import check_proper, diagnose
from flowvi.draws.draws import Draws
from flowvi.interop.read_draws import joined
from flowvi.runtime.arguments import refuse_fit

if TYPE_CHECKING:
    import arviz as az

TRUST = VERDICTS[0]
MISSING = (
    "There is no log_p and log_q in sample_stats: flowvi.to_inference_data writes them. Other "
    "libraries' draws have no weights, hence no evidence."
)


def evidence(
    draws: Draws | az.InferenceData,
    mcmc: Draws | az.InferenceData | None = None,
    particles: Sequence[int] = LADDER,
) -> Evidence:
    """Estimate and bound the log evidence, and judge the estimate.

    For draws with a row axis, `rows` holds the evidence of each row, and all numbers are sums
    over rows. Trained parameters of the model count as constants.

    Args:
        draws: Draws of a fit, or a result of `to_inference_data`. If a fit ended with Markov
            chains, the draws of its guide and of the chains are both used.
        mcmc: Draws of the posterior from `neutra`, for an upper bound.
        particles: Numbers of particles K of the lower bounds.

    Raises:
        ValueError: A prior is improper, so that there is no evidence; or the
            draws have no weights.
    """
    for given in (draws, mcmc):
        refuse_fit("evidence", given)
    if isinstance(draws, Draws) and draws.weighted is not None and mcmc is None:
        draws, mcmc = draws.weighted, draws
    table = _read(draws)
    check_proper(table.improper)
    if table.kind != "guide":
        raise ValueError(
            f"evidence needs weights, and got {table.kind} draws, which have no weights: pass "
            "those of the fit, fit.draw(4000), or posterior.nc."
        )
    if table.rows:
        if mcmc is not None:
            raise ValueError(
                "evidence of draws with rows takes no mcmc: there are no Markov chains for rows, "
                "and evidence(draws) has the evidence of each row by its weights."
            )
        return diagnostics.evidence_of_rows(
            table.log_weights,
            table.rows,
            particles=particles,
            doubts=table.missed,
            title=table.title,
        )
    above: np.ndarray | None = None
    trusted = True
    if mcmc is not None:
        posterior = _read(mcmc)
        if posterior.kind != "MCMC":
            raise ValueError(
                "mcmc must be draws of the posterior, from neutra(fit); these are "
                f"{posterior.kind} draws."
            )
        if np.isnan(posterior.log_weights).all():
            raise ValueError(
                "mcmc has no density of the guide at its draws, as those of nuts(target): pass "
                "draws of neutra(fit), which have it."
            )
        above, trusted = posterior.log_weights, posterior.verdict == TRUST
    return diagnostics.evidence(
        table.log_weights,
        above,
        trusted=trusted,
        short=None if table.bridge is None else Estimate(*table.bridge),
        particles=particles,
        doubts=table.missed,
        title=table.title,
    )


class _Table(NamedTuple):
    """Log weights of draws, with the facts on their origin that the evidence needs."""

    kind: str
    log_weights: np.ndarray
    improper: Sequence[str]
    missed: Sequence[str]
    verdict: str
    title: str
    rows: Sequence[str] = ()
    bridge: Sequence[float] | None = None


def _read(source: Draws | az.InferenceData) -> _Table:
    if isinstance(source, Draws):
        meta = source.meta
        kind = "MCMC" if source.mcmc else "resampled" if source.resampled else "guide"
        weights, title = source.log_p - source.log_q, source.title
        verdict = diagnose(source).verdict if source.mcmc else ""
        rows = [str(label) for label in source.labels]
        known = (source.improper, meta.get("missed", ()), verdict, title, rows)
        return _Table(kind, weights, *known, meta.get("bridge"))
    stats = _stats(source)
    facts: Mapping[str, Any] = stats.attrs
    kind = "MCMC" if "mcmc" in facts else "resampled" if "log_weight" not in stats else "guide"
    weights = joined(stats["log_p"].values - stats["log_q"].values, int(facts.get("split", 1)))
    missed: list[str] = json.loads(facts.get("missed", "[]"))
    improper: list[str] = json.loads(facts.get("improper", "[]"))
    # Files of the first versions list no improper sites, but their evidence is NaN.
    if not improper and kind == "guide" and np.isnan(facts.get("log_evidence", 0.0)):
        improper = ["a latent site"]
    title = facts.get("title", "") or facts.get("model", "")
    rows = []
    if weights.ndim > 2:
        dim = stats["log_p"].dims[-1]
        rows = [str(label) for label in stats[dim].values]
    bridge = json.loads(facts["bridge"]) if "bridge" in facts else None
    verdict = facts.get("verdict", "")
    return _Table(kind, weights, improper, missed, verdict, title, rows, bridge)


def _stats(source: az.InferenceData) -> Any:
    """The group with log_p and log_q."""
    if not has_group(source, "sample_stats"):
        raise ValueError(MISSING)
    stats = source["sample_stats"]
    if "log_p" not in stats or "log_q" not in stats:
        raise ValueError(MISSING)
    return stats
