"""Missing values of observations with `obs_mask`: only these are latent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

OBSERVED, UNOBSERVED = "_observed", "_unobserved"


@dataclass(frozen=True, eq=False)
class Missing:
    """Which elements of a site are latent.

    Pyro makes two sites of an observation with `obs_mask`, each of all elements, and takes those
    of one where the other's are missing. The rest of the latent site has no density and is not
    read: it is no latent, and holds any constant.

    Args:
        name: Of the observation.
        keep: Which elements are latent, (*batch).
        like: The site's value in one run, (*batch, *event): the constant.
        dims: A name for each axis of the batch.
        unread: The unconstrained number that stands for elements that are not latent.
    """

    name: str
    keep: Tensor
    like: Tensor
    dims: tuple[str, ...]
    unread: float = 0.0

    @property
    def places(self) -> Tensor:
        """Positions of the n latent elements in the flattened batch, (n)."""
        found: Tensor = self.keep.reshape(-1).nonzero().squeeze(-1)
        return found

    @property
    def dim(self) -> str:
        """What the axis of the latent elements is called."""
        return f"{self.name}_missing"

    def pick(self, value: Tensor, lead: int = 0) -> Tensor:
        """The latent elements of all: (*lead, *batch, *any) -> (*lead, n, *any)."""
        last = lead + self.keep.dim()
        flat = value.reshape(*value.shape[:lead], -1, *value.shape[last:])
        return flat.index_select(lead, self.places.to(value.device))

    def fill(self, part: Tensor, lead: int = 0) -> Tensor:
        """All elements, the constant where they are not latent: the inverse of `pick`."""
        rest = self.like.to(part)
        return self._put(part, rest.expand(*part.shape[:lead], *rest.shape), lead)

    def spread(self, part: Tensor) -> Tensor:
        """Unconstrained numbers of all elements: (n, *any) -> (*batch, *any)."""
        return self._put(part, part.new_full((*self.keep.shape, *part.shape[1:]), self.unread), 0)

    def only(self, terms: Tensor) -> Tensor:
        """Terms of all elements, (*batch), zero where they are not latent."""
        return torch.where(self.keep.to(terms.device), terms, 0.0)

    def labels(self, coords: Mapping[str, Any]) -> list[Any]:
        """A label for each latent element: that of its row, or those of its axes.

        Args:
            coords: Labels along dims; positions stand for others.
        """
        axes = [coords.get(d, range(n)) for d, n in zip(self.dims, self.keep.shape, strict=True)]
        places = self.keep.nonzero().tolist()
        rows = [[axis[i] for axis, i in zip(axes, place, strict=True)] for place in places]
        return [row[0] if len(row) == 1 else ", ".join(map(str, row)) for row in rows]

    def same(self, other: Missing | None) -> bool:
        """Whether the same elements of the same shape are latent in another run."""
        return (
            other is not None
            and self.like.shape == other.like.shape
            and torch.equal(self.keep, other.keep)
        )

    def _put(self, part: Tensor, rest: Tensor, lead: int) -> Tensor:
        if part.shape[lead] == 0:
            return rest
        # Index of each element among the latent elements; the index of observed elements is unused.
        order = self.keep.reshape(-1).cumsum(0).sub(1).clamp(min=0).to(part.device)
        found = part.index_select(lead, order).reshape(rest.shape)
        after = rest.dim() - lead - self.keep.dim()
        keep = self.keep.to(part.device).reshape(*self.keep.shape, *(1,) * after)
        return torch.where(keep, found, rest)


def missing_of(
    site: Mapping[str, Any], nodes: Collection[str], dims: tuple[str, ...] = ()
) -> Missing | None:
    """Which elements of a site are latent; None where all are, or it is of no `obs_mask`.

    Args:
        site: A latent site of a run.
        nodes: Names of all sites of the run.
        dims: Of the site's value.
    """
    name = imputed(site)
    if name is None or f"{name}{OBSERVED}" not in nodes:
        return None
    value, mask = site["value"], site["mask"]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    if torch.broadcast_shapes(mask.shape, batch) != Size(batch):
        return None
    keep = mask.expand(batch).detach().clone()
    return Missing(name, keep, value.detach(), dims[: len(batch)])


def imputed(site: Mapping[str, Any]) -> str | None:
    """The observation that a latent site holds the missing elements of; None for other sites."""
    name = site["name"].removesuffix(UNOBSERVED)
    if name == site["name"] or site["is_observed"] or not isinstance(site["mask"], Tensor):
        return None
    return str(name)
