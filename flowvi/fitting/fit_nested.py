"""Latents theta that all rows share, and latents z of each row, under one bound."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from flowvi.fitting.result import BEGIN, BUILD, TRAIN, NestedFit
from flowvi.flows.nets import Perceptron
from flowvi.guides.amortized import Amortised, SharedAmortised
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative, amortised
from flowvi.guides.registry import guide_names, make_guide
from flowvi.initialization.nested import Start, start
from flowvi.objectives.nested import Nested
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime.arguments import given, known, positive, spelt, wanted, whole
from flowvi.runtime.rng import own_randomness, stream
from flowvi.targets import LocalTarget
from flowvi.targets.precision import spelled
from flowvi.training.nested import NestedTarget, train

FULL_RANK = 500
# Hidden units of the network that mixes a row and theta.
MIXING = 64
# Of a theta for which no start was looked for, or found.
START_WIDTH = 0.3


@spelt
def nested(
    target: LocalTarget,
    guide: str | Guide | Blocks | Multiplicative | None = None,
    inner: str | Amortised = "realnvp",
    *,
    particles: int = 8,
    sees_theta: bool = True,
    outer: int = 1,
    batch_size: int | None = None,
    steps: int | None = None,
    draws: int = 4,
    lr: float | None = None,
    seed: int = 0,
) -> NestedFit:
    r"""Fit a guide of shared latents theta and one of the latents z of rows, together.

    Fresh guides begin at a normal of theta and the latents of some rows together. Training has
    the guards of `fit`: steps without a finite gradient are skipped; where the bound collapses,
    it goes back to the last good state with half the step; and the best of the start, the last
    iterate and the average of the last ones is kept. What failed is a warning, is in
    `meta["failures"]`, and makes the verdict of the draws "do not trust".

    With `outer` = 1, the ELBO over theta of the importance-weighted bounds of rows: valid
    and unbiased under minibatches. With M = `outer` > 1,

    .. math::
        E \log \frac{1}{M} \sum_m
        \frac{p(\theta_m)}{q(\theta_m)} \prod_{n=1}^N p_K(x_n \mid \theta_m),

    whose gradient weights each theta by its normalised posterior weight, held fixed. It needs
    all rows in every weight.

    Args:
        target: From `from_pyro(..., local=)`, of a model that also has latents outside the plate.
        guide: Of theta: a name, `Blocks`, `Multiplicative`, or a guide that goes on from where it
            is; full rank up to 500 dimensions, mean field beyond.
        inner: Of a row's latents: a name, or an amortised guide that goes on from where it is.
        particles: Draws K of each row's latents.
        sees_theta: Whether the inner guide is q(z | x, theta), or q(z | x). One of your own takes
            theta behind what its encoder makes of the row.
        outer: Draws M of theta inside one bound.
        batch_size: Rows of a step; all of them without.
        steps: Number of steps; as many as pay by default.
        draws: Estimates of the bound a step.
        lr: Largest step size of Adam, for theta in units of its width at the start; 0.005 by
            default. It is halved where a stage of the training gained nothing.
        seed: Of everything random.

    Raises:
        ValueError: Rows are subsampled and outer > 1, there are no shared latents, or an
            argument is out of its range.
    """
    wanted("target", target, LocalTarget, "of a model with a local plate: from_pyro(..., local=)")
    outer, particles = whole("outer", outer), whole("particles", particles)
    steps, draws = given(whole, "steps", steps), whole("draws", draws)
    batch_size, seed = given(whole, "batch_size", batch_size), whole("seed", seed, 0)
    lr = given(positive, "lr", lr)
    _check(target, outer, batch_size)
    size = min(batch_size or target.rows, target.rows)
    with own_randomness(stream(seed, BUILD)):
        rows, (theta, spec) = _inner(target, inner, sees_theta), _outer(target, guide)
        density = _begun(target, rows, theta, (guide, inner), sees_theta, stream(seed, BEGIN))
        torch.manual_seed(stream(seed, TRAIN))
        # The score of the inner guide has mean zero where its bound stands alone, and not
        # where the same draws are in a weight of the outer bound.
        within = Renyi(0.0, particles, "dreg" if outer == 1 else "total")
        over = Renyi(0.0 if outer > 1 else 1.0, outer, "dreg")
        trained = train(NestedTarget(density, within, size), theta, over, steps, draws, lr, seed)
    named = isinstance(inner, str)
    of_rows = {"name": inner if named else "own", "sees_theta": sees_theta, "mixes": named}
    meta = {
        "model": target.name,
        "guide": spec["name"],
        "inner": of_rows["name"],
        "specs": [spec, of_rows],
        "precision": spelled(target.dtype),
        "particles": particles,
        "outer": outer,
        "batch_size": size,
        "steps": len(trained.bounds),
        "lr": trained.lr,
        "seed": seed,
        "failures": trained.record.failures,
        # Of draws of such a fit nothing is known but that they are of a training that failed.
        "missed": trained.record.failures,
    }
    for failure in trained.record.failures:
        warnings.warn(failure, stacklevel=3)
    history = {"bound": trained.bounds}
    return NestedFit(density, theta, particles, history, meta, trained.record.log)


def _check(target: LocalTarget, outer: int, batch_size: int | None) -> None:
    if target.shared is None:
        raise ValueError(
            f"{target.name} has no latents outside plate '{target.plate}': flowvi.fit(target) "
            "fits the latents of rows alone."
        )
    if outer > 1 and batch_size is not None and batch_size < target.rows:
        raise ValueError(
            f"With outer = {outer}, every weight of theta needs all {target.rows} rows: of batches "
            f"of {batch_size} it would be no bound, because N / B does not commute with "
            "log-mean-exp, and it can exceed the evidence. Use outer=1, or leave out batch_size."
        )


def inner_guide(target: LocalTarget, name: str, sees_theta: bool, mixes: bool) -> Amortised:
    """A fresh guide of a row's latents, by name.

    Args:
        target: The model.
        name: Row of `GUIDES` or `FLOWS`.
        sees_theta: Whether it is given theta.
        mixes: Whether it follows products of the row and theta; earlier versions did not.
    """
    assert target.shared is not None
    built: Amortised = amortised(target, known("guide", name, sorted(guide_names())))
    if sees_theta:
        seen = built.context(target.batch([0])).shape[-1]
        width = seen + target.shared.dim
        guide = make_guide(name, target.dim, width)
        if mixes:
            mix = Perceptron(target.shared.dim, width, seen, MIXING)
            built = SharedAmortised(built.encoder, guide, mix)
        else:
            built = Amortised(built.encoder, guide)
    return built.to(dtype=target.dtype, device=target.device)


def _inner(target: LocalTarget, inner: str | Amortised, sees_theta: bool) -> Amortised:
    if isinstance(inner, str):
        return inner_guide(target, inner, sees_theta, True)
    wanted("inner", inner, Amortised, "the name of a guide, or a flowvi.Amortised")
    if inner.dim != target.dim:
        raise ValueError(
            f"The inner guide has D = {inner.dim}, but a row of {target.name} has D = {target.dim}."
        )
    return copy.deepcopy(inner).to(dtype=target.dtype, device=target.device)


def _outer(
    target: LocalTarget, guide: str | Guide | Blocks | Multiplicative | None
) -> tuple[Guide, dict[str, Any]]:
    """The guide of theta and how to build it; a fresh one starts narrow, amid the supports."""
    shared = target.shared
    assert shared is not None
    chosen = guide or ("fullrank" if shared.dim <= FULL_RANK else "meanfield")
    kinds = (str, Guide, Blocks, Multiplicative)
    wanted("guide", chosen, kinds, "the name of a guide, Blocks, Multiplicative, or a guide")
    if isinstance(chosen, Guide):
        if chosen.dim != shared.dim:
            raise ValueError(
                f"The guide has D = {chosen.dim}, but the latents that all rows of {target.name} "
                f"share have D = {shared.dim}."
            )
        new = copy.deepcopy(chosen).to(dtype=shared.dtype, device=shared.device)
    else:
        recipe = Multiplicative() if chosen == "multiplicative" else chosen
        fresh = make_guide(recipe, shared.dim) if isinstance(recipe, str) else recipe.build(shared)
        new = fresh.to(dtype=shared.dtype, device=shared.device)
        start = torch.zeros(shared.dim, dtype=shared.dtype, device=shared.device)
        new.start(start, torch.full_like(start, START_WIDTH))
    if new.spec is not None:
        return new, {"name": new.kind, "sizes": new.spec}
    if isinstance(chosen, str):
        return new, {"name": chosen, "sizes": {}}
    return new, {"name": type(new).__name__, "own": True}


def _begun(
    target: LocalTarget,
    rows: Amortised,
    theta: Guide,
    given: tuple[object, object],
    sees_theta: bool,
    seed: int,
) -> Nested:
    """The density, with guides that begin at a normal where they do not go on from theirs."""
    assert target.shared is not None
    fresh = [not isinstance(g, Guide) for g in given]
    found: Start | None = None
    if any(fresh) and target.shared.dim <= FULL_RANK:
        found = start(target, seed)
    if found is None:
        return Nested(target, rows, sees_theta)
    if fresh[0]:
        theta.start(found.loc, found.scale_tril)
    if not fresh[1]:
        return Nested(target, rows, sees_theta)
    found.begin(rows, sees_theta)
    return Nested(target, rows, sees_theta)
