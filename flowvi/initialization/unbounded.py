"""Densities without a finite integral: detection, and the cause in the data or the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from flowvi.initialization.gaussian import GaussianApproximation, evaluate, scores_in_chunks
from flowvi.targets import Target

# Log scale below which a collapse is tested, and log scale at which the test begins.
SMALL, BEGIN = -10.0, -18.0
# Steps by which the log scale is reduced, and least increase of the log density per unit, in nats:
# s^-n for n values, less one for each mean whose width shrinks with the scale.
FURTHER, RISE = (3.0, 6.0, 12.0), 0.4
# Widths up to this multiple of a scale go to zero with it.
SHRINKING_RATIO = 1e3
DRAWS = 64
# Number of scales that are tested, the smallest first, and the largest D of the test.
MOST_SCALES, MOST_DIM = 5, 200
# Newton steps of the means after a change of the scale.
NEWTON = 20
# Largest |log likelihood| of a discrete site whose values all have probability one.
CERTAIN_LOG_LIKELIHOOD = 1e-3


def find_collapse(target: Target, g: GaussianApproximation) -> str:
    """Name the scale at whose zero the density is unbounded; empty if there is none.

    A normal likelihood that meets n values exactly rises like s^-n as its scale s falls. The means
    then have a width that falls with s, too. Whether the integral grows is decided by the ELBO of a
    Gaussian whose width in those directions falls with s. In a funnel the ELBO does not grow: the
    width falls as fast as the density rises.

    Args:
        target: The log density.
        g: The best Gaussian that was found for it.
    """
    generator = torch.Generator(device=target.device).manual_seed(0)
    noise = torch.randn(
        DRAWS, target.dim, generator=generator, dtype=g.loc.dtype, device=target.device
    )
    if target.dim > MOST_DIM:
        return ""
    small = {
        column: name
        for name, site in target.sites.items()
        if _is_scale(site.support)
        for column in range(target.slices[name].start, target.slices[name].stop)
        if float(g.loc[column]) < SMALL
    }
    for column in sorted(small, key=lambda column: float(g.loc[column]))[:MOST_SCALES]:
        if where := _bound_rises(target, g, column, noise):
            return _message(target, small[column], _responsible_site(target, *where))
    return ""


def _is_scale(support: Constraint) -> bool:
    """Whether values end at zero, and lie above it: coordinates are then their logarithms."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.positive, constraints.nonnegative)


def _bound_rises(
    target: Target, g: GaussianApproximation, column: int, noise: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Points before and after, if the ELBO rises at every smaller scale; None otherwise."""
    first = max(float(g.loc[column]), BEGIN)
    scale = torch.diag(g.scale_tril) if g.scale_tril.dim() == 1 else g.scale_tril
    # Cholesky factor of the other coordinates given this one, which comes first in the order.
    order = [column, *(i for i in range(target.dim) if i != column)]
    factor = torch.linalg.qr(scale[order].mT).R.mT
    factor[:, 0] = 0.0
    inverse = torch.argsort(torch.tensor(order, device=factor.device))
    factor = factor[inverse]
    own = g.loc[column].exp()
    narrow = factor.norm(dim=-1) <= SHRINKING_RATIO * own
    narrow[column] = False

    def at(deeper: float) -> tuple[Tensor, float]:
        moved = first - deeper - float(g.loc[column])
        widths = torch.where(narrow, torch.full_like(g.loc, moved).exp(), 1.0)
        loc = g.loc.clone()
        loc[column] = first - deeper
        own = factor * torch.where(narrow, widths, 0.0)[:, None]
        for _ in range(NEWTON):
            # A smaller scale requires more accurate means.
            _, gradient = scores_in_chunks(target, loc[None])
            loc = loc + own @ (own.mT @ gradient[0])
        z = loc + (noise @ factor.mT) * widths
        return z, float(evaluate(target, z).mean()) + moved * int(narrow.sum())

    before, value = at(0.0)
    reached = before
    for step, deeper in zip((0.0, *FURTHER), FURTHER, strict=False):
        reached, now = at(deeper)
        if not now > value + RISE * (deeper - step):
            return None
        value = now
    return before, reached


def _responsible_site(target: Target, before: Tensor, after: Tensor) -> str:
    """The observed site whose likelihood rises most from some points to others; empty if none."""
    with torch.no_grad():
        low, high = target.log_likelihood(before), target.log_likelihood(after)
    gains = {name: float(high[name].sum() - low[name].sum()) for name in low}
    best = max(gains, key=lambda name: gains[name], default="")
    return best if best and gains[best] > 0 else ""


def _message(target: Target, name: str, data: str) -> str:
    why = ""
    if same := constant_data(target, data):
        why = f", because {same}"
    elif data:
        why = f", where the model meets values of the observed site '{data}' exactly"
    return (
        f"The posterior of {target.name} is improper: its density has no bound as '{name}' goes to "
        f"zero{why}. Use data that vary, fix '{name}', keep it above the rounding of the data, or "
        "give it a prior that vanishes at zero, such as a LogNormal or an InverseGamma."
    )


def constant_data(target: Target, name: str) -> str:
    """That all data of an observed site are the same, in words; empty if they are not."""
    values = target.observed.get(name)
    if values is None or values.numel() < 2 or not values.is_floating_point():
        return ""
    first = values.flatten()[0]
    if not bool((values == first).all()):
        return ""
    many = f"all {values.numel()} are {first:.6g}"
    return f"the data of the observed site '{name}' are constant ({many})"


def data_cause(target: Target, point: Tensor, far: Tensor) -> str:
    """Sentence on the property of the data for which a density does not fall between two points.

    Args:
        target: The log density.
        point: The point of the highest density, (D).
        far: The point at which the density should have fallen, (D).
    """
    with torch.no_grad():
        near, there = target.log_likelihood(point), target.log_likelihood(far)
    for name, value in there.items():
        data, total = target.observed[name], value.sum()
        if constant_data(target, name) and not total <= near[name].sum():
            words = constant_data(target, name)
            return (
                f" That is because {words}, and their scale goes to zero: use data that vary, fix "
                "the scale, or keep it above their rounding."
            )
        whole = bool((data == data.round()).all())
        if (
            whole
            and value.numel() > 1
            and bool((total.abs() <= CERTAIN_LOG_LIKELIHOOD) & (data != data.flatten()[0]).any())
        ):
            return (
                f" There every value of the observed site '{name}' is certain: the predictors "
                "separate the data perfectly."
            )
    return ""
