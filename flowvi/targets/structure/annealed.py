"""Draws of a chain or a field, moved from a normal to its conditional in many small steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.runtime.clock import drop_if_late
from flowvi.targets.structure.laplace import Laplace, Normal

# Angle of a step of the moves, and the least; acceptance below which the angle is halved.
ANGLE, LEAST_ANGLE, ACCEPTED = 0.8, 0.05, 0.6
# Moves at the end, which change no weight: draws that lag behind the path catch up.
LAST = 2
# Steps of the first pilot and most pilots; most steps, and what their number is a multiple of.
PILOT, ROUNDS = 8, 8
MOST_STEPS, MULTIPLE = 512, 4
# Share of the variance that the number of steps is chosen for.
MARGIN = 0.9
# Log weight of a draw of density zero, for variances.
FARTHEST = -1e6


@dataclass(frozen=True)
class Path:
    r"""Powers of the weights on the way from a normal q to the conditional p.

    The density at power b is proportional to q (p / q)^b.

    Attributes:
        powers: Increasing powers from 0 to 1, (n + 1).
        angle: Angle of a step of the moves.
    """

    powers: tuple[float, ...] = (0.0, 1.0)
    angle: float = ANGLE

    @property
    def steps(self) -> int:
        """Number n of steps; one step is plain importance sampling."""
        return len(self.powers) - 1

    @staticmethod
    def even(steps: int, angle: float = ANGLE) -> Path:
        """Powers of equal distance."""
        return Path((*(i / steps for i in range(steps)), 1.0), angle)

    def state(self) -> Tensor:
        """The angle, the number of steps, and the powers, with ones behind: one size for all."""
        behind = [1.0] * (MOST_STEPS - self.steps)
        return torch.tensor([self.angle, self.steps, *self.powers, *behind], dtype=torch.float64)

    @staticmethod
    def of_state(state: Tensor) -> Path:
        """The path of a state."""
        angle, steps, *powers = state.tolist()
        return Path(tuple(powers[: int(steps) + 1]), angle)


class Moved(NamedTuple):
    """Draws at the end of a path.

    Attributes:
        white: Noise of the draws, (K, S, 1, N).
        log_weight: Log weights, whose exponential has the mean p(y | theta), (K, S).
        log_ratio: log p(theta, u) - log q(u | theta) at the draws, (K, S).
        spread: Standard deviation of log p - log q over the draws of a theta, at each power but
            the last, (n).
        accepted: Mean probability of acceptance of the moves; one without moves.
    """

    white: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    spread: Tensor
    accepted: float


def moved(
    laplace: Laplace, normal: Normal, white: Tensor, path: Path, generator: torch.Generator
) -> Moved:
    r"""Move draws of a normal along a path, by annealed importance sampling.

    .. math::
        \log w = \sum_i (b_{i+1} - b_i) \log \frac{p(\theta, u_i)}{q(u_i \mid \theta)}

    where u_i is moved from u_{i-1} by a step that leaves the density at power b_i as it is (Neal,
    2001, doi:10.1023/A:1008923215028). The mean of w is exact for any number of steps. A step
    turns the noise and a fresh momentum by an angle, which is the exact motion in a normal, between
    two kicks by the gradient of b_i log p / q, and is accepted by Metropolis' rule (Shahbaba and
    others, 2014, doi:10.1007/s11222-012-9373-1).

    Args:
        laplace: Normal approximations, which evaluate log p - log q.
        normal: The normals at values of theta.
        white: Noise of the draws, (K, S, 1, N).
        path: The powers.
        generator: Generator of the moves.
    """
    value, slope = _evaluate(laplace, normal, white)
    now = _State(white, value, slope)
    total, spread, accepted = torch.zeros_like(value), [], []
    for number, power in enumerate(path.powers[:-1]):
        if number:
            now = _move(laplace, normal, now, power, path.angle, generator)
            accepted.append(now.accepted)
        total = total + (path.powers[number + 1] - power) * now.value
        spread.append(_spread(now.value))
    for _ in range(LAST if path.steps > 1 else 0):
        now = _move(laplace, normal, now, 1.0, path.angle, generator)
    mean = sum(accepted) / len(accepted) if accepted else 1.0
    return Moved(now.white, total, now.value, torch.stack(spread), mean)


class _State(NamedTuple):
    """Noise of draws, log p - log q there with its gradient, and the last mean acceptance."""

    white: Tensor
    value: Tensor
    slope: Tensor
    accepted: float = 1.0


def _move(
    laplace: Laplace,
    normal: Normal,
    old: _State,
    power: float,
    angle: float,
    generator: torch.Generator,
) -> _State:
    """A step that leaves the density at a power as it is."""
    drop_if_late()
    options: dict[str, Any] = {
        "generator": generator,
        "dtype": old.white.dtype,
        "device": old.white.device,
    }
    # With this kick, a step is exact where the gradient is constant.
    half = power * math.tan(angle / 2)
    momentum = torch.randn(old.white.shape, **options)
    before = power * old.value - 0.5 * (old.white.square() + momentum.square()).sum((-2, -1))
    momentum = momentum + half * old.slope
    white = math.cos(angle) * old.white + math.sin(angle) * momentum
    momentum = math.cos(angle) * momentum - math.sin(angle) * old.white
    value, slope = _evaluate(laplace, normal, white)
    momentum = momentum + half * slope
    after = power * value - 0.5 * (white.square() + momentum.square()).sum((-2, -1))
    gain = (after - before).nan_to_num(nan=-torch.inf)
    # A draw of density zero has no weight, and is left by any move.
    gain = torch.where(old.value.isneginf() & value.isfinite(), 0.0, gain)
    taken = torch.rand(value.shape, **options).log() < gain
    wide = taken[..., None, None]
    return _State(
        torch.where(wide, white, old.white),
        torch.where(taken, value, old.value),
        torch.where(wide, slope, old.slope),
        float(gain.clamp(max=0.0).exp().mean()),
    )


def chosen(
    laplace: Laplace,
    normal: Normal,
    noise: Callable[[], Tensor],
    enough: float,
    generator: torch.Generator,
) -> tuple[Path, float]:
    """The shortest path after which the variance of a log weight is small enough.

    Args:
        laplace: As for `moved`.
        normal: As for `moved`.
        noise: Function that draws noise, (K, S, 1, N).
        enough: The variance.
        generator: Generator of the moves.

    Returns:
        The path, and the variance after it.
    """
    path, least = Path.even(PILOT), MULTIPLE
    best: tuple[Path, float] | None = None
    for _ in range(ROUNDS):
        found = moved(laplace, normal, noise(), path, generator)
        if found.accepted < ACCEPTED and path.angle > LEAST_ANGLE:
            path = replace(path, angle=0.5 * path.angle)
            continue
        variance = float(found.log_weight.nan_to_num(neginf=FARTHEST).var(0).mean())
        if variance <= enough:
            best = path, variance
        else:
            least = min(path.steps + path.steps // 4, MOST_STEPS)
        # The variance of a slow path falls as one over its steps.
        wanted = path.steps * variance / (MARGIN * enough)
        steps = MULTIPLE * math.ceil(min(wanted, MOST_STEPS) / MULTIPLE)
        steps = max(least, steps)
        if best is not None and steps >= best[0].steps:
            return best
        if steps == path.steps:
            return path, variance
        path = _evened(path, found.spread, steps)
    return best or (path, math.inf)


def _evaluate(laplace: Laplace, normal: Normal, white: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = laplace.log_weight(normal, white)
    bad = ~(value.isfinite() & slope.isfinite().all(-1).all(-1))
    value = torch.where(bad, -torch.inf, value)
    return value, torch.where(bad[..., None, None], 0.0, slope)


def _spread(value: Tensor) -> Tensor:
    """Standard deviation over the draws of a theta; the median over theta."""
    flat = value.nan_to_num(neginf=FARTHEST)
    return flat.std(0).median() if len(flat) > 1 else flat.new_zeros(())


def _evened(path: Path, spread: Tensor, steps: int) -> Path:
    """Powers of equal steps in the standard deviation of log p - log q (Gelman and Meng, 1998)."""
    powers = torch.tensor(path.powers, dtype=torch.float64)
    speed = spread.double().cpu().clamp(min=1e-3 * float(spread.max()) + 1e-300)
    length = torch.cat([torch.zeros(1).double(), (powers.diff() * speed).cumsum(0)])
    targets = torch.linspace(0, float(length[-1]), steps + 1, dtype=torch.float64)
    place = torch.searchsorted(length, targets[1:-1]).clamp(1, len(length) - 1)
    low, high = length[place - 1], length[place]
    inner = powers[place - 1] + (targets[1:-1] - low) / (high - low) * (
        powers[place] - powers[place - 1]
    )
    return replace(path, powers=(0.0, *map(float, inner), 1.0))
