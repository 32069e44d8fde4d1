"""Latents theta that all rows share, and latents z of each row, under one bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor

from flowvi.fitting.fit import fit
from flowvi.fitting.result import NestedFit
from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative
from flowvi.objectives.nested import NestedTarget, check_outer
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer, check_type, suggest_spelling
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import LocalTarget
from flowvi.training.records import Step

# The stream of random numbers of which fresh inner guides are made.
INNER = 1


@suggest_spelling
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
    budget: float | None = None,
    progress: bool = True,
    callback: Callable[[Step], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    max_memory: memory.MaxMemory = None,
) -> NestedFit:
    r"""Fit a guide of shared latents theta and one of the latents z of rows, together.

    This is ``fit(NestedTarget(target, inner, ...), guide, ...)``: the guide of rows is part of the
    target, and has its parameters trained with the guide of theta. Fresh guides begin at a normal
    of theta and the latents of some rows together. All else is as for `fit`: guards, rollback,
    checkpoints, Ctrl-C, and a check of the result by fresh draws. A failure is a warning, is in
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
        budget: Seconds that the fit may take; as many as it needs without.
        progress: Show a bar, if the error stream is a terminal.
        callback: Called with a `Step` after each; a true answer stops the fit.
        checkpoint: Folder for the state of the fit, as for `fit`.
        resume: Go on with what an earlier fit of the same arguments left there.
        executor: Runs the fit in another process, such as a `ProcessPoolExecutor`.
        max_memory: As for `fit`.

    Raises:
        ValueError: Rows are subsampled and outer > 1, there are no shared latents, or an
            argument is out of its range.
    """
    kinds = (str, Guide, Blocks, Multiplicative, type(None))
    check_type("guide", guide, kinds, "the name of a guide, Blocks, Multiplicative, or a guide")
    outer, draws, seed = (
        check_integer("outer", outer),
        check_integer("draws", draws),
        check_integer("seed", seed, 0),
    )
    with isolated_rng(derive_seed(seed, INNER)):
        density = NestedTarget(target, inner, particles, sees_theta, batch_size)
    check_outer(density, outer)
    return fit(
        density,
        "auto" if guide is None else guide,
        Renyi(0.0 if outer > 1 else 1.0, outer, "dreg"),
        steps=steps,
        lr=lr,
        particles=draws,
        seed=seed,
        budget=budget,
        compile=False,
        progress=progress,
        callback=callback,
        checkpoint=checkpoint,
        resume=resume,
        executor=executor,
        max_memory=max_memory,
    )
