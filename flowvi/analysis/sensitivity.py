"""Sensitivity of posteriors to their prior and their likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowvi.compat.arviz_groups import has_group
from flowvi.diagnostics import VERDICTS
from flowvi.diagnostics.importance import MIN_DRAWS, khat_threshold
from flowvi.diagnostics.power_scaling import (
    LIKELIHOOD,
    LIMIT,
    POWERS,
    PRIOR,
    Sensitivity,
    power_scaling,
    sensitivities,
)
from flowvi.draws.draws import EXPECTED, Draws
from flowvi.draws.scalars import every_scalar, recommended
from flowvi.interop.inference_data import log_terms
from flowvi.interop.read_draws import diagnosis_of, draws_of, joined, resample_groups
from flowvi.runtime.arguments import check_choice, check_type, refuse_fit

if TYPE_CHECKING:
    import arviz as az

ROWS = (
    "sensitivity scales the prior of latents that all rows share, and got {}: fit the model "
    "without local= to see what its priors do."
)


def sensitivity(
    draws: Draws | az.InferenceData,
    *,
    prior: Sequence[str] | None = None,
    var_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Sensitivity:
    r"""How much each scalar depends on the prior and on the likelihood, without another fit.

    Draws are reweighted to posteriors with a power of the prior, or of the likelihood, a little
    below and above one. The sensitivity is the change of each marginal. Where it is at least 0.05
    for the prior alone, the prior dominates; where it is for both, prior and data disagree. The
    draws are those that the verdict recommends.

    In a hierarchy, scale the priors of the shared latents only, as in ``prior=["mu", "tau"]``:
    the distribution of the groups is a part of the model more than a prior.

    Args:
        draws: Draws of a fit to a Pyro model, or a result of `to_inference_data`.
        prior: Latent sites whose prior is scaled; all of them by default.
        var_names: Values to report; all by default.
        seed: Seed of the resampling, where the verdict recommends it.

    Raises:
        ValueError: The draws have no prior and likelihood of their own, as those of a plain
            density, or are fewer than 100.

    References:
        Kallioinen, Paananen, Buerkner and Vehtari (2024), "Detecting and diagnosing prior and
        likelihood sensitivity with power-scaling", Statistics and Computing 34, arXiv:2107.14054.
    """
    refuse_fit("sensitivity", draws)
    if isinstance(draws, Draws):
        if draws.by_row or "inner" in draws.meta:
            what = "draws with latents for each row" if draws.by_row else "draws of a nested fit"
            raise ValueError(ROWS.format(what))
        kept, word = recommended(draws, seed)
        priors, likelihood = log_terms(kept)
        verdict = "" if word != "untrusted" else VERDICTS[2]
    else:
        check_type("draws", draws, object, EXPECTED)
        kept, priors, likelihood, verdict = _of_groups(draws, seed)
    if len(kept) < MIN_DRAWS:
        raise ValueError(
            f"sensitivity needs at least {MIN_DRAWS} draws; got {len(kept)}. Draw more, for "
            "example fit.draw(4000)."
        )
    if not priors or not likelihood:
        what = "prior" if not priors else "likelihood"
        raise ValueError(
            f"These draws have no log {what} of their own: sensitivity needs draws of a Pyro model "
            "with observed sites (from_pyro), whose prior and likelihood are known apart."
        )
    for name in prior or ():
        check_choice("prior", name, priors)
    scaled = {n: x for n, x in priors.items() if prior is None or n in prior}
    components = {PRIOR: _total(scaled), LIKELIHOOD: _total(likelihood)}
    scalings = {k: [power_scaling(x, a) for a in POWERS] for k, x in components.items()}
    for name in var_names or ():
        check_choice("var_names", name, kept.values)
    chosen = [
        one
        for one in every_scalar(kept)
        if (var_names is None or one.name in var_names)
        and np.isfinite(one.draws).all()
        and np.ptp(one.draws) > 0
    ]
    columns = [one.draws.astype(np.float64) for one in chosen]
    x = np.stack(columns, axis=1) if columns else np.zeros((len(kept), 0))
    doubts = ("The draws are not trusted: neither are these numbers.",) if verdict else ()
    return Sensitivity(
        tuple(one.label for one in chosen),
        sensitivities(x, scalings[PRIOR]),
        sensitivities(x, scalings[LIKELIHOOD]),
        {k: tuple(s.khat for s in found) for k, found in scalings.items()},
        khat_threshold(len(kept)),
        LIMIT,
        len(kept),
        kept.title,
        doubts,
        tuple(scaled),
    )


def _of_groups(
    idata: az.InferenceData, seed: int
) -> tuple[Draws, dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """The draws that the verdict of a file recommends, with both components."""
    found = diagnosis_of(idata) if has_group(idata, "posterior") else None
    verdict = "" if found is None else found.verdict
    weighted = has_group(idata, "sample_stats") and "log_weight" in idata["sample_stats"]
    if verdict == VERDICTS[1] and weighted:
        idata = resample_groups(idata, seed)
    kept = draws_of(idata)
    if kept.by_row:
        raise ValueError(ROWS.format("draws with latents for each row"))
    components = [
        {
            str(name): joined(value.values, kept.log_p.shape[0])
            for name, value in idata[group].data_vars.items()
        }
        if has_group(idata, group)
        else {}
        for group in ("log_prior", "log_likelihood")
    ]
    return kept, components[0], components[1], verdict if verdict == VERDICTS[2] else ""


def _total(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of all elements of each draw, (S)."""
    flat = [x.reshape(x.shape[0] * x.shape[1], -1).astype(np.float64) for x in arrays.values()]
    total: np.ndarray = np.concatenate(flat, axis=1).sum(1)
    return total
