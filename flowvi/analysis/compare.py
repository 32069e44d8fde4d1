"""Compare models by their evidence and by leave-one-out prediction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowvi.analysis.evidence import evidence
from flowvi.analysis.loo import loo
from flowvi.compat.arviz_groups import has_group
from flowvi.compat.arviz_module import import_arviz
from flowvi.diagnostics import VERDICTS
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.interop.inference_data import to_inference_data
from flowvi.runtime.arguments import check_type, refuse_fit, suggest_spelling
from flowvi.runtime.display import Displayed
from flowvi.targets import NOWHERE

if TYPE_CHECKING:
    import arviz as az
    import pandas as pd

TRUST, _, DISTRUST = VERDICTS
TRAINED = (
    "Parameters of the model were trained, not integrated out: a model with more of them has a "
    "larger evidence. Compare the models on held-out rows, fit.draw(4000, data=rows)."
)


@dataclass(frozen=True)
class Model:
    """One model in a comparison.

    Attributes:
        name: Name given by the caller.
        log_evidence, log_evidence_se: Log evidence and its error; NaN if undefined.
        difference, difference_se: Difference to the largest log evidence. The models' errors are
            independent, so their variances add. For two models with latents for each row, the
            sum of the differences over rows, and its error over rows.
        probability: Posterior probability among the models with an evidence, for equal prior
            probabilities.
        note: Reason for a missing or unreliable evidence.
    """

    name: str
    log_evidence: float
    log_evidence_se: float
    difference: float
    difference_se: float
    probability: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class ModelComparison(Displayed):
    """Models by log evidence, the largest first, and by leave-one-out prediction.

    Attributes:
        models: One row for each model; those without an evidence at the end.
        loo: Result of `az.compare` on the pointwise log likelihoods; None
            without at least two models that have them.
        notes: Remarks on the draws used for `loo`.
    """

    models: tuple[Model, ...]
    loo: pd.DataFrame | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(m.name) for m in self.models)
        lines = [
            self._best(),
            f"  {'':<{width}} {'log evidence':>20} {'difference':>18} {'prob.':>7}",
        ]
        lines += [f"  {m.name:<{width}} {_cells(m)}".rstrip() for m in self.models]
        lines += [f"  - {m.name}: {m.note}" for m in self.models if m.note]
        if self.loo is not None:
            lines += ["By leave-one-out prediction:", self.loo.to_string()]
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])

    def _best(self) -> str:
        first = self.models[0]
        if math.isnan(first.log_evidence):
            return "No model has an evidence."
        judged = "" if not any(m.note for m in self.models) else "; read the notes"
        return f"Largest evidence: {first.name}, probability {first.probability:.3g}{judged}"


@suggest_spelling
def compare(
    models: Mapping[str, Draws | az.InferenceData], *, var_name: str | None = None
) -> ModelComparison:
    """Compare models of the same data.

    The evidence is estimated from the weights of each fit's draws, with equal prior
    probabilities of the models; for draws with a row axis, on the same rows. Leave-one-out
    prediction is corrected for the approximation (`flowvi.loo`), and needs the log likelihood
    of every observation.

    Args:
        models: Mapping from names to draws of a fit, or to results of `to_inference_data`.
        var_name: The observed site to predict, for models with several.

    Raises:
        ValueError: Fewer than two models, or models of different data.
    """
    check_type("models", models, Mapping, "a dictionary of draws by name")
    if len(models) < 2:
        raise ValueError(
            f"A comparison needs at least two models; got {', '.join(models) or 'none'}."
        )
    for source in models.values():
        refuse_fit("compare", source)
    groups = {name: _groups(source) for name, source in models.items()}
    _check_data(groups)
    found = {name: _evidence(source) for name, source in models.items()}
    known = {name: e for name, e in found.items() if not math.isnan(e.value)}
    rows = [_row(name, known, found[name]) for name in found]
    rows.sort(key=lambda m: (math.isnan(m.log_evidence), -m.log_evidence))
    able = {
        name: idata
        for name, idata in groups.items()
        if has_group(idata, "log_likelihood") and found[name].rows is None
    }
    notes = [note for name, source in models.items() if (note := _untrusted(name, source))]
    return ModelComparison(tuple(rows), _loo(able, var_name), tuple(notes))


class _Found(NamedTuple):
    """Log evidence of a model with a note on its reliability, and of its rows, (R)."""

    value: float
    se: float
    note: str
    rows: np.ndarray | None = None


def _evidence(source: Draws | az.InferenceData) -> _Found:
    try:
        found = evidence(source, particles=(1,))
    except ValueError as error:
        return _Found(math.nan, math.nan, str(error))
    note = "" if found.reliable else found.reasons[0]
    if found.rows is None:
        return _Found(found.log_evidence, found.log_evidence_se, note)
    if not note and isinstance(source, Draws) and _trained(source):
        note = TRAINED
    return _Found(found.log_evidence, found.log_evidence_se, note, found.rows.log_evidence)


def _trained(draws: Draws) -> bool:
    """Whether the model has parameters that were trained on these rows."""
    fitted = draws.batch is not None and bool((draws.batch.places != NOWHERE).all())
    return fitted and next(draws.target.parameters(), None) is not None


def _row(name: str, known: Mapping[str, _Found], own: _Found) -> Model:
    if math.isnan(own.value):
        return Model(name, own.value, own.se, math.nan, math.nan, math.nan, own.note)
    best = max(known.values(), key=lambda other: other.value)
    values = np.array([e.value for e in known.values()])
    share = float(np.exp(own.value - np.logaddexp.reduce(values)))
    error = 0.0 if own is best else math.hypot(own.se, best.se)
    if own is not best and own.rows is not None and best.rows is not None:
        apart = own.rows - best.rows
        error = float(apart.std(ddof=1) * len(apart) ** 0.5) if len(apart) > 1 else math.nan
    return Model(name, own.value, own.se, own.value - best.value, error, share, own.note)


def _groups(source: Draws | az.InferenceData) -> az.InferenceData:
    if not isinstance(source, Draws):
        return source
    return to_inference_data(source, log_likelihood=not source.by_row)


def _untrusted(name: str, source: Draws | az.InferenceData) -> str:
    if isinstance(source, Draws):
        verdict = diagnose(source).verdict
    else:
        verdict = source["posterior"].attrs.get("verdict", TRUST)
    return f"{name}: the draws behind LOO are not trusted." if verdict == DISTRUST else ""


def _check_data(groups: Mapping[str, az.InferenceData]) -> None:
    """Raise a ValueError if the observed values of the models differ, in total or by row."""
    by_row = [name for name, idata in groups.items() if _by_row(idata)]
    _check_same({name: _observed(idata, False) for name, idata in groups.items()}, "data")
    _check_same(
        {name: _observed(groups[name], True) for name in by_row}, "rows, or in another order"
    )


def _by_row(idata: az.InferenceData) -> bool:
    stats = idata["sample_stats"] if has_group(idata, "sample_stats") else {}
    return "log_p" in stats and stats["log_p"].ndim > 2


def _observed(idata: az.InferenceData, rows: bool) -> np.ndarray | None:
    """Sorted observed values, in total or of each row; None without data."""
    if not has_group(idata, "observed_data"):
        return None
    arrays = [v.values for v in idata["observed_data"].data_vars.values()]
    flat = [a.reshape(len(a) if rows else 1, -1).astype(np.float64) for a in arrays]
    return np.sort(np.concatenate(flat, axis=1), axis=1)


def _check_same(observed: Mapping[str, np.ndarray | None], what: str) -> None:
    seen = {name: values for name, values in observed.items() if values is not None}
    first = next(iter(seen), "")
    for name, values in seen.items():
        same = values.shape == seen[first].shape and np.allclose(
            values, seen[first], rtol=1e-5, equal_nan=True
        )
        if not same:
            raise ValueError(
                f"'{first}' and '{name}' were fitted to different {what}: evidences and "
                "predictions can be compared for the same observed values only, in the same units."
            )


def _loo(able: Mapping[str, az.InferenceData], var_name: str | None) -> pd.DataFrame | None:
    if len(able) < 2:
        return None
    for name, idata in able.items():
        sites = [str(site) for site in idata["log_likelihood"].data_vars]
        if var_name is None and len(sites) > 1:
            raise ValueError(
                f"'{name}' has several observed sites, {', '.join(sites)}: name the one to predict "
                "by var_name."
            )
    with warnings.catch_warnings(record=True) as said:
        # Warnings about ArviZ's use of pandas do not concern the caller.
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        found: dict[str, Any] = {}
        about: dict[str, type[Warning]] = {}
        for name, idata in able.items():
            found[name] = loo(idata, var_name)
            about |= {f"{name}: {one.message}": one.category for one in said}
            said.clear()
        table: pd.DataFrame = import_arviz().compare(found)
        about |= {str(one.message): one.category for one in said}
    for words, category in about.items():
        warnings.warn(words, category, stacklevel=3)
    return table


def _cells(m: Model) -> str:
    if math.isnan(m.log_evidence):
        return f"{'none':>20}"
    value = f"{m.log_evidence:.3f} +- {m.log_evidence_se:.2g}"
    difference = f"{m.difference:.3f} +- {m.difference_se:.2g}" if m.difference else "0"
    return f"{value:>20} {difference:>18} {m.probability:7.3g}"
