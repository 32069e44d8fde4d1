"""Markov chains in the space of a fitted guide, where the posterior is nearly its base density."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor

from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import tabulate
from flowvi.guides.guide import Guide, frozen
from flowvi.guides.pushforward import Pushforward
from flowvi.runtime.progress import Progress, within
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Target

MAX_DEPTH = 10
# Largest number of initial draws until the posterior is finite.
TRIES = 100


class NutsSettings(NamedTuple):
    """Lengths and number of chains.

    Attributes:
        warmup: Steps that adapt step size and scales, and are dropped.
        draws: Draws kept from each chain.
        chains: Number of chains.
        target_accept: Acceptance probability aimed at.
    """

    warmup: int = 300
    draws: int = 1000
    chains: int = 4
    target_accept: float = 0.8


def run_nuts(
    target: Target,
    guide: Guide,
    plan: NutsSettings,
    seed: int,
    meta: Mapping[str, Any],
    *,
    progress: bool = True,
    out_of_time: Callable[[], bool] = lambda: False,
    starts: Sequence[Tensor] = (),
) -> Draws | None:
    r"""Sample the posterior by NUTS, in the base space of a guide.

    With z = T(u) the guide's map and J its Jacobian, the chains explore

    .. math:: U(u) = -\log p(x, T(u)) - \log|\det J(u)|

    which is close to the base's own log density, and easy, where the guide is
    close to the posterior. The chains run one after the other and start at
    draws of the guide.

    Args:
        target: The posterior.
        guide: A guide that pushes noise through a map.
        plan: Lengths and number of chains.
        seed: Seed of all chains; the caller's generators are unchanged.
        meta: Facts about the fit, kept with the draws.
        progress: Whether to show the progress.
        out_of_time: Returns whether to give up; asked after every draw.
        starts: Points u to start from, where the posterior is finite at no draw of the guide.

    Returns:
        Draws of the posterior, with log q of the guide at each of them; None if given up.

    References:
        Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte
        Carlo using neural transport", arXiv:1903.03704.
    """
    check_has_map(guide)
    assert isinstance(guide, Pushforward)
    began = time.perf_counter()
    with isolated_rng(seed), frozen(guide, target):
        potential = _Potential(target, guide)
        potential.others = starts
        with within(target.name, progress) as bar:
            bar.phase("NUTS", plan.chains * (plan.warmup + plan.draws))
            runs = []
            for _ in range(plan.chains):
                run = _chain(potential, plan, bar, out_of_time)
                if run is None:
                    return None
                runs.append(run)
    stats, facts = _statistics(runs, plan)
    seconds = time.perf_counter() - began
    # The check of the guide's draws does not apply to chains.
    kept = {name: fact for name, fact in meta.items() if name != "check"}
    with torch.no_grad():
        done = tabulate(
            target,
            len(runs[0].u),
            [_pieces(potential, run.u) for run in runs],
            {**kept, "mcmc": facts, "seed": seed, "seconds": seconds},
            stats,
        )
    diagnosis = diagnose(done)
    facts |= {"rhat": diagnosis.rhat, "ess": diagnosis.ess}
    return done


def _statistics(
    runs: list[_ChainResult], plan: NutsSettings
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Numbers of each draw, (chain, draw), and of all chains together."""
    stats = {
        "diverging": np.stack([run.diverging for run in runs]),
        "n_steps": np.stack([run.steps for run in runs]),
    }
    stats["tree_depth"] = np.ceil(np.log2(stats["n_steps"] + 1)).astype(int)
    facts = {
        "warmup": plan.warmup,
        "acceptance": float(np.mean([run.acceptance for run in runs])),
        "step_size": [run.step_size for run in runs],
        "tree_depth": float(stats["tree_depth"].mean()),
        "divergences": int(stats["diverging"].sum()),
    }
    return stats, facts


def check_has_map(guide: object) -> None:
    """Refuse a guide that does not push noise through a map."""
    if not isinstance(guide, Pushforward):
        raise ValueError(
            f"neutra needs a guide that pushes noise through a map, such as realnvp, fullrank or "
            f"meanfield; the fit's best guide is a {type(guide).__name__}, which has no such map."
        )


class _ChainResult(NamedTuple):
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
        others: Points u to start from, where the density is finite at no draw of the base.
    """

    def __init__(self, target: Target, guide: Pushforward) -> None:
        self.target, self.guide = target, guide
        self.calls = 0
        self.others: Sequence[Tensor] = ()

    def __call__(self, point: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        z, ladj = self.guide.transport(point["u"])
        potential = -(self.target.log_prob(z) + ladj)
        # Pyro treats infinity as a divergence, but fails at NaN in the middle of a tree.
        return torch.where(potential.isnan(), math.inf, potential)

    def start(self) -> Tensor:
        """A draw of the base at which the posterior is finite."""
        draws = (self.guide.base.sample(()) for _ in range(TRIES))
        for u in itertools.chain(draws, self.others):
            with torch.no_grad():
                if torch.isfinite(self({"u": u})):
                    return u
        raise ValueError(
            f"The posterior is not finite at {TRIES} draws of the guide, so no chain can start. "
            "Look at diagnose(fit.draw(4000)) first."
        )


def _chain(
    potential: _Potential, plan: NutsSettings, bar: Progress, out_of_time: Callable[[], bool]
) -> _ChainResult | None:
    kernel = NUTS(
        potential_fn=potential, target_accept_prob=plan.target_accept, max_tree_depth=MAX_DEPTH
    )
    kernel.initial_params = {"u": potential.start()}
    kernel.setup(plan.warmup)
    point = kernel.initial_params
    kept, steps = [], []
    for i in range(plan.warmup + plan.draws):
        if out_of_time():
            return None
        before = potential.calls
        point = kernel.sample(point)
        if i >= plan.warmup:
            kept.append(point["u"].detach())
            steps.append(potential.calls - before)
        bar.step()
    facts = kernel.diagnostics()
    diverging = np.zeros(plan.draws, dtype=bool)
    diverging[facts["divergences"]] = True
    told = kernel.logging()
    return _ChainResult(
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
