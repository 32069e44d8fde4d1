"""A start that the user gives: values of the latent sites, an earlier fit, or draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.diagnostics import psis
from flowvi.draws.draws import Draws
from flowvi.fitting.identity import latents
from flowvi.fitting.result import AnyFit, Fit, NestedFit, RowFit
from flowvi.guides.guide import FULL_RANK_DIM
from flowvi.initialization.candidates import (
    JUDGE_DRAWS,
    LARGE,
    REFINE_ROUNDS,
    Log,
    best_gaussian,
    refine_fully,
)
from flowvi.initialization.gaussian import (
    GaussianApproximation,
    diagonal_of,
    evaluate,
    factor_of,
    with_elbo,
)
from flowvi.initialization.newton_mode import newton_mode
from flowvi.initialization.preflight import check_integrable
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.arguments import check_type
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import LocalTarget, Target
from flowvi.targets.structure import MarginalTarget

EXPECTED = (
    "values of the latent sites, such as {'mu': 0.0, 'tau': 1.0}, or an earlier fit or its draws"
)
VALUES, EARLIER, GIVEN_DRAWS = "the given values", "the earlier fit", "the given draws"
# Standard deviation of the normal around given values, in unconstrained coordinates.
NARROW = 0.1
# Draws of an earlier fit that give its mean and covariance: at least, and for each latent.
DRAWS, FOR_EACH = 1000, 4
# Effective draws for each latent from which weighted moments are taken, and the share of the plain
# variances that is added to the weighted ones.
ENOUGH, RIDGE = 5, 0.05
# Share of effective draws from which the normal of given draws is near enough.
NEAR_SHARE = 0.05


def given_normal(target: Target, start: Any) -> GaussianApproximation | None:
    """The normal at which a fit of latents that all rows share begins; None if none is given.

    Parameters of the model take the values of an earlier fit.

    Args:
        target: The log density.
        start: Values by site, each of the site's shape, or an earlier fit of the same latents, its
            draws, or a normal in unconstrained coordinates.

    Raises:
        ValueError: A site is unknown, a value does not fit or has density zero, or the fit, the
            draws or the normal are of other latents.
    """
    if start is None:
        return None
    if isinstance(target, NestedTarget):
        raise ValueError(
            f"start has no meaning for a NestedTarget: pass the earlier fit's guides of "
            f"{target.name}, NestedTarget(target, inner=fit.target.inner) and guide=fit.guide."
        )
    check_type("start", start, (Mapping, AnyFit, Draws, GaussianApproximation), EXPECTED)
    whole = target.whole if isinstance(target, MarginalTarget) else target
    if isinstance(start, Mapping):
        found = _around_values(whole, start)
    elif isinstance(start, GaussianApproximation):
        found = start
        if len(start.loc) != whole.dim:
            raise ValueError(
                f"start is a normal of {len(start.loc)} dimensions, but {target.name} has "
                f"D = {whole.dim}."
            )
    else:
        if isinstance(start, RowFit | NestedFit) or (isinstance(start, Draws) and start.by_row):
            raise ValueError(
                f"start {_kind(start)}, but {target.name} has latents that all rows "
                f"share alone: give {EXPECTED} of those."
            )
        _check_latents(whole, start)
        _take_parameters(whole, start)
        found = normal_of_draws(start) if isinstance(start, Draws) else _of_fit(start)
    if isinstance(target, MarginalTarget):
        kept = target.structure.shared.to(found.loc.device)
        scale = found.scale_tril
        scale = factor_of((scale @ scale.mT)[kept][:, kept]) if scale.dim() == 2 else scale[kept]
        found = replace(found, loc=found.loc[kept], scale_tril=scale)
    return replace(
        found,
        loc=found.loc.to(dtype=target.dtype, device=target.device),
        scale_tril=found.scale_tril.to(dtype=target.dtype, device=target.device),
    )


def normal_of_draws(draws: Draws) -> GaussianApproximation:
    """A normal with the moments of draws: by smoothed weights, where enough are effective.

    Args:
        draws: S draws of D latents, in any number of chains.
    """
    z = torch.as_tensor(draws.z).double().flatten(0, 1)
    if draws.mcmc or draws.resampled:
        return _normal_of(z, GIVEN_DRAWS)
    weights = None
    log_w = draws.log_weights.ravel()
    if np.isfinite(log_w).any():
        w = torch.as_tensor(np.exp(psis(log_w)[0]))
        weights = w if float(1 / w.square().sum()) > ENOUGH * z.shape[1] else None
    return replace(_normal_of(z, GIVEN_DRAWS, weights), doubtful=True)


def start_from_given(
    target: Target,
    given: GaussianApproximation,
    seed: int,
    say: Log,
    diagonal: bool,
    out_of_time: Callable[[], bool],
    search: Callable[[], list[GaussianApproximation]],
) -> list[GaussianApproximation]:
    """Refine a given normal, or search from given values alone, the best first.

    Args:
        target: The log density.
        given: What `given_normal` returned.
        seed: Seed of the draws.
        say: Function that takes a line of the log.
        diagonal: Whether the guide has a diagonal covariance.
        out_of_time: Returns whether the time for the search is spent.
        search: A search over many places, for a doubtful normal that is not near the posterior.

    Raises:
        ModelError: The density has no integral.
    """
    found: list[GaussianApproximation] = []
    if target.sum_of_rows is not None and target.dim <= LARGE:
        mode = newton_mode(target, given, "Laplace, of all rows")
        found = [] if mode is None else [diagonal_of(mode) if diagonal else mode]
    if not found and not given.blind:
        found, share = _refined(target, given, seed, diagonal, out_of_time)
        if given.doubtful and share < NEAR_SHARE:
            say(f"start: {given.name} are not near the posterior; other places are searched")
            return sorted(
                [*found, *search()],
                key=lambda g: g.elbo if math.isfinite(g.elbo) else -math.inf,
                reverse=True,
            )
    say(f"start: {given.name}; no other places are searched")
    if not found:
        seen = best_gaussian(
            target, seed, diagonal, say, out_of_time, points=given.loc.unsqueeze(0)
        )
        found = [seen.best, *seen.rejected]
    say(check_integrable(target, found[0]))
    return found


def rows_of_fit(target: LocalTarget, start: Any) -> RowFit | None:
    """The earlier fit at which a fit of rows begins; the model's parameters take its values.

    Raises:
        ValueError: The start is not a fit of rows, or its latents are others.
    """
    if start is None:
        return None
    if not isinstance(start, RowFit):
        came = "values" if isinstance(start, Mapping) else f"a {type(start).__name__}"
        raise ValueError(
            f"{target.name} has latents for each row, which a guide reads off the row's data: "
            f"start must be an earlier fit of rows; got {came}."
        )
    _check_latents(target, start)
    _take_parameters(target, start)
    return start


def _around_values(target: Target, values: Mapping[str, Any]) -> GaussianApproximation:
    """A narrow normal around given values; sites that are not given lie at zero."""
    for name in values:
        if name not in target.sites:
            raise ValueError(
                f"start has a value for '{name}', which is no latent site of {target.name}: its "
                f"sites are {', '.join(target.sites)}."
            )
    with torch.no_grad():
        zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
        rest = target.constrain(zero)
        all_sites = {name: values.get(name, rest[name]) for name in target.sites}
        try:
            z = target.unconstrain(all_sites)
        except ValueError as error:
            raise ValueError(f"start does not fit {target.name}: {error}") from None
    _check_point(target, z)
    scale = NARROW * torch.ones_like(z)
    return GaussianApproximation(z, _as_dense(scale), VALUES, blind=True)


def _check_point(target: Target, z: Tensor) -> None:
    if z.dim() != 1:
        raise ValueError(
            f"start must hold one value of each site of {target.name}; got {len(z)} of each."
        )
    for name, part in target.slices.items():
        if not z[part].isfinite().all():
            raise ValueError(
                f"start['{name}'] lies outside of the support of the site, "
                f"{target.sites[name].support}, or at its edge."
            )
    if not evaluate(target, z.unsqueeze(0)).isfinite().all():
        raise ValueError(f"The log density of {target.name} is not finite at the values of start.")


def _of_fit(start: Fit) -> GaussianApproximation:
    """The normal with the mean and the covariance of an earlier fit."""
    dim = start.target.dim
    n = max(DRAWS, FOR_EACH * dim) if dim <= LARGE else DRAWS
    with torch.no_grad(), isolated_rng(0):
        if start.chains is not None:
            z = torch.as_tensor(start.chains.z).flatten(0, 1)
        else:
            z = start.guide.sample((n,)).z
    return _normal_of(z.double().cpu(), EARLIER)


def _normal_of(z: Tensor, name: str, weights: Tensor | None = None) -> GaussianApproximation:
    """The normal with the moments of points, (n, D), of equal or of given weights, (n)."""
    dim = z.shape[1]
    loc = z.mean(0) if weights is None else weights @ z
    variances = z.var(0).clamp_min(torch.finfo(z.dtype).tiny)
    if dim > LARGE:
        return GaussianApproximation(loc, _as_dense(variances.sqrt()), name)
    covariance = z.mT.cov(aweights=weights).reshape(dim, dim)
    if weights is not None:
        covariance = covariance + RIDGE * variances.diag()
    return GaussianApproximation(loc, factor_of(covariance), name)


def _as_dense(scale: Tensor) -> Tensor:
    return scale.diag() if len(scale) <= FULL_RANK_DIM else scale


def _refined(
    target: Target,
    given: GaussianApproximation,
    seed: int,
    diagonal: bool,
    out_of_time: Callable[[], bool],
) -> tuple[list[GaussianApproximation], float]:
    """A given normal, refined, and its share of effective draws; none without a density there."""
    generator = torch.Generator(device=target.device).manual_seed(seed)
    judge = torch.randn(
        JUDGE_DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    start = with_elbo(target, diagonal_of(given) if diagonal else given, judge)
    if not (given.doubtful or math.isfinite(start.elbo)):
        return [], 0.0
    found = refine_fully(
        target, start, generator, judge, out_of_time, REFINE_ROUNDS, diagonal=diagonal
    )
    return [found], _effective_share(target, found, judge)


def _effective_share(target: Target, g: GaussianApproximation, eps: Tensor) -> float:
    """Share of draws of a normal that are effective; 0 where none has a density."""
    with torch.no_grad():
        z = g.at(eps)
        log_w = target.log_prob(z) + 0.5 * eps.square().sum(-1)
    w = (log_w - log_w[log_w.isfinite()].max()).exp() if log_w.isfinite().any() else 0 * log_w
    w = w.nan_to_num(0.0)
    return float(w.sum() ** 2 / w.square().sum().clamp(min=1e-300) / len(w))


def _kind(start: AnyFit | Draws) -> str:
    return "holds draws of rows" if isinstance(start, Draws) else f"is a {type(start).__name__}"


def _check_latents(target: Target, start: AnyFit | Draws) -> None:
    ours, theirs = latents(target), latents(start.target)
    if ours == theirs:
        return
    odd = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    what = "holds draws" if isinstance(start, Draws) else "is a fit"
    raise ValueError(
        f"start {what} of {start.target.name} with other latents than {target.name}: "
        f"'{odd[0]}' is {_words(theirs.get(odd[0]))} there, and {_words(ours.get(odd[0]))} here."
    )


def _words(site: Mapping[str, Any] | None) -> str:
    return "absent" if site is None else f"of shape {tuple(site['shape'])} in {site['support']}"


def _take_parameters(target: Target, start: AnyFit | Draws) -> None:
    """Set parameters of the model to those of an earlier fit, by name."""
    ours, theirs = target.own_state(), start.target.own_state()
    if not ours and not theirs:
        return
    shapes = [{name: tuple(t.shape) for name, t in own.items()} for own in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"start is of a model with other parameters than {target.name}: "
            f"{shapes[1] or 'none'} there, and {shapes[0] or 'none'} here."
        )
    if start.target is not target:
        target.set_own_state({name: t.detach().clone() for name, t in theirs.items()})
