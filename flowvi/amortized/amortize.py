"""Train one guide for all data sets of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from flowvi._version import __version__
from flowvi.amortized.covariates import Covariates
from flowvi.amortized.guide import AmortizedGuide
from flowvi.amortized.network import Network, build
from flowvi.amortized.novelty import Novelty
from flowvi.amortized.problem import Problem
from flowvi.amortized.training import CALIBRATE, SCALE, Plan, Trained, held_out, race, train
from flowvi.runtime.arguments import check_integer, check_positive, check_type, optional
from flowvi.runtime.clock import Clock, interruptible
from flowvi.runtime.progress import phase, showing
from flowvi.runtime.rng import derive_seed, isolated_rng

# Simulated data sets that standardise the inputs, and that calibrate the test of novelty.
SCALED, CALIBRATED = 8192, 4000
DEFAULT_PLAN = Plan()


def amortize(
    model: Callable[..., Any],
    *args: Any,
    budget: float | None = 300,
    steps: int | None = None,
    rows: tuple[int, int] | None = None,
    covariates: Covariates | str | None = None,
    encoder: nn.Module | None = None,
    guide: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[int, float], object] | None = None,
    plan: Plan = DEFAULT_PLAN,
    dims: Mapping[str, Sequence[str] | str] | None = None,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> AmortizedGuide:
    r"""Train one guide of the latents for all data sets of a Pyro model.

    Latents are drawn from the prior and data given them, fresh ones at each step. A network reads
    the data, and a conditional flow is trained to give the latents a high density,

    .. math:: \max_\phi E_{p(z, y)} \log q_\phi(z \mid y),

    which is the forward KL divergence, averaged over data sets. The plates of the model choose
    the network: exchangeable rows are read as a set of any size within `rows`, long vectors as
    a series, and all else as one vector. Draws of the guide at a data set have weights by the
    model's own density, and the verdict of `diagnose`.

    Args:
        model: A Pyro model with proper priors.
        *args: Example arguments, of the shapes to come; the observed values are not used.
        budget: Time limit of the training in seconds; None for no limit.
        steps: Number of steps; by default a plateau of the held-out loss or the budget ends them.
            With a given number, and where the plateau decides, a seed gives the same guide.
        rows: Least and largest number of rows of the data sets; by default half and twice those
            of the example, where its rows are exchangeable.
        covariates: Function of a number of rows that draws, with torch, the arguments that vary
            among data sets, ``lambda rows: {"x": torch.randn(rows, 3)}``; or "fixed". By default
            rows of the example's covariates are resampled, and their numbers smoothed.
        encoder: A module that reads data sets, {name: tensor (B, *shape)} -> (B, C), by names of
            observed sites and of arguments that vary.
        guide: Name of the conditional flow, in `GUIDES` or `FLOWS`; by default the better of a
            masked autoregressive flow and spline couplings after some steps, by held-out loss.
        sizes: Its sizes, such as ``{"depth": 4}``.
        seed: Seed of all random numbers; the global generators are not changed.
        progress: Whether to show the progress.
        callback: Function of a step and its held-out loss; a true answer ends the training.
        plan: Numbers of the training, `flowvi.amortized.training.Plan`.
        dims: Names of axes that are in no plate, by variable, as for `from_pyro`.
        coords: Labels by dim. Those of the rows' plate label data sets of the example's size.
        **kwargs: Keyword arguments of the model.

    Returns:
        An `AmortizedGuide`: ``guide.draw(data)``, ``guide.fit_many(data_sets)``.

    Raises:
        ModelError: The model observes nothing, has an improper prior or a site that cannot be
            simulated, or latents that grow with the data; the message names the site.

    References:
        Papamakarios and Murray (2016), arXiv:1605.06376; Greenberg, Nonnenmacher and Macke
        (2019), arXiv:1905.07488: densities of parameters learnt from simulations.
        Radev et al. (2020), arXiv:2003.06281: BayesFlow, with an encoder of data sets.
        Zaheer et al. (2017), arXiv:1703.06114: networks of sets.
    """
    budget = optional(check_positive, "budget", budget, "number of seconds")
    steps, seed = optional(check_integer, "steps", steps), check_integer("seed", seed, 0)
    optional(check_type, "encoder", encoder, nn.Module, "a torch.nn.Module")
    clock = Clock(budget)
    with showing("amortize", progress, clock) as bar, interruptible(clock):
        phase("capturing the model")
        problem = Problem(model, args, kwargs, rows, covariates, dims, coords)
        bar.name = problem.name
        pairs = problem.simulate(SCALED, derive_seed(seed, SCALE) % 2**32)
        with isolated_rng(derive_seed(seed, SCALE)):
            networks = build(problem, pairs, guide, sizes, encoder)
        network, lines, count = networks[0], list[str](), 0
        if len(networks) > 1:
            few = plan.race if steps is None else min(plan.race, max(1, steps // 10))
            network, lines, count = race(problem, networks, plan, clock, seed, few)
        trained = train(problem, network, plan, clock, seed, steps, callback)
        trained.simulations += count
        network.eval()
        phase("calibrating the test of novelty")
        novelty = calibrated(problem, network, seed)
    return AmortizedGuide(
        problem,
        network,
        novelty,
        np.array(trained.losses, dtype=np.float64).reshape(-1, 2),
        [*problem.notes, *lines, *trained.log],
        _facts(problem, network, trained, clock, seed),
    )


def calibrated(problem: Problem, network: Network, seed: int) -> Novelty:
    """The test of novelty for a trained network."""
    groups = held_out(problem, CALIBRATED, derive_seed(seed, CALIBRATE) % 2**32)
    with torch.no_grad():
        found = torch.cat([network.encoder.read(g.data) for g in groups])
    # Groups differ in their number of rows: each half has some of all.
    first, second = found[::2], found[1::2]
    return Novelty(found.shape[1], len(second)).fit(first, second)


def _facts(
    problem: Problem, network: Network, trained: Trained, clock: Clock, seed: int
) -> dict[str, Any]:
    return {
        "model": problem.name,
        "guide": f"amortized {network.guide_spec['name']}",
        "encoder": network.encoder.kind,
        "objective": "forward KL",
        "steps": trained.steps,
        "simulations": trained.simulations,
        "seconds": clock.local_seconds,
        "loss": trained.losses[-1][1],
        "seed": seed,
        "flowvi": __version__,
        "torch": str(torch.__version__),
    }
