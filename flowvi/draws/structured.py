"""Draws of shared and local latents, weighted by estimates of the density of the shared ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.diagnostics import khat_threshold, psis_of_rows
from flowvi.diagnostics.rows import clearly_above_limit
from flowvi.draws.draws import Draws, scored
from flowvi.guides.guide import Guide
from flowvi.runtime.columns import Columns
from flowvi.runtime.display import Printed
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets.structure import MarginalTarget
from flowvi.targets.structure.candidates import SEVERAL
from flowvi.targets.structure.noise import is_wide, normal_variance
from flowvi.targets.structure.structure import UNITS as INDEPENDENT

# Label of the only unit of a chain or a field.
WHOLE = ("",)
# Random streams.
THETA, LOCAL, UNITS = 11, 12, 13
# Numbers of weights that are kept for the check of units, and draws of each unit at one theta.
WEIGHTS, FEWEST, MOST, MOVED, EACH = 30_000_000, 128, 2048, 128, 32
# Relative variance of the weights of a unit that matters to no result.
FLAT = 0.03
# Largest number of units named in a sentence or a table.
NAMED = 10
POINT, LOG_P, LOG_Q, BY_UNIT = range(4)
# Largest number of likelihoods of units that a table of draws holds (160 MB).
MOST_SCORES = 20_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Units(Printed):
    """How well the conditional of each unit fits, (G) each.

    Attributes:
        plate: Name of the axis of the units.
        labels: Labels of the units.
        khat: Pareto shape of the weights of the unit's draws.
        variance: Variance of these weights over the square of their mean, less that of a normal
            conditional.
        bad: Whether the unit is not to be trusted.
        draws: Number of draws of a unit.
    """

    plate: str
    labels: tuple[str, ...]
    khat: np.ndarray
    variance: np.ndarray
    bad: np.ndarray
    draws: int

    @property
    def names(self) -> list[str]:
        """Names of the units; a chain or a field has the name of its latents."""
        if self.labels == WHOLE:
            return [self.plate]
        if SEVERAL in self.plate:
            # Labels of units of several plates are names.
            return list(self.labels)
        return [f"{self.plate}[{label}]" for label in self.labels]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Columns for a file, (G) each."""
        return {
            "unit_khat": self.khat,
            "unit_variance": self.variance,
            "unit_bad": self.bad,
            "unit_draws": np.full(len(self.bad), self.draws),
        }

    @staticmethod
    def of_columns(table: Any) -> Units:
        """Read the columns back from a group of a file."""
        khat = table["unit_khat"]
        (plate,) = khat.dims
        values = {name: np.asarray(table[name].values) for name in table.data_vars}
        return Units(
            str(plate),
            tuple(map(str, khat[plate].values)),
            values["unit_khat"],
            values["unit_variance"],
            values["unit_bad"].astype(bool),
            int(values["unit_draws"][0]),
        )

    @property
    def reason(self) -> str:
        """A sentence on the units that are not to be trusted; empty if there are none."""
        if not self.bad.any():
            return ""
        places = np.flatnonzero(self.bad)
        if self.labels == WHOLE:
            return (
                f"The conditional of {self.plate} given the shared latents does not fit: the "
                f"weights of its draws have Pareto k-hat {self.khat[0]:.2f}, where the limit is "
                f"{khat_threshold(self.draws):.2f}."
            )
        worst = np.sort(places[np.argsort(-self.khat[places], kind="stable")][:NAMED])
        names = ", ".join(self.names[i] for i in worst)
        more = ", ..." if len(places) > NAMED else "."
        count = f"{len(places)} of {len(self.bad)} units of '{self.plate}'"
        verb = "is" if len(places) == 1 else "are"
        return (
            f"{count} {verb} not to be trusted: {names}{more} The conditional of such a unit does "
            "not fit: the weights of its draws have Pareto k-hat up to "
            f"{self.khat[places].max():.2f}, where the limit is "
            f"{khat_threshold(self.draws):.2f}."
        )

    def __str__(self) -> str:
        order = np.argsort(-self.khat, kind="stable")[:NAMED]
        lines = [f"{'unit':<24} {'k-hat':>7} {'variance':>10}"]
        for i in order:
            name = self.names[i]
            mark = "  not to be trusted" if self.bad[i] else ""
            lines.append(f"{name:<24} {self.khat[i]:>7.2f} {self.variance[i]:>10.2g}{mark}")
        return "\n".join(lines)


