"""Latents theta that all rows share, and latents z of each row, under one bound."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowvi.amortised import Amortised, SharedAmortised, amortised
from flowvi.arguments import given, known, positive, spelt, wanted, whole
from flowvi.blocks import Blocks
from flowvi.draws import Draws, stream
from flowvi.flows.nets import Perceptron
from flowvi.guides import Guide, guide_names, make_guide
from flowvi.multiplicative import Multiplicative
from flowvi.nested_start import Start, start
from flowvi.nested_training import NUMBERS, NestedTarget, train
from flowvi.objectives import Renyi
from flowvi.randomness import own_randomness
from flowvi.target import Batch, LocalTarget
from flowvi.target.precision import spelled

BUILD, TRAIN, DRAW, BEGIN = range(4)
FULL_RANK = 500
# Hidden units of the network that mixes a row and theta.
MIXING = 64
# Of a theta for which no start was looked for, or found.
START_WIDTH = 0.3


class Nested(nn.Module):
    r"""A log density over theta whose likelihood is itself a bound over the latents of rows.

    .. math::
        \log p(\theta) + \frac{N}{B} \sum_{n \in B} L_K(x_n \mid \theta), \qquad
        L_K = \log \frac{1}{K} \sum_k \frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n, \theta)}

    Each L_K is below :math:`\log p(x_n \mid \theta)` in expectation, and the scale N / B stands
    outside of it: an ELBO over theta of this is a lower bound on the evidence, and unbiased
    under minibatches.

    Args:
        target: A model with local latents and latents that all rows share.
        inner: The guide of a row; its context is that of the row, then theta where
            `sees_theta`.
        sees_theta: Whether the inner guide is q(z | x, theta) or q(z | x).
    """

    def __init__(self, target: LocalTarget, inner: Amortised, sees_theta: bool) -> None:
        super().__init__()
        self.target, self.inner, self.sees_theta = target, inner, sees_theta

    def rows(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """Bounds on the log likelihood of rows. (T, G) -> (T, B).

        Args:
            theta: Unconstrained values of the shared latents.
            batch: The rows.
            bound: Over the latents of a row.
        """
        seen = self.inner.context(batch)
        context = seen.expand(len(theta), *seen.shape)
        if self.sees_theta and isinstance(self.inner, SharedAmortised):
            context = self.inner.given(seen, theta)
        elif self.sees_theta:
            shared = theta.to(seen.dtype).unsqueeze(1).expand(*context.shape[:-1], -1)
            context = torch.cat([context, shared], -1)

        def log_p(z: Tensor) -> Tensor:
            return self.target.log_prob(z, batch, theta)

        return bound(log_p, self.inner.guide, context).bound

    def log_prob(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """An estimate of the density from some rows. (T, G) -> (T)."""
        assert self.target.shared is not None
        # N / B multiplies the bounds, not the weights in them.
        scale = self.target.rows / len(batch.places)
        rows = self.rows(theta, batch, bound).to(theta.dtype).sum(-1)
        return self.target.shared.log_prob(theta) + scale * rows


@dataclass
class NestedFit:
    """The result of a nested fit.

    Attributes:
        density: The density over theta, with the inner guide.
        guide: The guide of theta.
        particles: Draws K of each row's latents.
        history: Bound at each step.
        meta: JSON-able facts: model, guide, inner, particles, outer, batch_size, steps, seed ...
        log: What was decided, and why.
    """

    density: Nested
    guide: Guide
    particles: int
    history: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    FOR_ROWS = (
        "fit.draw(1000) has draws of what the rows share, for diagnose, bounds, evidence, "
        "resample and where; fit.predictive_bound(data) scores rows"
    )

    def draw(self, n: int = 1000, particles: int | None = None, seed: int = 0) -> Draws:
        """Draw theta, and evaluate the bound of all rows there.

        `log_p` is log p(theta) plus the log of an unbiased estimate of the likelihood, from
        K draws of each row: weights p / q estimate the evidence without bias, their mean
        logarithm is the ELBO outside of the IW bound inside, and `bounds` and `diagnose` hold.

        Args:
            n: Draws of theta.
            particles: Draws K of each row's latents; as many as in the fit without.
            seed: Of all draws.
        """
        target = self.density.target
        assert target.shared is not None
        bound = Renyi(0.0, particles or self.particles, "total")
        with torch.no_grad(), own_randomness(stream(seed, DRAW)):
            theta, log_q = self.guide.sample((n,))
            log_p = target.shared.log_prob(theta) + self._rows(theta, target.batch(), bound).sum(-1)
            values = target.shared.constrain(theta)
        return Draws(
            _array(theta)[None],
            _array(log_p.double())[None],
            _array(log_q.double())[None],
            {name: _array(value)[None] for name, value in values.items()},
            target.shared,
            {**self.meta, "particles": particles or self.particles},
        )

    def predictive_bound(
        self, data: Any, n: int = 100, particles: int | None = None, seed: int = 0
    ) -> np.ndarray:
        r"""Lower bounds on the log predictive density of rows, averaged over theta, (rows).

        .. math:: \log \tfrac{1}{M} \sum_m p_K(x \mid \theta_m), \qquad \theta_m \sim q

        Args:
            data: Rows, as the model was given them.
            n: Draws M of theta.
            particles: Draws K of each row's latents.
            seed: Of all draws.
        """
        bound = Renyi(0.0, particles or self.particles, "total")
        with torch.no_grad(), own_randomness(stream(seed, DRAW)):
            theta, _ = self.guide.sample((n,))
            rows = self._rows(theta, self.density.target.as_batch(data), bound)
        return _array(torch.logsumexp(rows.double(), 0) - math.log(n))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write both guides and the model's own parameters; `flowvi.load` reads them back."""
        from flowvi.checkpoint import save_nested

        return save_nested(self, folder)

    def __str__(self) -> str:
        words = "{model}: {guide} guide of theta, {inner} of rows, {steps} steps, K = {particles}"
        return "\n".join([words.format(**self.meta), *(f"  {line}" for line in self.log)])

    def _rows(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """Bounds of many rows in pieces that fit memory, (T, B)."""
        size = max(1, NUMBERS // (bound.particles * len(theta) * self.density.target.dim))
        pieces = [
            Batch(places, tuple(t[start : start + size] for t in batch.data))
            for start, places in _split(batch.places, size)
        ]
        return torch.cat([self.density.rows(theta, piece, bound) for piece in pieces], -1)


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


def _array(t: Tensor) -> np.ndarray:
    found: np.ndarray = t.cpu().numpy()
    return found


def _split(places: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(places), size):
        yield first, places[first : first + size]
