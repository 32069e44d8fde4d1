"""Leave-one-out prediction from draws of an approximation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.compat.arviz_groups import has_group, make_groups, to_dataset
from flowvi.compat.arviz_stats import loo_record
from flowvi.diagnostics import khat_threshold, psis_of_rows
from flowvi.draws.draws import Draws
from flowvi.interop.inference_data import UNITS, to_inference_data
from flowvi.runtime.arguments import check_choice, refuse_fit

if TYPE_CHECKING:
    import arviz as az


def loo(
    source: Draws | az.InferenceData, var_name: str | None = None, *, units: bool = False
) -> Any:
    r"""Expected log predictive density of left-out observations, corrected for the guide.

    Draws of q represent the posterior without :math:`y_n` by the weights

    .. math:: r_{ns} = \frac{1}{p(y_n \mid \theta_s)} \cdot \frac{p(\theta_s, y)}{q(\theta_s)},
              \qquad \widehat{elpd}_n = \log \sum_s \tilde r_{ns} \, p(y_n \mid \theta_s),

    Pareto-smoothed and normalised to :math:`\tilde r`. `az.loo` assumes that the second factor is
    constant, which holds only for resampled draws and Markov chains; for these the results agree.
    Masked rows are left out.

    With ``units=True`` whole units are left out, such as groups or persons with all their rows:
    :math:`y_n` are the data of a unit, and :math:`p(y_n \mid \theta)` has the unit's own latents
    integrated. This needs draws of a structured fit, which have estimates of these likelihoods.

    Args:
        source: Draws of a fit, or a result of `to_inference_data`.
        var_name: The observed site to predict, for models with several.
        units: Whether to leave out units in place of observations.

    Returns:
        ArviZ's `ELPDData`, pointwise, for `az.compare` and `az.plot_khat`.

    Raises:
        ValueError: There is no pointwise log likelihood, or `var_name` is ambiguous.

    References:
        Magnusson, Andersen, Jonasson and Vehtari (2019), "Bayesian leave-one-out
        cross-validation for large data", arXiv:1904.10679.
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    refuse_fit("loo", source)
    if isinstance(source, Draws):
        # Draws with a row axis are rejected below, without a log likelihood.
        source = to_inference_data(source, log_likelihood=not (source.by_row or units))
    _check(source)
    idata = _by_unit(source) if units else source
    name = _site(idata, None if units else var_name)
    idata = _observed(idata, name)
    scores = idata["log_likelihood"][name]
    stats = idata["sample_stats"]
    if "log_weight" not in stats:
        return loo_record(idata, name)
    log_w = (stats["log_p"].values - stats["log_q"].values).ravel()
    score = scores.values.reshape(log_w.size, -1).T
    smooth, khat = psis_of_rows(log_w - score)
    limit = khat_threshold(log_w.size)
    if (khat > limit).any():
        one = "unit" if units else "observation"
        warnings.warn(
            f"Pareto k-hat is above {limit:.2f} for {(khat > limit).sum()} of {len(khat)} "
            f"{one}s: their estimates rest on few draws. These {one}s are influential, "
            "or the guide is poor for them: use more draws, fit.draw, or flowvi.neutra.",
            stacklevel=2,
        )
    from scipy.special import logsumexp  # slow to import

    pointwise = logsumexp(smooth + score, axis=1)
    weight, _ = psis_of_rows(log_w[None])
    density = logsumexp(weight + score, axis=1)
    shape = scores.shape[2:]
    like = scores.isel(chain=0, draw=0, drop=True)
    return loo_record(
        idata,
        name,
        {
            "elpd_loo": pointwise.sum(),
            "se": float(np.sqrt(pointwise.size * pointwise.var())),
            "p_loo": density.sum() - pointwise.sum(),
            "warning": bool((khat > limit).any()),
            "loo_i": like.copy(data=pointwise.reshape(shape)).rename("loo_i"),
            "pareto_k": like.copy(data=khat.reshape(shape)).rename("pareto_shape"),
            "good_k": limit,
        },
    )


def _check(idata: az.InferenceData) -> None:
    """Reject draws that have no log likelihood of a row given shared latents."""
    if not has_group(idata, "sample_stats"):
        return
    stats = idata["sample_stats"]
    if "log_p" in stats and stats["log_p"].ndim > 2:
        raise ValueError(
            "loo is for latents that all rows share, and got draws with latents for each row "
            "(local=): the density of such a row without its own data is its evidence, which is "
            "in evidence(draws).rows."
        )
    if "inner" in stats.attrs:
        raise ValueError(
            "loo needs the log likelihood of each row, and got draws of a nested fit, which have "
            "bounds on it: fit.predictive_bound(rows) scores rows that were left out."
        )


def _by_unit(idata: az.InferenceData) -> az.InferenceData:
    """The groups with the likelihoods of units in place of those of observations."""
    if not has_group(idata, UNITS):
        raise ValueError(
            "loo with units=True needs likelihoods of units, which draws of a structured fit have "
            "where there are at most 20 million, and got draws without them: draw fewer of "
            "such a fit, or leave out observations, without units=True."
        )
    kept = ("posterior", "sample_stats")
    groups = {group: to_dataset(idata[group]) for group in kept if has_group(idata, group)}
    return make_groups({**groups, "log_likelihood": to_dataset(idata[UNITS])})


def _observed(idata: az.InferenceData, name: str) -> az.InferenceData:
    """Remove masked rows of a site, whose density is one in every draw."""
    scores = idata["log_likelihood"][name]
    rows = scores.values.reshape(scores.shape[0] * scores.shape[1], -1)
    kept = (rows != 0).any(0)
    if kept.all():
        return idata
    if not kept.any():
        raise ValueError(f"All rows of '{name}' are masked: there is nothing to predict.")
    dims = scores.dims[2:]
    # Row labels would become an index of tuples, which NetCDF does not support.
    flat = scores.drop_vars(list(scores.coords)).stack({f"{name}_row": dims}, create_index=False)
    groups = {
        group: to_dataset(idata[group])
        for group in ("posterior", "sample_stats")
        if has_group(idata, group)
    }
    seen = flat.isel({f"{name}_row": kept}).assign_coords({f"{name}_row": kept.nonzero()[0]})
    return make_groups({**groups, "log_likelihood": seen.to_dataset(name=name)})


def _site(idata: az.InferenceData, var_name: str | None) -> str:
    if not has_group(idata, "log_likelihood"):
        raise ValueError(
            "There is no pointwise log likelihood: use to_inference_data(draws), and a model with "
            "observed sites whose rows have densities of their own (rows that share a discrete "
            "latent have none)."
        )
    names = [str(name) for name in idata["log_likelihood"].data_vars]
    if var_name is None and len(names) > 1:
        raise ValueError(f"There are several observed sites, {', '.join(names)}: name one.")
    return names[0] if var_name is None else check_choice("observed site", var_name, names)
