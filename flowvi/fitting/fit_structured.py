"""Choose between a structured guide and a guide of all latents together."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from flowvi.diagnostics import VERDICTS
from flowvi.fitting.first_guide import AUTO
from flowvi.fitting.fit_shared import fit_shared
from flowvi.fitting.request import STRUCTURED, Request
from flowvi.fitting.result import Fit
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import GlobalTarget, ModelError
from flowvi.targets.structure import MarginalTarget, Structure, structure
from flowvi.targets.structure.structure import MOST_SHARED, UNITS

# Fewest local latents for which a structured guide is tried without being asked for: of
# independent units, and of a chain or a field.
FEWEST_UNITS, FEWEST_CHAIN = 50, 60
# Largest number of all latents for which a guide of all of them is tried too.
MOST_TOGETHER = 300
# Seconds that a fit has at least after the search for structure.
LEAST_LEFT = 0.1
# Evaluations of the density of the shared latents that a fit takes at least, seconds that they may
# take, and their share of a budget.
EVALUATIONS, LONGEST, BUDGET_SHARE = 1500, 1800.0, 0.5


def fit_global(request: Request) -> Fit:
    """Fit latents that all rows share, with a structured guide where it pays; see `flowvi.fit`."""
    target = request.target
    asked = request.guide == STRUCTURED
    if not isinstance(target, GlobalTarget) or not (asked or _open(request)):
        if asked:
            raise ValueError(
                f"guide='structured' is for a model from from_pyro or from_density; {target.name} "
                f"is a {type(target).__name__}: leave out the guide."
            )
        return fit_shared(request)
    began = time.perf_counter()
    found = structure(target)
    if asked and not found:
        raise ValueError(
            f"guide='structured' needs local latents that are independent, a chain or a field "
            f"given the others; {target.name} has {found}: leave out the guide."
        )
    if not asked and not pays(found):
        return _with_line(_within(request, began), str(found))
    marginal = MarginalTarget(target, found)
    try:
        slow = "" if asked else _too_slow(marginal, request)
        part = replace(request, target=marginal, guide=AUTO)
        result = None if slow else _within(part, began)
    except (ModelError, RuntimeError) as error:
        # Whatever torch cannot do, such as second derivatives of an operation, or the memory for
        # them: the guide of all latents needs less.
        if asked:
            raise ModelError(
                f"The local latents of {target.name} cannot be integrated ({found}): {error} "
                "Leave out guide='structured'."
            ) from error
        return _with_line(_within(request, began), f"no structured guide of {found}: {error}")
    if result is None:
        return _with_line(_within(request, began), f"no structured guide of {found}: {slow}")
    return result if asked or _enough(result, request) else _better(result, request)


def _within(request: Request, began: float) -> Fit:
    """A fit in what is left of the budget since a time, when the search for structure began."""
    if request.budget is None:
        return fit_shared(request)
    spent = time.perf_counter() - began
    result = fit_shared(replace(request, budget=max(request.budget - spent, LEAST_LEFT)))
    result.meta |= {"budget": request.budget, "seconds": result.meta["seconds"] + spent}
    return result


def pays(found: Structure) -> bool:
    """Whether a structured guide is worth trying."""
    local = found.local
    fewest = FEWEST_UNITS if found.kind == UNITS else FEWEST_CHAIN
    few = len(found.shared) <= MOST_SHARED * (local + len(found.shared))
    return bool(found) and local >= fewest and few


def _too_slow(marginal: MarginalTarget, request: Request) -> str:
    """Why a fit of the shared latents would take too long, from one evaluation; empty if not."""
    generator = torch.Generator(marginal.device).manual_seed(request.seed)
    # The first evaluation writes programs.
    points = marginal.starts(generator)[:2]
    seconds = 0.0
    with torch.no_grad(), isolated_rng():
        for point in points:
            began = time.perf_counter()
            marginal.evaluate(point.unsqueeze(0))
            seconds = EVALUATIONS * (time.perf_counter() - began)
    limit = LONGEST if request.budget is None else BUDGET_SHARE * request.budget
    if seconds <= limit:
        return ""
    return (
        f"{EVALUATIONS:,} evaluations would take about {seconds:,.0f} s, more than {limit:,.0f} s"
    )


def _open(request: Request) -> bool:
    """Whether the arguments leave the choice of the guide to the fit."""
    given = (request.objective, request.steps, request.lr, request.schedule)
    return request.guide == AUTO and not any(given) and request.target.dim >= FEWEST_UNITS


def _enough(result: Fit, request: Request) -> bool:
    """Whether no guide of all latents has to be tried."""
    check = result.meta["check"] or {}
    trusted = check.get("verdict") in VERDICTS[:2] and not result.meta["missed"]
    spent = request.budget is not None and result.meta["seconds"] > 0.8 * request.budget
    large = request.target.dim > MOST_TOGETHER
    return trusted or spent or large or result.meta["interrupted"] or not request.escalate


def _better(result: Fit, request: Request) -> Fit:
    """The better of a structured fit that is not trusted, and a guide of all latents."""
    budget = request.budget and request.budget - result.meta["seconds"]
    checkpoint = request.folder and request.folder / "together"
    other = fit_shared(replace(request, budget=budget, checkpoint=checkpoint))
    one, two = (fit.meta["check"] or {} for fit in (result, other))
    ranks = [
        VERDICTS.index(check.get("verdict", VERDICTS[-1])) if not fit.meta["missed"] else 2
        for check, fit in ((one, result), (two, other))
    ]
    kept, dropped = (other, result) if ranks[1] <= ranks[0] else (result, other)
    kept.log[:0] = [*dropped.log, f"the {dropped.meta['guide']} guide was dropped"]
    return kept


def _with_line(result: Fit, line: str) -> Fit:
    result.log.insert(0, line)
    return result
