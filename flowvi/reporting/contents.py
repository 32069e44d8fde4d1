"""Collect the contents of a report from a folder of results or from a fit."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.analysis.evidence import evidence
from flowvi.analysis.sensitivity import sensitivity
from flowvi.compat.arviz_groups import as_written, has_group, read_groups
from flowvi.diagnostics import VERDICTS, Diagnosis, Evidence
from flowvi.diagnostics.power_scaling import Sensitivity
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample
from flowvi.draws.scalars import Scalar
from flowvi.draws.selection import first_scalars, standardised
from flowvi.fitting.fit_folder import read_record
from flowvi.fitting.identity import latents
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.interop.inference_data import HIERARCHICAL, all_groups
from flowvi.interop.read_draws import diagnosis_of, draws_of, facts
from flowvi.runtime.files import CheckpointError

if TYPE_CHECKING:
    import arviz as az

GUIDE = "guide.nc"
PREDICTED = 200  # draws with simulated data
MOST_ROWS = 1000  # largest number of rows in a report
PRIOR = 1000  # draws from the prior
# Scalars that come first, and the largest number of those whose sensitivity is computed.
SCALARS, MOST_SCALED = 24, 1000
POSTERIOR, RESAMPLED = "posterior.nc", "resampled.nc"


@dataclass(frozen=True)
class Contents:
    """Contents of a report.

    Attributes:
        plain: Draws of the guide or the chains, in ArviZ's groups.
        kept: The draws that the verdict recommends.
        facts: Settings and data of the fit.
        diagnosis: The verdict; None with too few draws.
        weighted: Weighted draws of the guide, if there are any.
        evidence: Bounds and estimates; None if a prior is improper.
        history: Bound, restart and stage of each step.
        log: Decisions of the fit.
        sites: Latent sites: shape, support, columns.
        folder: Whether the draws are files in a folder of results.
        sensitivity: Sensitivity to the prior; None where it is not known.
    """

    plain: az.InferenceData
    kept: Draws
    facts: Mapping[str, Any]
    diagnosis: Diagnosis | None
    weighted: Draws | None
    evidence: Evidence | None
    history: Mapping[str, np.ndarray] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    sites: Mapping[str, Any] = field(default_factory=dict)
    folder: bool = False
    sensitivity: Sensitivity | None = None

    @property
    def prior(self) -> Draws | None:
        """Draws from the prior."""
        return draws_of(self.plain, "prior") if has_group(self.plain, "prior") else None

    @property
    def first(self) -> list[Scalar]:
        """The scalars that a reader wants to see first."""
        return list(islice(first_scalars(self.kept, self.sites), SCALARS))

    @property
    def kind(self) -> str:
        """Name of the kind of draws in the report."""
        if self.kept.mcmc:
            word = "draws of NUTS in the guide's space"
        else:
            word = "resampled draws" if self.kept.resampled else "draws of the guide"
        trusted = self.diagnosis is not None and self.diagnosis.verdict != VERDICTS[2]
        return word if trusted else f"{word}, which are not to be trusted"

    @property
    def start(self) -> Draws | None:
        """Draws of the initial Gaussian of the fit."""
        if not has_group(self.plain, "gaussian_start"):
            return None
        return draws_of(self.plain, "gaussian_start")


def of_folder(folder: Path) -> Contents:
    """Read a folder that `flowvi fit` wrote, without the model file.

    Raises:
        ValueError: The folder holds no results.
    """
    if not (folder / POSTERIOR).is_file():
        raise ValueError(f"There is no {folder / POSTERIOR}; name a folder that flowvi fit wrote.")
    with as_written(folder):
        return _read(folder)


def _read(folder: Path) -> Contents:
    plain = read_groups(folder / POSTERIOR)
    diagnosis = diagnosis_of(plain)
    kept = plain
    if (folder / RESAMPLED).is_file() and diagnosis and diagnosis.verdict == VERDICTS[1]:
        kept = read_groups(folder / RESAMPLED)
    guide = read_groups(folder / GUIDE) if (folder / GUIDE).is_file() else None
    try:
        record = read_record(folder / "fit")
    except (CheckpointError, OSError):
        record = ({}, {}, (), {})
    known, history, log, sites = record
    weighted = _weighted(guide or plain)
    table = draws_of(kept)
    return Contents(
        plain,
        table,
        {**known, **facts(plain)},
        diagnosis,
        weighted,
        _evidence(guide or plain, plain if guide else None),
        history,
        log,
        sites,
        folder=True,
        sensitivity=_sensitivity(plain, sites),
    )


def of_fit(fit: Fit | RowFit | NestedFit, n: int, seed: int) -> Contents:
    """Draw from a fit, and collect the contents of a report.

    A report on latents of rows covers at most 1,000 rows, evenly spaced. One on a structured fit
    of over 10,000 latents has fewer draws.
    """
    if isinstance(fit, StructuredFit):
        n = min(n, fit.most_draws)
    if isinstance(fit, RowFit):
        shown = min(fit.target.rows, MOST_ROWS)
        places = np.linspace(0, fit.target.rows - 1, shown).astype(int)
        draws = fit.draw(n, rows=[*map(int, places)], seed=seed)
    else:
        draws = fit.draw(n, seed=seed)
    diagnosis = diagnose(draws)
    kept = resample(draws, seed=seed) if diagnosis.verdict == VERDICTS[1] else draws
    begun = isinstance(fit, Fit) and fit.start is not None
    start = fit.draw_start(n, seed) if isinstance(fit, Fit) and begun else None
    plain = all_groups(draws, start, PREDICTED, PRIOR)
    found = None if draws.improper else evidence(draws)
    return Contents(
        plain,
        kept,
        facts(plain),
        diagnosis,
        draws.weighted or draws,
        found,
        fit.history,
        tuple(fit.log),
        latents(draws.target),
        sensitivity=_sensitivity(plain, latents(draws.target)),
    )


def _sensitivity(idata: az.InferenceData, sites: Collection[str]) -> Sensitivity | None:
    """Sensitivity to the prior, where prior and likelihood are known and there are not too many.

    The priors of standardised latents, and those that depend on other latents, such as the
    distribution of the groups of a hierarchy, are a part of the model more than a prior.
    """
    scalars = sum(v[0, 0].size for v in idata["posterior"].data_vars.values())
    if scalars > MOST_SCALED or not has_group(idata, "log_prior"):
        return None
    draws, known = draws_of(idata), list(idata["log_prior"].data_vars)
    folded = standardised(draws, sites)
    parts = {*json.loads(idata["log_prior"].attrs.get(HIERARCHICAL, "[]")), *folded}
    prior = [str(name) for name in known if name not in parts]
    shown = {one.label for one in first_scalars(draws, sites)}
    try:
        return sensitivity(idata, prior=prior or None).only(shown)
    except ValueError:
        return None


def _weighted(idata: az.InferenceData) -> Draws | None:
    return draws_of(idata) if "log_weight" in idata["sample_stats"] else None


def _evidence(guide: az.InferenceData, mcmc: az.InferenceData | None) -> Evidence | None:
    try:
        return evidence(guide, mcmc)
    except ValueError:
        return None
