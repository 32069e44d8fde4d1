"""Where a fit starts: candidate Gaussians, and the best of them refined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.linalg import solve_triangular

from flowvi.pathfinder import estimates
from flowvi.target import Target

Say = Callable[[str], None]

HESSIAN_LIMIT = 2000
PATH_POINTS = 6
LBFGS_STEPS = 300
NEWTON_STEPS = 12
SMALL = 50
LARGE = 300
REFINE_STEPS = 10
TRY_ROUNDS = 8
REFINE_ROUNDS = 30
FIRST_RATE = 0.5
LAST_RATE = 0.01
JUDGE_DRAWS = 400


@dataclass(frozen=True)
class Gaussian:
    """A normal density on R^D and how good it is.

    Args:
        loc: Mean, (D).
        scale_tril: Lower triangular L with covariance L L^T, (D, D).
        name: Where it came from.
        elbo: Its evidence lower bound, on draws that judged all candidates alike.
        blind: Whether it began at a start point itself, not on the way to a mode.
    """

    loc: Tensor
    scale_tril: Tensor
    name: str
    elbo: float = -math.inf
    blind: bool = False


def best_gaussian(
    target: Target,
    seed: int,
    diagonal: bool,
    say: Say,
    over: Callable[[], bool] = lambda: False,
) -> tuple[Gaussian, list[Gaussian]]:
    """Find a normal density with a high ELBO, without a step size to choose.

    Candidates are narrow normals at start points, and Laplace approximations
    along and at the end of L-BFGS paths to a mode: where the density has no
    mode, as in a centred hierarchy, an earlier point of the path wins. The
    best ELBO on common draws is refined by `refine`.

    Args:
        target: The log density.
        seed: Of the start points and draws.
        diagonal: Restrict the covariance to a diagonal.
        say: Takes a sentence about every decision.
        over: Asked now and then whether to make do with what there is.

    Returns:
        The best, and what became of the other candidates.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    judge = torch.randn(
        JUDGE_DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    blind, aware = [], []
    for group in candidates(target, generator):
        scored = [score(target, g, judge) for g in group]
        blind.append(scored[0])
        aware.append(max(scored[1:], key=lambda g: g.elbo if math.isfinite(g.elbo) else -math.inf))
        if over():
            break
    # The best start need not lead to the best Gaussian, for a spike flatters its neighbourhood
    # where the density is unbounded: of each start, the normal that knows nothing of modes is
    # tried beside the best of those that do, unless another start led to the same.
    found = [g for g in blind if math.isfinite(g.elbo)] + distinct(aware, len(aware))
    if not found:
        raise ValueError(
            f"The log density of {target.name} is not finite around any start point; "
            "rescale the data or narrow the priors."
        )
    if diagonal:
        found = [score(target, _diagonal(g), judge) for g in found]
    tried = []
    for g in sorted(found, key=lambda g: -g.elbo):
        rounds = 0 if over() else TRY_ROUNDS
        tried.append(refine(target, g, generator, judge, diagonal, rounds))
    best = max(tried, key=lambda g: g.elbo)
    rounds = 0 if over() else REFINE_ROUNDS
    refined = refine(target, best, generator, judge, diagonal, rounds)
    say(f"start: {best.name}, the best of {len(tried)}")
    say(f"Gaussian: ELBO {refined.elbo:.3f} on {JUDGE_DRAWS} draws")
    return refined, [g for g in tried if g is not best]


def candidates(target: Target, generator: torch.Generator) -> Iterator[list[Gaussian]]:
    """Normals to start from: for each start point, guesses of several kinds."""
    identity = torch.eye(target.dim, dtype=target.dtype, device=target.device)
    starts = target.starts(generator)
    if target.dim > LARGE:
        # A Hessian costs 2 D gradients: two starts of different kinds have to do.
        starts = starts[[0, -3]]
    for i, z in enumerate(starts):
        path = ascend(target, z)
        group = [
            Gaussian(z, 0.1 * identity, f"narrow normal at start {i}", blind=True),
            Gaussian(z, identity, f"standard normal at start {i}"),
            Gaussian(path[-1], 0.1 * identity, f"narrow normal at mode {i}"),
        ]
        group += _pathfinder(target, [z, *path], f"on the way to mode {i}")
        if target.dim <= HESSIAN_LIMIT:
            few = path[:-1] if target.dim <= 100 else []
            for k, point in enumerate(_thinned(few, PATH_POINTS)):
                group.append(laplace(target, point, f"Laplace {k} on the way to mode {i}"))
            group.append(_newton(target, path[-1], f"Laplace at mode {i}"))
        yield group


def _pathfinder(target: Target, path: list[Tensor], where: str) -> list[Gaussian]:
    """Normals from the curvature along the path itself, at some of its points."""
    points = torch.stack(path)
    parts = [value_and_score(target, part)[1] for part in points.split(target.chunk())]
    found = list(estimates(points, torch.cat(parts)))
    return [
        Gaussian(e.loc, _factor(e.covariance), f"Pathfinder {k} {where}")
        for k, e in enumerate(_thinned(found, PATH_POINTS))
        if e.loc.isfinite().all() and bool((e.covariance.diagonal() > 0).all())
    ]


def ascend(target: Target, start: Tensor) -> list[Tensor]:
    """Points of an L-BFGS ascent of the log density (SciPy), the last the highest."""
    path: list[Tensor] = []

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_score(target, start.new_tensor(x))
        if not (value.isfinite() and gradient.isfinite().all()):
            return 1e30, np.zeros_like(x)
        return -value.item(), -gradient.cpu().numpy().astype(np.float64)

    def keep(x: np.ndarray) -> None:
        path.append(start.new_tensor(x))

    minimize(
        objective,
        start.cpu().numpy().astype(np.float64),
        jac=True,
        method="L-BFGS-B",
        callback=keep,
        options={"maxiter": LBFGS_STEPS, "maxcor": 20},
    )
    return path or [start]


def laplace(target: Target, z: Tensor, name: str) -> Gaussian:
    r"""The normal with precision :math:`|-\nabla^2 \log p(z)|` and its Newton step's mean.

    Absolute eigenvalues make it a density where the log density is not concave.
    """
    precision = -_hessian(target, z)
    width = precision.diagonal().abs().clamp(1e-20, 1e20).rsqrt()
    # In units of each coordinate's own width, or wide ones would drown in narrow ones' rounding.
    values, vectors = torch.linalg.eigh(width[:, None] * precision * width)
    size = values.abs().clamp_min(1e-10)
    _, gradient = value_and_score(target, z)
    covariance = width[:, None] * ((vectors / size) @ vectors.mT) * width
    step = covariance @ gradient
    # A step beyond the region that the curvature describes is cut to its edge.
    length = (step @ gradient).clamp_min(0).sqrt()
    step = step / (length / math.sqrt(len(z))).clamp_min(1.0)
    return Gaussian(z + step, _factor(covariance), name)


def refine(
    target: Target,
    start: Gaussian,
    generator: torch.Generator,
    judge: Tensor,
    diagonal: bool,
    rounds: int,
) -> Gaussian:
    r"""Raise a normal's ELBO by natural-gradient steps on path gradients.

    In its own coordinates, z = m + L eps, the path gradient of the ELBO at a
    draw is :math:`h = L^T \nabla \log p(z) + \epsilon`. The step is

    .. math:: m \mathrel{+}= \rho L\, E[h], \qquad
        L \leftarrow L (I + \rho\, \mathrm{tril}'(E[h \epsilon^T])),

    tril' with half the diagonal: at rho = 1 a Newton step on a Gaussian target,
    and without noise once the target is reached. Rounds with falling rho
    are kept if they improve the ELBO on the judging draws.

    References:
        Roeder, Wu and Duvenaud (2017), arXiv:1703.09194: the path gradient.
        Tan (2021), "Analytic natural gradient updates for Cholesky factor in
        Gaussian variational approximation", arXiv:2109.00375: the step.
    """
    best = current = start if math.isfinite(start.elbo) else score(target, start, judge)
    pairs = int(np.clip(2 * target.dim, 64, 512)) // 2
    rate, stale = FIRST_RATE, 0
    for _ in range(rounds):
        for _ in range(REFINE_STEPS):
            current = _natural_step(target, current, rate, pairs, generator, diagonal)
        current = score(target, current, judge)
        gain = current.elbo - best.elbo
        rate *= 0.85
        if gain > 0:
            best = current
        elif not gain > -1.0:
            # Thrown off, or not finite: back to the best, with smaller steps.
            current, rate = best, 0.5 * rate
        stale = 0 if gain > 1e-3 else stale + 1
        if stale == 3 or rate < LAST_RATE:
            break
    return best


def _natural_step(
    target: Target,
    g: Gaussian,
    rate: float,
    pairs: int,
    generator: torch.Generator,
    diagonal: bool,
) -> Gaussian:
    half = torch.randn(
        pairs, target.dim, generator=generator, dtype=g.loc.dtype, device=g.loc.device
    )
    eps = torch.cat([half, -half])
    log_p, gradient = value_and_score(target, g.loc + eps @ g.scale_tril.mT)
    good = log_p.isfinite() & gradient.isfinite().all(-1)
    if good.sum() < len(eps) / 2:
        return replace(g, scale_tril=0.5 * g.scale_tril)
    eps, h = eps[good], gradient[good] @ g.scale_tril + eps[good]
    # A single draw far out in a steep wall must not decide the step.
    norm = h.norm(dim=-1, keepdim=True)
    h = h * (10 * norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)
    shift, spread = h.mean(0), (h.mT @ eps / len(eps)).tril()
    spread = spread.diagonal().diag() if diagonal else spread
    shift = rate * shift / (rate * shift.norm() / math.sqrt(target.dim)).clamp_min(1.0)
    spread = rate * (spread.tril(-1) + 0.5 * spread.diagonal().diag())
    spread = spread / (2 * torch.linalg.matrix_norm(spread) / math.sqrt(target.dim)).clamp_min(1.0)
    factor = spread.tril(-1) + spread.diagonal().exp().diag()
    return replace(g, loc=g.loc + g.scale_tril @ shift, scale_tril=(g.scale_tril @ factor).tril())


def score(target: Target, g: Gaussian, eps: Tensor) -> Gaussian:
    """The same Gaussian with its ELBO on given noise, (S, D)."""
    log_p = evaluate(target, g.loc + eps @ g.scale_tril.mT)
    log_q = -0.5 * (eps.square().sum(-1) + len(g.loc) * math.log(2 * math.pi))
    log_q = log_q - g.scale_tril.diagonal().log().sum()
    return replace(g, elbo=float((log_p - log_q).mean()))


def evaluate(target: Target, z: Tensor) -> Tensor:
    """The log density of many points, in chunks that fit memory. (S, D) -> (S)."""
    with torch.no_grad():
        return torch.cat([target.log_prob(part) for part in z.split(target.chunk())])


def distinct(candidates: Sequence[Gaussian], most: int) -> list[Gaussian]:
    """The best candidates of which no two lie in the same place.

    Args:
        candidates: Gaussians with their ELBOs.
        most: How many are wanted at the most.
    """
    found: list[Gaussian] = []
    for g in sorted(candidates, key=lambda g: -g.elbo):
        if math.isfinite(g.elbo) and not any(near(g, f) for f in found):
            found.append(g)
    return found[:most]


def near(a: Gaussian, b: Gaussian) -> bool:
    """Whether two Gaussians lie within two of the wider one's widths of each other."""
    width = torch.maximum(a.scale_tril.norm(dim=1), b.scale_tril.norm(dim=1))
    return bool((((a.loc - b.loc) / width).abs() < 2.0).all())


def value_and_score(target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and its gradient, (*S, D) -> (*S), (*S, D)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_p = target.log_prob(z)
        (gradient,) = torch.autograd.grad(log_p.sum(), z)
    return log_p.detach(), gradient


def _newton(target: Target, z: Tensor, name: str) -> Gaussian:
    """Laplace's approximation after the Newton steps that L-BFGS left undone."""
    value, _ = value_and_score(target, z)
    found = laplace(target, z, name)
    for _ in range(NEWTON_STEPS if target.dim <= SMALL else 2 * (target.dim <= LARGE)):
        tries = torch.stack([z + t * (found.loc - z) for t in (1.0, 0.5, 0.1, 0.01)])
        higher, _ = value_and_score(target, tries)
        best = int(higher.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax())
        if not higher[best] > value + 1e-6 * (1 + value.abs()):
            break
        z, value = tries[best], higher[best]
        found = laplace(target, z, name)
    return replace(found, loc=z)


def _hessian(target: Target, z: Tensor) -> Tensor:
    """Second derivatives by central differences of the gradient, with two sets of step sizes."""
    step = 1e-4 * z.abs().clamp_min(1.0)
    for _ in range(2):
        shifts = step.diag()
        points = torch.cat([z + shifts, z - shifts])
        parts = [value_and_score(target, p)[1] for p in points.split(max(2, target.chunk()))]
        up, down = torch.cat(parts).nan_to_num(0.0, 0.0, 0.0).chunk(2)
        hessian = (up - down) / (2 * step[:, None])
        hessian = 0.5 * (hessian + hessian.mT)
        # The second time in units of the density's own width.
        step = 1e-3 / hessian.diagonal().abs().clamp(1e-20, 1e20).sqrt()
    return hessian


def _factor(covariance: Tensor) -> Tensor:
    """A Cholesky factor, with as little added to the diagonal as it takes."""
    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale[:, None] / scale
    identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    for jitter in (0.0, 1e-12, 1e-9, 1e-6, 1e-3):
        factor, info = torch.linalg.cholesky_ex(correlation + jitter * identity)
        if info == 0:
            break
    return scale[:, None] * factor


def _diagonal(g: Gaussian) -> Gaussian:
    """The diagonal Gaussian nearest in KL(q || p): scales from the precision's diagonal."""
    identity = torch.eye(len(g.loc), dtype=g.loc.dtype, device=g.loc.device)
    precision = solve_triangular(g.scale_tril, identity, upper=False).square().sum(0)
    return replace(g, scale_tril=precision.rsqrt().diag())


def _thinned(path: list[Any], n: int) -> list[Any]:
    if len(path) <= n:
        return path
    return [path[int(i)] for i in np.linspace(0, len(path) - 1, n)]
