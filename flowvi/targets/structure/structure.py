"""Latents that are independent, or a chain, or one field, given the few shared ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowvi.runtime.arguments import check_type
from flowvi.runtime.display import Printed
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.candidates import NOTHING, Group, groups
from flowvi.targets.structure.joined import Units, joined
from flowvi.targets.structure.probe import MOST_ORDER, Probe
from flowvi.targets.structure.walk import MOST_SUMS
from flowvi.targets.target import Target

# Kinds of structure.
UNITS, CHAIN, FIELD, NONE = "units", "chain", "field", "none"
# Share of the latents beyond which shared ones are too many, and share of few of them.
MOST_SHARED, FEW_SHARED = 0.5, 0.1
# Largest number of latents of one time in a chain: a level, and noise of its own.
MOST_BESIDE = 2
# Largest number of latents of a field, whose precision matrix is dense.
MOST_FIELD = 2000
# Fewest latents that count as a chain or a field.
FEWEST = 10


@dataclass(frozen=True, repr=False)
class Structure(Printed):
    """How the latents of a model depend on each other, given the data.

    Attributes:
        kind: "units" (independent given the shared latents), "chain", "field", or "none".
        plate: Name of the axis of the local latents: a plate, or a dim of a site.
        sites: Names of the local sites.
        columns: Columns of z of each unit's latents, (G, d). A chain or a field is one unit. Units
            with fewer latents than others are filled up by columns behind the last one of z.
        shared: Columns of z of the other latents, (p).
        order: Largest distance along a chain at which latents depend on each other.
        reason: Why no larger group of latents is independent; empty if there is none.
        element: Unit of each element of the log density, (T); G for one of shared latents only.
        shared_sites: Names of the sites of the shared latents.
        padding: Number of columns that fill up units with fewer latents.
        names: Names of the units, if these are units of several plates.
        sums: How often the latents of a chain are summed first; they are increments of a walk.
        pattern: Pairs of a unit's latents on which one element of the log density depends,
            (d, d); empty if all may be.
    """

    kind: str
    plate: str = ""
    sites: tuple[str, ...] = ()
    columns: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    shared: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    order: int = 0
    reason: str = ""
    element: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False)
    shared_sites: tuple[str, ...] = ()
    padding: int = 0
    names: tuple[str, ...] = field(default=(), repr=False)
    pattern: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool), repr=False)
    sums: int = 0

    @property
    def local(self) -> int:
        """Number of local latents."""
        return self.columns.numel() - self.padding

    @property
    def units(self) -> int:
        """Number G of units."""
        return len(self.columns)

    @property
    def size(self) -> int:
        """Number d of latents of a unit, the largest one."""
        return self.columns.shape[1]

    def __bool__(self) -> bool:
        return self.kind != NONE

    def __str__(self) -> str:
        given = f"given {_count(len(self.shared), 'shared latent')}"
        if self.shared_sites:
            given += f" ({', '.join(self.shared_sites)})"
        local = ", ".join(self.sites)
        if self.kind == UNITS:
            most = "up to " if self.padding else ""
            each = f", {most}{self.size} latents each" if self.size > 1 else ""
            found = (
                f"{self.units:,} units of '{self.plate}' ({local}{each}) are independent {given}"
            )
        elif self.kind == CHAIN:
            what = "sums of" if self.sums else "latents of"
            found = f"{self.size:,} {what} {local} are a chain of order {self.order} {given}"
        elif self.kind == FIELD:
            found = f"{self.size:,} latents of {local} are one dense field {given}"
        else:
            return f"no structure: {self.reason}" if self.reason else "no structure"
        return f"{found}; {self.reason}" if self.reason else found


def structure(target: Target, seed: int = 0) -> Structure:
    """Find local latents that are independent, a chain, or a field given the shared latents.

    The log density is taken apart into the elements of its sums. Latents of a unit are moved,
    half of the units at a time by the digits of their binary numbers, and the elements that
    change are compared: units are independent if no element depends on two of them. Plates and
    axes only propose; the density decides.

    Args:
        target: From `from_pyro` or `from_density`.
        seed: Seed of the points at which latents are moved.

    Returns:
        The largest group of independent units; without one, a chain or a field. Its string says
        what was found.
    """
    check_type("target", target, Target, "what from_pyro or from_density returned")
    if not isinstance(target, GlobalTarget):
        return Structure(NONE, reason=f"{target.name} has latents for each row (local=)")
    if target.subsampled:
        return Structure(NONE, reason="rows are subsampled")
    if list(target.parameters()):
        return Structure(NONE, reason=f"{target.name} has parameters of its own")
    proposed = groups(target)
    if not proposed:
        return Structure(NONE, reason="no plate and no axis holds several latents")
    try:
        probe = Probe(target, seed)
    except TypeError:
        return Structure(NONE, reason="the log density is no recorded graph")
    reason, found = "", None
    for group in proposed:
        element, tie = probe.independent(group)
        if element is not None:
            found = Units(group, element)
            break
        reason = reason or tie
    if found is None:
        return _chain_or_field(probe, target, proposed, reason)
    units = _found(target, UNITS, *_with_others(probe, found, proposed), "")
    if len(units.shared) >= MOST_SHARED * target.dim:
        # As a field whose cells have noise of their own: the noise is independent, given the field.
        other = _chain_or_field(probe, target, proposed, reason, FEW_SHARED)
        if other:
            return other
    return replace(units, pattern=probe.pattern(units.columns))


def _chain_or_field(
    probe: Probe, target: GlobalTarget, proposed: list[Group], reason: str, share: float = 1.0
) -> Structure:
    """Local latents that depend on each other: a chain, of latents or of their sums, or a field.

    Args:
        probe: Elements of the log density.
        target: The log density.
        proposed: Groups of latents.
        reason: Why no group is independent.
        share: Largest share of latents that are left as shared ones.
    """
    proposed = [g for g in proposed if target.dim - g.columns.numel() <= share * target.dim]
    for sums in range(MOST_SUMS + 1):
        for group in proposed:
            length, beside = group.columns.shape
            if length < FEWEST or beside > (MOST_BESIDE if not sums else 1):
                continue
            # Latents of one time stand next to each other.
            line = group._replace(columns=group.columns.reshape(-1, 1))
            order = probe.of_sums(line, sums).order(line)
            if order <= min(MOST_ORDER, length // 4):
                one = line._replace(columns=line.columns.T)
                chain = _found(target, CHAIN, one, probe.of_one(), "", order)
                return replace(chain, sums=sums)
    for group in proposed:
        if FEWEST <= group.columns.numel() <= MOST_FIELD:
            one = group._replace(columns=group.columns.reshape(1, -1))
            return _found(target, FIELD, one, probe.of_one(), reason)
    return Structure(NONE, reason=reason)


def _with_others(probe: Probe, found: Units, proposed: list[Group]) -> Units:
    """Units, joined with other groups of independent units where that leaves them small."""
    for group in proposed:
        own = group.latents()
        if len(own) < FEWEST or torch.isin(own, found.group.latents()).any():
            continue
        element, _ = probe.units(group)
        more = None if element is None else joined(found, Units(group, element))
        if more is not None and not probe.hidden_tie(*more):
            found = more
    return found


def _found(
    target: Target, kind: str, group: Group, element: Tensor, reason: str, order: int = 0
) -> Structure:
    local = torch.zeros(target.dim, dtype=torch.bool)
    local[group.latents()] = True
    inside = {n for n, part in target.slices.items() if bool(local[part].any())}
    others = tuple(name for name in target.slices if name not in inside)
    shared = (~local).nonzero().flatten()
    names = tuple(name for name in target.slices if name in inside)
    columns, missing = group.columns.clone(), group.columns == NOTHING
    padding = int(missing.sum())
    columns[missing] = target.dim + torch.arange(padding)
    return Structure(
        kind,
        group.name,
        names,
        columns,
        shared,
        order,
        reason,
        element,
        others,
        padding,
        group.names,
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
