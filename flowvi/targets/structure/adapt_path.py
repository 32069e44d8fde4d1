"""Choose how draws of a chain or a field are corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.targets.structure.adapt import EXACT
from flowvi.targets.structure.annealed import Path, chosen
from flowvi.targets.structure.correction import Correction
from flowvi.targets.structure.laplace import Laplace
from flowvi.targets.structure.shape import Shape
from flowvi.targets.structure.structure import FIELD

# Variance of a log weight that costs a sixth of the effective draws.
ENOUGH = 0.18
# Share of it at which the normal at the mode is not improved.
CLOSE = 0.5
# Draws of one value of theta, and of a chain, where they cost less; values of theta of a pilot.
DRAWS, MORE_DRAWS, POINTS, FEWER = 16, 64, 8, 2
# Numbers of a precision matrix beyond which a pilot takes fewer values of theta.
LARGE = 500_000


class Adapted(NamedTuple):
    """How draws of a chain or a field are corrected.

    Attributes:
        refined: Whether they are from a better normal than that at the mode.
        path: Their steps.
    """

    refined: bool
    path: Path


def adapt_path(laplace: Laplace, theta: Tensor, seed: int, say: Callable[[str], object]) -> Adapted:
    """Choose the normal that draws start from, and the steps that they are moved by.

    Args:
        laplace: Normal approximations; `refined` is changed in place.
        theta: Values of theta, (S, p).
        seed: Seed of the draws.
        say: Function that takes a line of the log.
    """
    generator = torch.Generator(theta.device).manual_seed(seed)
    size = laplace.structure.size
    theta = theta[: POINTS if size**2 <= LARGE or not len(laplace.shared) else FEWER]
    draws = DRAWS if laplace.structure.kind == FIELD else MORE_DRAWS
    correction = Correction(laplace, Shape(Shape.identity(laplace.mode)))
    variances = {}
    # The plain normal is the cheaper one.
    for refined in (False, True):
        laplace.refined = refined
        laplace.forget()
        found = correction.moved(theta, draws, generator)
        log_w = found.log_weight.nan_to_num(neginf=-1e6)
        if not len(laplace.shared):
            log_w = log_w.view(-1, 1)
        variances[refined] = _variance(log_w)
        if variances[refined] <= CLOSE * ENOUGH:
            break
    laplace.refined = variances.get(True, float("inf")) < variances[False]
    laplace.forget()
    least = min(variances.values())
    kind = laplace.structure.kind
    if least <= EXACT:
        say(f"the conditional of the {kind} is normal: one draw is exact")
        return Adapted(laplace.refined, Path())
    if least <= ENOUGH:
        say(f"the conditional of the {kind} is near a normal: log weights vary by {least:.2g}")
        return Adapted(laplace.refined, Path())
    normal = laplace.centred(laplace.at(theta))
    some = len(normal.centre), *laplace.columns.shape
    lead = DRAWS if len(laplace.shared) else DRAWS * len(theta)

    def noise() -> Tensor:
        return torch.randn(
            (lead, *some), generator=generator, dtype=laplace.mode.dtype, device=theta.device
        )

    path, variance = chosen(laplace, normal, noise, ENOUGH, generator)
    say(
        f"draws of the {kind} are moved from a normal in {path.steps} steps: the variance of log "
        f"weights falls from {least:.2g} to {variance:.2g}"
    )
    return Adapted(laplace.refined, path)


def _variance(log_w: Tensor) -> float:
    r"""Variance of log weights around the mean of each theta, (K, S) -> ().

    Or log(1 + v) with the relative variance v of the weights, the same for a normal log weight,
    where this is larger: few draws of great weight say that the normal lacks a tail.
    """
    white = log_w - log_w.mean(0)
    n = log_w.numel()
    relative = math.log(n) + float((2 * white).logsumexp((0, 1)) - 2 * white.logsumexp((0, 1)))
    return max(float(log_w.var(0).mean()), relative)
