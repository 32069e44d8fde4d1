"""Part (a) of `flows.py`: fit every family to densities of the plane, for equal wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

import flowvi
from flowvi import Site, Target
from flowvi.flows import FLOWS, Triangular
from flowvi.guides import FlowGuide, Guide, LogDensity
from flowvi.guides.registry import mixture
from flowvi.objectives import elbo
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import decayed

PARTICLES = 256
LEARNING_RATE = 5e-3
# The density is flattened at first, p^beta with beta growing to 1, so that no mode is lost.
FLATTEST, ANNEALED = 0.1, 0.4
JUDGED = 100_000
CHUNK = 10_000


class Density(NamedTuple):
    """A density of the plane.

    Attributes:
        log_prob: Its logarithm up to a constant, of z1 and z2 of any shape.
        log_z: Log of its normalising constant.
        bounded: Whether it is restricted to |z1| <= 4.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    log_z: float
    bounded: bool = False


class Row(NamedTuple):
    """What one guide reached on one density: KL(q || p) in nats, its standard error, steps."""

    kl: float
    error: float
    steps: int
    guide: Guide
    target: Target


Rows = dict[tuple[str, str], Row]


def u1(x: Tensor, y: Tensor) -> Tensor:
    ring = ((torch.hypot(x, y) - 2) / 0.4).square() / 2
    return torch.logaddexp(_well(x - 2, 0.6), _well(x + 2, 0.6)) - ring


def u2(x: Tensor, y: Tensor) -> Tensor:
    return _well(y - _wave(x), 0.4)


def u3(x: Tensor, y: Tensor) -> Tensor:
    gap = 3 * _well(x - 1, 0.6).exp()
    return torch.logaddexp(_well(y - _wave(x), 0.35), _well(y - _wave(x) + gap, 0.35))


def u4(x: Tensor, y: Tensor) -> Tensor:
    gap = 3 * torch.sigmoid((x - 1) / 0.3)
    return torch.logaddexp(_well(y - _wave(x), 0.4), _well(y - _wave(x) + gap, 0.35))


def two_moons(x: Tensor, y: Tensor) -> Tensor:
    """Two half circles of radius 2, one in the hollow of the other, blurred by 0.2."""
    angle = math.pi * (torch.arange(50) + 0.5) / 50
    cos, sin = 2 * angle.cos(), 2 * angle.sin()
    return _mixture(x, y, torch.cat([cos - 1, 1 - cos]), torch.cat([sin - 0.5, 0.5 - sin]), 0.2)


def eight_gaussians(x: Tensor, y: Tensor) -> Tensor:
    """Eight Gaussians of width 0.5 on a circle of radius 4."""
    angle = 2 * math.pi * torch.arange(8) / 8
    return _mixture(x, y, 4 * angle.cos(), 4 * angle.sin(), 0.5)


# Rezende and Mohamed (2015), table 1, with log Z by quadrature; the mixtures are normalised.
DENSITIES = {
    "U1": Density(u1, 1.877502),
    "U2": Density(u2, 2.082089, True),
    "U3": Density(u3, 2.641705, True),
    "U4": Density(u4, 2.710698, True),
    "moons": Density(two_moons, 0.0),
    "eight": Density(eight_gaussians, 0.0),
}


def _flow(name: str, **sizes: int) -> Callable[[], Guide]:
    return lambda: FlowGuide(2, FLOWS[name](2, **sizes), Triangular(2))


def _spread(count: int) -> Guide:
    """A mixture of flows whose components start on a circle."""
    guide = mixture(2, components=count)
    angle = 2 * math.pi * (torch.arange(count) + 0.5) / count
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    guide.start_components([(centre, torch.eye(2)) for centre in centres])
    return guide


# Left out are what ends at the best Gaussian, as `affine` does, and two of the three forms of
# Sylvester layers, which make the same maps of the plane.
GUIDES: dict[str, Callable[[], Guide]] = {
    "planar 2": _flow("planar", depth=2),
    "planar 8": _flow("planar", depth=8),
    "planar 32": _flow("planar", depth=32),
    "naf": _flow("naf", depth=3),
    "mixture": lambda: _spread(2),
    "realnvp": _flow("realnvp"),
    "maf": _flow("maf"),
    "iaf": _flow("iaf"),
    "nsf_coupling": _flow("nsf_coupling"),
    "nsf_autoregressive": _flow("nsf_autoregressive"),
    "ffjord": _flow("ffjord", steps=8),
    "sylvester": _flow("sylvester", depth=16),
    "glow": _flow("glow"),
    "realnvp_clamped": _flow("realnvp_clamped"),
    "radial": _flow("radial", depth=32),
    "nice": _flow("nice"),
    "spline": _flow("spline"),
    "sinh_arcsinh": _flow("sinh_arcsinh"),
    "affine": _flow("affine"),
}


def make_target(name: str) -> Target:
    """A density as a target; where |z1| <= 4, z1 is a function of a number on the whole line."""
    density = DENSITIES[name]
    line: constraints.Constraint = constraints.real
    support = constraints.interval(-4.0, 4.0) if density.bounded else line
    return flowvi.from_density(
        lambda v: density.log_prob(v["z1"], v["z2"]), {"z1": Site(support=support), "z2": Site()}
    )


