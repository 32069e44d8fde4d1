"""What each prefix of a guide's layers is worth: its bound, and the time of its draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.guides.guide import Guide
from flowvi.guides.prefixes import depth_of, prefix_of
from flowvi.runtime.display import Printed
from flowvi.runtime.rng import isolated_rng

# Draws that are timed, how often, and for how many seconds at least; the shortest time counts.
TIMED, TIMES, LEAST = 1000, 3, 0.03


class Prefix(NamedTuple):
    """One prefix of a guide.

    Attributes:
        layers: Number of layers; 0 is a Gaussian.
        elbo: ELBO of its draws, in nats.
        elbo_se: Standard error of the ELBO.
        gap: KL(q || p), the ELBO's distance from the log evidence, by importance weights.
        khat: Pareto k-hat of the weights.
        verdict: Verdict on its draws.
        seconds: Processor time of 1,000 draws with their log density under the guide.
    """

    layers: int
    elbo: float
    elbo_se: float
    gap: float
    khat: float
    verdict: str
    seconds: float


class PrefixTable(Printed, tuple[Prefix, ...]):
    """One `Prefix` for each number of layers, from 0 to K."""

    def __str__(self) -> str:
        rows = ["layers          ELBO              KL(q || p)   k-hat  ms of 1,000 draws  verdict"]
        for p in self:
            rows.append(
                f"{p.layers:6d}  {p.elbo:12.4f} +- {p.elbo_se:<8.2g}  {p.gap:8.3g}"
                f"  {p.khat:6.2f}  {1000 * p.seconds:17.3g}  {p.verdict}"
            )
        return "\n".join(rows)


def prefix_table(guides: Sequence[Guide], drawn: Callable[[int], Draws]) -> PrefixTable:
    """Evaluate every prefix of the guides of a fit.

    Args:
        guides: One guide for each restart, all of one depth.
        drawn: Function from a number of layers to draws.

    Raises:
        ValueError: The guides were not made for prefixes.
    """
    found = []
    for layers in range(depth_of(guides[0]) + 1):
        told = diagnose(drawn(layers))
        seconds = seconds_of_draws(prefix_of(guides[0], layers))
        found.append(
            Prefix(layers, told.elbo, told.elbo_se, told.gap, told.khat, told.verdict, seconds)
        )
    return PrefixTable(found)


def seconds_of_draws(guide: Guide, draws: int = TIMED) -> float:
    """Processor time of 1,000 draws of a guide with their log density: the shortest of three.

    Args:
        guide: The guide.
        draws: Draws of one call.
    """
    best = math.inf
    with torch.no_grad(), isolated_rng():
        for _ in range(TIMES):
            began, calls, spent = time.process_time(), 0, 0.0
            while spent < LEAST:
                guide.sample((draws,))
                calls, spent = calls + 1, time.process_time() - began
            best = min(best, spent / calls)
    return best * 1000 / draws
