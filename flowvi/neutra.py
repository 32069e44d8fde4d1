"""Markov chains in the space of a fitted guide, where the posterior is nearly its base density."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor
from tqdm import tqdm

from flowvi.chains import constant
from flowvi.draws import Draws, diagnose, tabulate
from flowvi.fit import Fit
from flowvi.guides import Pushforward
from flowvi.target import Target
from flowvi.target.runner import own_randomness

MAX_DEPTH = 10
# How often a start is drawn again where the posterior is not finite.
TRIES = 100


def neutra(
    fit: Fit,
    warmup: int = 300,
    draws: int = 1000,
    chains: int = 4,
    seed: int = 0,
    *,
    target_accept: float = 0.8,
    progress: bool = True,
) -> Draws:
    r"""Sample the posterior by NUTS, in the base space of the best guide.

    With z = T(u) the guide's map and J its Jacobian, the chains explore

    .. math:: U(u) = -\log p(x, T(u)) - \log|\det J(u)|

    which is close to the base's own log density, and easy, where the guide is
    close to the posterior. The result does not depend on the guide's quality,
    only the time does: `diagnose` judges it by R-hat, effective draws and
    divergences. The chains run one after the other and start at draws of the guide.

    Args:
        fit: A fit whose best guide pushes noise through a map: a flow, full rank, mean field.
        warmup: Steps that adapt step size and scales, and are dropped.
        draws: Draws kept from each chain.
        chains: Number of chains, at least 2.
        seed: Of all chains; the caller's generators are left alone.
        target_accept: Acceptance probability aimed at; a larger one takes smaller steps.
        progress: Show a bar, if the error stream is a terminal.

    Returns:
        Draws of the posterior, with log q of the guide at each of them.

    References:
        Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte
        Carlo using neural transport", arXiv:1903.03704.
    """
    guide = fit.guide
    _check(guide, {"warmup": warmup, "draws": draws}, chains, target_accept)
    assert isinstance(guide, Pushforward)
    began = time.perf_counter()
    with own_randomness(seed), constant(guide, fit.target):
        potential = _Potential(fit.target, guide)
        shown = progress and sys.stderr.isatty()
        with tqdm(total=chains * (warmup + draws), disable=not shown, unit="step") as bar:
            runs = [_chain(potential, warmup, draws, target_accept, bar) for _ in range(chains)]
    stats = {
        "diverging": np.stack([run.diverging for run in runs]),
        "n_steps": np.stack([run.steps for run in runs]),
    }
    stats["tree_depth"] = np.ceil(np.log2(stats["n_steps"] + 1)).astype(int)
    facts = {
        "warmup": warmup,
        "acceptance": float(np.mean([run.acceptance for run in runs])),
        "step_size": [run.step_size for run in runs],
        "tree_depth": float(stats["tree_depth"].mean()),
        "divergences": int(stats["diverging"].sum()),
    }
    meta = {**fit.meta, "mcmc": facts, "seed": seed, "seconds": time.perf_counter() - began}
    with torch.no_grad():
        done = tabulate(fit.target, [_pieces(potential, run.u) for run in runs], meta, stats)
    diagnosis = diagnose(done)
    facts |= {"rhat": diagnosis.rhat, "ess": diagnosis.ess}
    return done


class _Run(NamedTuple):
    """One chain: points u, (draw, D), and facts about each draw, (draw)."""

    u: Tensor
    diverging: np.ndarray
    steps: np.ndarray
    acceptance: float
    step_size: float


class _Potential:
    """Minus the log density of the posterior in the base space of a guide.

    Attributes:
        calls: How often it was evaluated.
    """

    def __init__(self, target: Target, guide: Pushforward) -> None:
        self.target, self.guide = target, guide
        self.calls = 0

    def __call__(self, point: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        z, ladj = self.guide.transport(point["u"])
        potential = -(self.target.log_prob(z) + ladj)
        # Pyro reads infinity as a divergence, but has no word for NaN in the middle of a tree.
        return torch.where(potential.isnan(), math.inf, potential)

    def start(self) -> Tensor:
        """A draw of the base at which the posterior is finite."""
        for _ in range(TRIES):
            u = self.guide.base.sample(())
            with torch.no_grad():
                if torch.isfinite(self({"u": u})):
                    return u
        raise ValueError(
            f"The posterior is not finite at {TRIES} draws of the guide, so no chain can start. "
            "Look at diagnose(fit.draw(4000)) first."
        )


def _chain(
    potential: _Potential, warmup: int, draws: int, target_accept: float, bar: tqdm[Any]
) -> _Run:
    kernel = NUTS(
        potential_fn=potential, target_accept_prob=target_accept, max_tree_depth=MAX_DEPTH
    )
    kernel.initial_params = {"u": potential.start()}
    kernel.setup(warmup)
    point = kernel.initial_params
    kept, steps = [], []
    for i in range(warmup + draws):
        before = potential.calls
        point = kernel.sample(point)
        if i >= warmup:
            kept.append(point["u"].detach())
            steps.append(potential.calls - before)
        bar.update()
    facts = kernel.diagnostics()
    diverging = np.zeros(draws, dtype=bool)
    diverging[facts["divergences"]] = True
    told = kernel.logging()
    return _Run(
        torch.stack(kept),
        diverging,
        np.array(steps),
        float(told["acc. prob"]),
        float(kernel.step_size),
    )


def _pieces(potential: _Potential, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Points z and the guide's log density there."""
    for part in u.split(potential.target.chunk()):
        z, ladj = potential.guide.transport(part)
        yield z, potential.guide.base.log_prob(part) - ladj


def _check(guide: object, counts: dict[str, int], chains: int, target_accept: float) -> None:
    if not isinstance(guide, Pushforward):
        raise ValueError(
            f"neutra needs a guide that pushes noise through a map, such as realnvp, fullrank or "
            f"meanfield; the fit's best guide is a {type(guide).__name__}, which has no such map."
        )
    for name, count in counts.items():
        if not isinstance(count, int) or count < 100:
            raise ValueError(f"{name} must be a whole number of at least 100; got {count}.")
    if not isinstance(chains, int) or chains < 2:
        raise ValueError(f"chains must be at least 2, to compare them; got {chains}.")
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept must lie between 0 and 1; got {target_accept}.")
