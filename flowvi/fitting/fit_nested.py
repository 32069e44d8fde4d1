"""Fit shared latents theta and latents z of each row under one bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import cast

from flowvi.fitting.fit import fit
from flowvi.fitting.result import NestedFit
from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import Blocks, Multiplicative, Prefixes
from flowvi.objectives.nested import NestedTarget, check_outer
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer, check_type, suggest_spelling
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import LocalTarget
from flowvi.training.records import Step

# Random stream that initialises fresh inner guides.
INNER = 1


@suggest_spelling
def nested(
    target: LocalTarget,
    guide: str | Guide | Blocks | Multiplicative | Prefixes | None = None,
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
    r"""Fit a guide of shared latents theta together with a guide of the latents z of rows.

    This is ``fit(NestedTarget(target, inner, ...), guide, ...)``: the guide of rows is part of the
    target, and its parameters are trained with the guide of theta. Fresh guides start at a joint
    normal of theta and the latents of some rows. Guards, rollback, checkpoints, Ctrl-C and the
    check by fresh draws are those of `fit`. A failure is a warning and an entry of
    `meta["failures"]`, and makes the verdict of the draws "do not trust".

    With `outer` = 1, the objective is the ELBO over theta of the importance-weighted bounds of
    rows: a lower bound, unbiased under minibatches. With M = `outer` > 1, it is

    .. math::
        E \log \frac{1}{M} \sum_m
        \frac{p(\theta_m)}{q(\theta_m)} \prod_{n=1}^N p_K(x_n \mid \theta_m),

    whose gradient weights each theta by its normalised posterior weight, held fixed. Every
    weight needs all rows.

    Args:
        target: From `from_pyro(..., local=)`, of a model that also has latents outside the plate.
        guide: Guide of theta: a name, `Blocks`, `Multiplicative`, `Prefixes`, or a guide that keeps
            its parameters; full rank up to 500 dimensions, mean field beyond.
        inner: Guide of a row's latents: a name, or an amortised guide that keeps its parameters.
        particles: Number of draws K of each row's latents.
        sees_theta: Whether the inner guide is q(z | x, theta) or q(z | x). The context of a given
            guide is the encoder's output for the row, followed by theta.
        outer: Number of draws M of theta inside one bound.
        batch_size: Number of rows of a step; all rows by default.
        steps: Number of steps. By default the fit decides.
        draws: Number of estimates of the bound in a step.
        lr: Largest step size of Adam, for theta in units of its width at the start; 0.005 by
            default. It is halved where a stage of the training gained nothing.
        seed: Seed of all random numbers.
        budget: Time limit in seconds; none by default.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.
        callback: Function called with a `Step` after each step; a true answer stops the fit.
        checkpoint: Folder for the state of the fit, as for `fit`.
        resume: Whether to resume an earlier fit with the same arguments.
        executor: Runs the fit in another process, such as a `ProcessPoolExecutor`.
        max_memory: As for `fit`.

    Raises:
        ValueError: Rows are subsampled and outer > 1, the model has no shared latents, or an
            argument is out of its range.
    """
    kinds = (str, Guide, Blocks, Multiplicative, Prefixes, type(None))
    check_type("guide", guide, kinds, "the name of a guide, Blocks, Multiplicative, or a guide")
    outer, draws, seed = (
        check_integer("outer", outer),
        check_integer("draws", draws),
        check_integer("seed", seed, 0),
    )
    with isolated_rng(derive_seed(seed, INNER)):
        density = NestedTarget(target, inner, particles, sees_theta, batch_size)
    check_outer(density, outer)
    found = fit(
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
    return cast(NestedFit, found)
