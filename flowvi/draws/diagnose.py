"""The verdict on a table of draws, and bounds on the evidence."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowvi import diagnostics
from flowvi.diagnostics import Bounds, Check, Diagnosis, Estimate, Where
from flowvi.draws.draws import EXPECTED, Draws, checked, weights_of
from flowvi.runtime.arguments import check_type, refuse_fit
from flowvi.targets import Target, outside


def diagnose(draws: Draws | ArrayLike) -> Diagnosis:
    """Judge whether draws can be trusted; with a row axis, also the draws of each row.

    Args:
        draws: Draws of a fit, or log weights as an array, (draw) or (chain, draw).
            Resampled draws return the diagnosis of the original ones.
    """
    refuse_fit("diagnose", draws)
    if not isinstance(draws, Draws):
        return diagnostics.diagnose(as_weights(draws))
    if draws.diagnosis is not None:
        return draws.diagnosis
    if draws.mcmc:
        return _of_chains(draws)
    if draws.by_row:
        return diagnostics.diagnose_rows(
            draws.log_weights,
            named_values(draws),
            [str(label) for label in draws.labels],
            draws.title,
            draws.meta.get("missed", ()),
            axes_of(draws, rows=False),
            draws.meta.get("failures", ()),
            draws.improper,
        )
    diagnosis = diagnostics.diagnose(
        draws.log_weights,
        named_values(draws),
        draws.improper,
        draws.title,
        draws.meta.get("missed", ()),
        axes_of(draws),
        checked(draws.meta),
        draws.meta.get("failures", ()),
        _zero_density_reason(draws),
    )
    more = (*draws.meta.get("reasons", ()), *draws.meta.get("copies", ()))
    diagnosis = replace(diagnosis, reasons=(*diagnosis.reasons, *more))
    if "bridge" in draws.meta and not draws.improper:
        weights = Estimate(diagnosis.log_evidence, diagnosis.log_evidence_se)
        best = diagnostics.with_bridge(weights, Estimate(*draws.meta["bridge"]))
        diagnosis = replace(diagnosis, log_evidence=best.value, log_evidence_se=best.se)
    if len(draws.z) == 1:
        return diagnosis
    found = diagnostics.distances(draws.z)
    apart = tuple(finding.reason for finding in diagnostics.distant_restarts(found))
    matrix = tuple(tuple(row) for row in found.matrix.round(6).tolist())
    return replace(diagnosis, reasons=(*diagnosis.reasons, *apart), distances=matrix)


def _zero_density_reason(draws: Draws) -> str:
    """Reason why some draws have density zero; empty if there are none, or no model."""
    inside = np.isfinite(draws.log_p)
    if inside.all() or not inside.any() or not isinstance(draws.target, Target):
        return ""
    pieces = (draws.z[~inside][: outside.TRIED], draws.z[inside][:1])
    z, good = (torch.as_tensor(x, device=draws.target.device) for x in pieces)
    return outside.explain_zero_density(draws.target, z, good)


def where(draws: Draws) -> Where:
    """Locate the heaviest weights in the space of parameters, and among the rows.

    Args:
        draws: Draws of a fit, not resampled.
    """
    refuse_fit("where", draws)
    check_type("draws", draws, Draws, EXPECTED)
    return diagnostics.where(weights_of("where", draws), named_values(draws), axes_of(draws))


def named_values(draws: Draws) -> dict[str, np.ndarray]:
    """All values, and the unconstrained coordinates of each site."""
    return {**draws.values, **coordinates(draws)}


def axes_of(draws: Draws, rows: bool = True) -> dict[str, list[Sequence[Any] | None]]:
    """The user's labels of every axis of `named_values`; None for an axis without labels.

    Args:
        draws: The draws.
        rows: Whether to include the row axis.
    """
    coords = draws.coords
    lead: list[Sequence[Any] | None] = [coords.get(draws.plate)] if draws.by_row and rows else []
    axes: dict[str, list[Sequence[Any] | None]] = {
        name: [*lead, *(coords.get(dim) for dim in own)] for name, own in draws.target.dims.items()
    }
    # For a vector in R^n the coordinates are its elements.
    flat = {
        f"unconstrained {name}": labels
        for name, labels in axes.items()
        if len(labels) == len(lead) + 1
    }
    alone = {f"unconstrained {name}": lead for name in axes if lead}
    return axes | alone | flat


def bounds(draws: Draws | ArrayLike, particles: Sequence[int] = (1, 10, 100, 1000)) -> Bounds:
    """Importance-weighted bounds on the log evidence, with standard errors.

    Args:
        draws: Draws of a fit, or log weights as an array. With a row axis, the bounds are
            on the evidence of all rows, and `rows` holds those of each row.
        particles: Numbers of particles K. With fewer draws than K the bound is NaN.
    """
    refuse_fit("bounds", draws)
    if isinstance(draws, Draws):
        check_proper(draws.improper)
        draws = draws.weighted or draws
    particles = particles if isinstance(particles, Iterable) else [particles]
    log_weights = weights_of("bounds", draws) if isinstance(draws, Draws) else as_weights(draws)
    if isinstance(draws, Draws) and draws.by_row:
        diagnostics.check_weights(log_weights)
        flat = log_weights.reshape(len(draws), -1)
        return diagnostics.iw_bounds_of_rows(flat, particles)
    return diagnostics.iw_bounds(diagnostics.as_chains(log_weights).ravel(), particles)


def as_weights(given: ArrayLike) -> np.ndarray:
    """Convert log weights to an array."""
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"draws must be {EXPECTED}, or an array of log weights; got a {type(given).__name__}."
        ) from None


def check_proper(improper: Sequence[str]) -> None:
    """Raise a ValueError if a prior is improper, because there is no evidence then."""
    if improper:
        names = ", ".join(f"'{name}'" for name in improper)
        raise ValueError(
            f"The prior of {names} is improper, so there is no evidence to bound. Compare guides "
            "by diagnose(draws).elbo, or give a proper prior."
        )


def _of_chains(draws: Draws) -> Diagnosis:
    """The verdict on MCMC draws, from every coordinate, the log density and deterministics."""
    named = {name: draws[name] for name in draws.target.deterministics}
    diagnosis = diagnostics.diagnose_chains(
        {**coordinates(draws), "log p": draws.log_p, **named},
        draws.stats["diverging"],
        draws.title,
        draws.meta.get("missed", ()),
        axes_of(draws),
    )
    check = checked(draws.meta)
    if check is not None and len(draws) < check.draws:
        diagnosis = _part_of_chains(diagnosis, check, len(draws.z), draws.meta.get("missed", ()))
    if draws.weighted is None:
        return diagnosis
    trusted = diagnosis.verdict == diagnostics.VERDICTS[0]
    weights = draws.weighted.log_weights
    found = diagnostics.evidence(weights, draws.log_p - draws.log_q, trusted=trusted)
    proper = not draws.improper
    return replace(
        diagnosis,
        khat=found.khat,
        khat_threshold=found.khat_threshold,
        elbo=found.bounds[0].bound,
        elbo_se=found.bounds[0].se,
        gap=found.log_evidence - found.bounds[0].bound,
        gap_se=found.log_evidence_se,
        log_evidence=found.log_evidence if proper else math.nan,
        log_evidence_se=found.log_evidence_se if proper else math.nan,
    )


def _part_of_chains(
    diagnosis: Diagnosis, check: Check, chains: int, missed: Sequence[str]
) -> Diagnosis:
    """The verdict on some draws of Markov chains whose full set was checked."""
    reason = (
        f"These are {diagnosis.draws} of {check.draws} draws of Markov chains, which were judged "
        f"as a whole: {check.verdict}. Draw more for all of them: "
        f"fit.draw({check.draws // chains})."
    )
    verdict = diagnostics.VERDICTS[-1] if missed else check.verdict
    return replace(diagnosis, verdict=verdict, reasons=(*missed, reason))


def coordinates(draws: Draws) -> dict[str, np.ndarray]:
    """The unconstrained coordinates of each site, which have moments even for heavy tails."""
    columns = {name: draws.z[..., part] for name, part in draws.target.slices.items()}
    return {
        f"unconstrained {name}": z[..., 0] if z.shape[-1] == 1 else z for name, z in columns.items()
    }
