"""NUTS on the density of a target, without a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch

from flowvi.analysis.neutra import check_lengths
from flowvi.draws.draws import Draws
from flowvi.guides.gaussian import MeanField
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.arguments import check_type, suggest_spelling
from flowvi.runtime.rng import derive_seed
from flowvi.samplers.nuts import NutsSettings, run_nuts
from flowvi.targets import LocalTarget, Target

# Random stream of the points to start from.
STARTS = 21


@suggest_spelling
def nuts(
    target: Target,
    warmup: int = 500,
    draws: int = 1000,
    chains: int = 4,
    seed: int = 0,
    *,
    target_accept: float = 0.8,
    progress: bool = True,
) -> Draws:
    """Sample a posterior by NUTS in the unconstrained space of the model, without a fit.

    It is Pyro's kernel on the captured density, with a diagonal mass matrix. Use it to check a
    fit, as in ``plots.plot_compare(fit.draw(4000), flowvi.nuts(target))``. `neutra` samples in the
    space of a fitted guide, which is faster where the posterior has correlations or a funnel, and
    whose draws serve `evidence` too.

    Args:
        target: From `from_pyro` or `from_density`.
        warmup: Number of adaptation steps, which are dropped.
        draws: Number of draws of each chain.
        chains: Number of chains, at least 2.
        seed: Seed of all chains; the global generators are not changed.
        target_accept: Target acceptance probability; a larger one gives smaller steps.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.

    Returns:
        Draws of the posterior. They have no density of a guide: `log_q` is NaN.

    Raises:
        TypeError: The target has latents for each row, or a bound for its density.
        ValueError: The density is finite at none of the points to start from.

    References:
        Hoffman and Gelman (2014), "The No-U-Turn sampler", JMLR 15, arXiv:1111.4246.
    """
    check_type("target", target, Target, "a target, from from_pyro or from_density")
    if isinstance(target, LocalTarget | NestedTarget):
        raise TypeError(
            f"nuts samples one vector of latents, and got a {type(target).__name__}: capture the "
            "model without local=, which puts all latents into one vector."
        )
    check_lengths({"warmup": warmup, "draws": draws}, chains, target_accept)
    guide = MeanField(target.dim).to(dtype=target.dtype, device=target.device)
    zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
    guide.start(zero, torch.ones_like(zero))
    target.begin()
    plan = NutsSettings(warmup, draws, chains, target_accept)
    generator = torch.Generator(target.device).manual_seed(derive_seed(seed, STARTS))
    starts = list(target.starts(generator))
    found = cast(
        Draws,
        run_nuts(
            target, guide, plan, seed, {"model": target.name}, progress=progress, starts=starts
        ),
    )
    return replace(found, log_q=np.full_like(found.log_q, np.nan))