def fit(name: str, build: Callable[[], Guide], seconds: float, seed: int) -> Row:
    """Train a guide by path gradients for a number of seconds, and judge it on fresh draws."""
    torch.manual_seed(seed)
    target, guide = make_target(name), build()
    optimiser = torch.optim.Adam(guide.parameters(), lr=LEARNING_RATE, fused=True)
    flat, guard = flattened(target, DENSITIES[name].log_prob), Guard()
    steps = _affordable(flat(1.0), guide, optimiser, seconds)
    began, taken = time.perf_counter(), 0
    for i in range(steps):
        optimiser.param_groups[0]["lr"] = decayed(i, steps, LEARNING_RATE)
        _step(flat(min(1.0, FLATTEST + i / (ANNEALED * steps))), guide, optimiser, guard)
        taken = i + 1
        if time.perf_counter() - began > 1.1 * seconds:
            break
    kl, error = divergence(target, guide, DENSITIES[name].log_z)
    return Row(kl, error, taken, guide, target)


def flattened(
    target: Target, log_prob: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[float], LogDensity]:
    """The target to a power beta, for every beta; Jacobians are left as they are."""

    def at(beta: float) -> LogDensity:
        if beta == 1.0:
            return target.log_prob

        def flat(u: Tensor) -> Tensor:
            z = target.constrain(u)
            return target.log_prob(u) - (1 - beta) * log_prob(z["z1"], z["z2"])

        return flat

    return at


def _affordable(
    log_p: LogDensity, guide: Guide, optimiser: torch.optim.Optimizer, seconds: float
) -> int:
    """Number of steps in that time, from steps of size zero."""
    optimiser.param_groups[0]["lr"] = 0.0
    times = []
    for _ in range(30):
        began = time.perf_counter()
        _step(log_p, guide, optimiser, Guard())
        times.append(time.perf_counter() - began)
    optimiser.state.clear()
    return max(1, int(seconds / float(np.median(times))))


def _step(log_p: LogDensity, guide: Guide, optimiser: torch.optim.Optimizer, guard: Guard) -> None:
    bound = elbo(PARTICLES)(log_p, guide).bound
    parameters = list(guide.parameters())
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(-bound, parameters)])
    if guard.admits(bound.item(), flat)[0]:
        pieces = flat.split([p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.grad = piece.view_as(p)
        optimiser.step()


@torch.no_grad()
def divergence(target: Target, guide: Guide, log_z: float) -> tuple[float, float]:
    """KL(q || p) and its standard error, from fresh draws."""
    guide.double()
    log_w = []
    for _ in range(JUDGED // CHUNK):
        z, log_q = guide.sample((CHUNK,))
        log_w.append(target.log_prob(z) - log_q)
    found = log_z - torch.cat(log_w)
    return float(found.mean()), float(found.std()) / math.sqrt(JUDGED)


@torch.no_grad()
def picture(name: str, row: Row | None, x: Tensor, y: Tensor) -> np.ndarray:
    """A guide's density at points of the plane, or the true one."""
    density = DENSITIES[name]
    log_p = density.log_prob(x, y)
    if row is None:
        log_p = log_p - density.log_z
        return log_p.masked_fill(density.bounded & (x.abs() > 4), -math.inf).exp().numpy()
    inside = (x.abs() < 4) | (not density.bounded)
    values = {"z1": torch.where(inside, x, 0.0), "z2": y}
    u = row.target.unconstrain(values)
    # The density of z is that of u over |dz / du|, which the target's own density holds.
    log_q = row.guide.log_prob(u) - row.target.log_prob(u) + log_p
    return log_q.masked_fill(~inside, -math.inf).exp().numpy()


def table(names: Iterable[str], guides: Iterable[str], seconds: float, seed: int) -> Rows:
    """Fit and print: a line for each guide, a column for each density."""
    names, rows = list(names), {}
    print(f"KL(q || p) in nats +- standard error (steps), {seconds:g} s for each fit")
    print(f"{'guide':<24}" + "".join(f"{name:>26}" for name in names))
    for guide in guides:
        print(f"{guide:<24}", end="", flush=True)
        for name in names:
            row = rows[name, guide] = fit(name, GUIDES[guide], seconds, seed)
            cell = f"{row.kl:.4f} +-{row.error:.4f} ({row.steps})"
            print(f"{cell:>26}", end="", flush=True)
        print()
    return rows


def _well(x: Tensor, width: float) -> Tensor:
    return -(x / width).square() / 2


def _wave(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x / 2)


def _mixture(x: Tensor, y: Tensor, a: Tensor, b: Tensor, width: float) -> Tensor:
    apart = (x.unsqueeze(-1) - a).square() + (y.unsqueeze(-1) - b).square()
    norm = math.log(2 * math.pi * width**2 * len(a))
    return torch.logsumexp(-apart / (2 * width**2), dim=-1) - norm