def theta_draws(
    target: MarginalTarget,
    guides: Sequence[Guide],
    n: int,
    seed: int,
) -> Draws:
    """Draw shared latents, with unbiased estimates of their density in place of it.

    Args:
        target: The density of the shared latents.
        guides: Their guides, one for each chain.
        n: Number of draws of each guide.
        seed: Seed of all draws.
    """
    generator = _generator(target, seed)
    with torch.no_grad(), isolated_rng(derive_seed(seed, THETA)):
        pieces = [guide.sample((n,)) for guide in guides]
        estimates = [
            torch.cat([found.log_p for found in target.corrected(theta, generator)])
            for theta, _ in pieces
        ]
        values = [target.constrain(theta) for theta, _ in pieces]
    z, log_q = (torch.stack(parts).cpu().numpy() for parts in zip(*pieces, strict=True))
    log_p = torch.stack(estimates).cpu().numpy()
    named = {
        name: torch.stack([value[name] for value in values]).cpu().numpy() for name in values[0]
    }
    return Draws(z, *scored(log_p, log_q), named, target)


def structured_draws(
    target: MarginalTarget,
    guides: Sequence[Guide],
    n: int,
    seed: int,
    meta: dict[str, Any] | None = None,
) -> Draws:
    r"""Draw all latents: the shared ones, then K of each unit, one of which is kept.

    The weight of a draw is :math:`\hat p(\theta) / q(\theta)` with the unbiased estimate of
    `Correction`. `log_q` is the log density of all latents less the log weight. The estimated
    likelihood of each unit is kept, if there are at most 20 million.

    Args:
        target: The density of the shared latents.
        guides: Guides of the shared latents, one for each chain.
        n: Number of draws of each guide.
        seed: Seed of all draws.
        meta: JSON-able facts about the fit.
    """
    generator = _generator(target, seed)
    columns: Columns[int | str] = Columns(n * len(guides))
    units = target.structure.units
    scored_units = 1 < units <= MOST_SCORES // (n * len(guides))
    with torch.no_grad(), isolated_rng(derive_seed(seed, THETA)):
        for guide in guides:
            theta, log_q = guide.sample((n,))
            start = 0
            for found in target.corrected(theta, generator):
                stop = start + len(found.z)
                log_w = found.log_p - log_q[start:stop]
                log_joint = found.log_joint
                piece: dict[int | str, Tensor | np.ndarray] = {
                    POINT: found.z,
                    LOG_P: log_joint,
                    LOG_Q: log_joint - log_w,
                }
                if scored_units:
                    piece[BY_UNIT] = found.by_unit
                piece.update(target.whole.constrain(found.z))
                columns.add(piece)
                start = stop
    table = {
        name: array.reshape(len(guides), n, *array.shape[1:])
        for name, array in columns.arrays.items()
    }
    z, *densities = (table.pop(number) for number in (POINT, LOG_P, LOG_Q))
    scores = table.pop(BY_UNIT, None)
    named = {str(name): array for name, array in table.items()}
    facts = dict(meta or {})
    return Draws(z, *scored(*densities), named, target.whole, facts, unit_scores=scores)


def check_units(target: MarginalTarget, theta: Tensor, seed: int) -> Units:
    """Judge the conditional of each unit by the weights of its draws at values of theta.

    Args:
        target: The density of the shared latents, with the conditionals.
        theta: Values of the shared latents, (S, p).
        seed: Seed of the draws.
    """
    count = target.structure.units
    # Draws of a chain or a field that are moved take many steps each.
    most = MOST if target.path.steps == 1 else MOVED
    draws = int(np.clip(WEIGHTS // count, FEWEST, most))
    generator = torch.Generator(target.device).manual_seed(derive_seed(seed, UNITS))
    points = theta[: max(1, math.ceil(draws / EACH))]
    weights = [
        found.log_weights.flatten(0, 1).float().cpu().numpy()
        for found in target.corrected(points, generator, EACH)
    ]
    log_w = np.concatenate(weights).T.astype(np.float64)
    relative = np.exp(np.minimum(log_w, 700.0))
    variance = relative.var(1) / np.maximum(relative.mean(1), 1e-300) ** 2
    # Wide noise has uneven weights also where the conditional is normal.
    size = target.structure.size
    if is_wide(EACH, size):
        variance = np.maximum(variance - normal_variance(size), 0.0)
    khat = np.full(count, -np.inf)
    uneven = variance > FLAT
    if uneven.any():
        khat[uneven] = psis_of_rows(log_w[uneven]).khat
    found = uneven & (khat >= khat_threshold(log_w.shape[1]))
    if found.any():
        found[uneven] &= clearly_above_limit(khat[uneven], log_w.shape[1])
    plate = target.structure.plate
    labels: Sequence[object] = target.structure.names or target.whole.coords.get(
        plate, range(count)
    )
    if target.structure.kind != INDEPENDENT:
        plate, labels = ", ".join(target.structure.sites), WHOLE
    return Units(plate, tuple(map(str, labels)), khat, variance, found, log_w.shape[1])


def _generator(target: MarginalTarget, seed: int) -> torch.Generator:
    return torch.Generator(target.device).manual_seed(derive_seed(seed, LOCAL))
