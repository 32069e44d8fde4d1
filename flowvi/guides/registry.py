"""Guides by name: builders of one guide from a dimension and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowvi.flows import BASES, FLOWS, LowRank, Triangular
from flowvi.guides.blocks import Block, BlockGuide
from flowvi.guides.gaussian import FullRank, KroneckerNormal, LowRankNormal, MeanField
from flowvi.guides.guide import FULL_RANK_DIM, Guide
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.multiplicative import MultiplicativeGuide
from flowvi.guides.prefixes import prefix_guide
from flowvi.guides.pushforward import FlowGuide
from flowvi.guides.skewed import SkewedNormal
from flowvi.runtime.arguments import check_integer, optional, unknown_choice


def mixture(
    dim: int,
    context_dim: int = 0,
    components: int = 3,
    component: str = "realnvp",
    parts: Sequence[Mapping[str, Any]] | None = None,
) -> MixtureGuide:
    """A mixture of guides, of one kind unless told otherwise.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        components: Number of components M.
        component: Name of their kind, for `make_guide`.
        parts: For components of different kinds, the arguments of `make_guide` for each.
    """
    kinds = [{"name": component}] * components if parts is None else parts
    made = [make_guide(dim=dim, context_dim=context_dim, **kind) for kind in kinds]
    return MixtureGuide(made, context_dim=context_dim)


GUIDES: dict[str, Callable[..., Guide]] = {
    "fullrank": FullRank,
    "kronecker": KroneckerNormal,
    "lowrank": LowRankNormal,
    "meanfield": MeanField,
    "mixture": mixture,
    "skewed": SkewedNormal,
}
# Guides that draw z together with other variables: see `Guide.joint`.
JOINT_GUIDES: dict[str, Callable[..., Guide]] = {}
# Guides that stand for several densities, whose objective is the mean of theirs.
MANY_GUIDES: dict[str, Callable[..., Guide]] = {"prefixes": prefix_guide}


def make_guide(
    name: str, dim: int, context_dim: int = 0, base: str = "normal", **sizes: Any
) -> Guide:
    """Build a guide by name: a row of `GUIDES`, or a flow of `FLOWS` on an affine layer.

    That layer is of full rank up to D = 2000, and of low rank beyond.

    Args:
        name: Name of the guide or flow.
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        base: Name of the density that a flow starts from, a row of `BASES`.
        **sizes: Of the guide or the flow, such as its depth.

    Raises:
        ValueError: There is no such name, or the depth is no whole number of at least 1.
    """
    named = {**JOINT_GUIDES, **MANY_GUIDES, **GUIDES}
    if name in named:
        return named[name](dim, context_dim, **sizes)
    if name in FLOWS:
        optional(check_integer, "depth", sizes.get("depth"))
        flow = FLOWS[name](dim, context_dim, **sizes)
        affine = Triangular if dim <= FULL_RANK_DIM else LowRank
        return FlowGuide(dim, flow, affine(dim, context_dim), BASES[base](dim))
    raise ValueError(unknown_choice("guide", name, sorted(guide_names())))


def starts_diagonal(name: str) -> bool:
    """Whether the guide of a name makes no use of correlations when it starts: see `Guide.flat`."""
    kind = GUIDES.get(name)
    return isinstance(kind, type) and issubclass(kind, Guide) and kind.flat


def guide_names() -> set[str]:
    """All names that `make_guide` takes."""
    return {*GUIDES, *JOINT_GUIDES, *MANY_GUIDES, *FLOWS}


def block_guide(
    dim: int, context_dim: int = 0, blocks: Sequence[Mapping[str, Any]] | None = None
) -> BlockGuide:
    """A guide of blocks that have a name each.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        blocks: For each, "columns", a list of [start, stop) stretches; "guide", a name; and
            perhaps "given", a list of numbers of earlier blocks, and "sizes", for
            `make_guide`. By default two halves of full rank, the second given the first.
    """
    if blocks is None:
        half = dim // 2
        first = [{"columns": [[0, half]], "guide": "fullrank"}] if half else []
        blocks = [*first, {"columns": [[half, dim]], "guide": "fullrank", "given": [0][:half]}]
    parts: list[Block] = []
    for block in blocks:
        columns = tuple(c for start, stop in block["columns"] for c in range(start, stop))
        given = tuple(block.get("given", ()))
        width = context_dim + sum(len(parts[g].columns) for g in given)
        made = make_guide(block["guide"], len(columns), width, **block.get("sizes", {}))
        parts.append(Block(made, columns, given))
    return BlockGuide(parts, {"blocks": [dict(block) for block in blocks]})


# Registered last, because a block guide consists of other guides.
GUIDES["blocks"] = block_guide


def multiplicative_guide(
    dim: int,
    context_dim: int = 0,
    matrices: Sequence[Sequence[int]] | None = None,
    flow: str = "realnvp",
    sizes: Mapping[str, Any] | None = None,
) -> MultiplicativeGuide:
    """Weights whose inputs are scaled by noise from a flow: a multiplicative normalizing flow.

    Args:
        dim: Length D of the latent vector.
        context_dim: Must be 0: the guide takes no context.
        matrices: For each, its first column of z, its rows and columns, and the axis with a unit
            for each of its places; without, every coordinate is a unit.
        flow: Row of `FLOWS`.
        sizes: Of the flow.
    """
    if context_dim:
        raise ValueError(f"A multiplicative guide takes no context; got context_dim={context_dim}.")
    given = [[0, 1, dim, 1]] if matrices is None else [list(m) for m in matrices]
    units, many = np.full(dim, -1), 0
    for start, rows, columns, axis in given:
        place = np.indices((rows, columns))[axis].reshape(-1)
        units[start : start + rows * columns] = many + place
        many += (rows, columns)[axis]
    spec = {"matrices": given, "flow": flow, "sizes": dict(sizes or {})}
    return MultiplicativeGuide(units, flow, sizes, spec)


JOINT_GUIDES["multiplicative"] = multiplicative_guide
