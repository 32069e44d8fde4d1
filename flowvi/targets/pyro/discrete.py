"""Discrete latents that are summed out: their values, and runs of a model at some of these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor

from flowvi.targets.pyro.handlers import is_imputed
from flowvi.targets.schema import ModelError

# Distributions that wrap another one with the same values.
WRAPPERS = (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)
# Settings of enumeration in the `infer` of a site.
SETTINGS = ("enumerate", "num_samples", "tmc", "expand")
# Joint values of discrete sites that are summed one by one.
MOST = 4096


class MarkEnumerated(Messenger):
    """Mark the discrete latents that are summed out, before the sites of a model are enumerated.

    - A mask applies to what depends on a discrete site, not to the site's own probability: the
      values of a masked row would otherwise be counted and not averaged.
    - `infer={"enumerate": "sequential"}` and settings for samples of values ask for the same sum.
    - Pyro gives the missing rows of an observation (`obs_mask=`) none of the site's `infer`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name, fn, infer = msg["name"], msg["fn"], msg["infer"]
        if msg["is_observed"]:
            self.observed.add(name)
            return
        asked = infer.get("enumerate") in ("parallel", "sequential")
        rest = {k: v for k, v in infer.items() if k not in SETTINGS}
        if not is_finite(fn):
            msg["infer"] = rest
        elif asked or is_imputed(msg, self.observed):
            while isinstance(fn, dist.MaskedDistribution):
                fn = fn.base_dist
            msg["fn"], msg["mask"], msg["infer"] = fn, None, {**rest, "enumerate": "parallel"}


class FixDiscrete(Messenger):
    """Fix discrete sites at values, given by their index among all values of the site.

    Args:
        places: Site -> places, one for each of its elements.
    """

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.places = places

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.places:
            values, places = values_of(msg["name"], msg["fn"]), self.places[msg["name"]]
            chosen = values.index_select(0, places.reshape(-1).to(values.device))
            msg["value"], msg["done"] = chosen.reshape((*places.shape, *values.shape[1:])), True


def elementary(fn: Any) -> Any:
    """The distribution of a single element."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def is_finite(fn: Any) -> bool:
    """Whether each element of a distribution's values is one of a few."""
    return bool(getattr(elementary(fn), "has_enumerate_support", False))


def values_of(name: str, fn: Any) -> Tensor:
    """All values of one element of a site, (K, *event)."""
    inner = elementary(fn)
    try:
        values: Tensor = inner.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ModelError(
            f"Site '{name}' ({type(inner).__name__}) cannot be summed out, for its rows differ in "
            f"what values they have ({str(error).rstrip('.')}). Give all of them the same set."
        ) from error
    return values.reshape(len(values), *inner.event_shape)


@dataclass(frozen=True)
class JointValues:
    """Joint values of some discrete sites, as places among the values of each element.

    Args:
        shapes: Elements of each site.
        counts: How many values an element of each site has.
    """

    shapes: Mapping[str, Size]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, sites: Mapping[str, Any], names: Sequence[str]) -> JointValues:
        """Those of the named sites of a run in which they were drawn."""
        shapes, counts = {}, {}
        for name in names:
            fn, value = sites[name]["fn"], sites[name]["value"]
            shapes[name] = value.shape[: value.dim() - elementary(fn).event_dim]
            counts[name] = len(values_of(name, fn))
        return cls(shapes, counts)

    @property
    def number(self) -> int:
        """How many joint values there are."""
        return math.prod(self.counts[name] ** n.numel() for name, n in self.shapes.items())

    def all(self) -> Tensor:
        """Every joint value, (number, elements)."""
        ranges = [range(k) for k in self._by_element()]
        return torch.tensor(list(itertools.product(*ranges)), dtype=torch.long)

    def some(self, n: int, seed: int) -> Tensor:
        """The first one, the last one, and n others at random, (n + 2, elements)."""
        counts = torch.tensor(self._by_element())
        drawn = torch.rand(n, len(counts), generator=torch.Generator().manual_seed(seed))
        rows = (drawn * counts).long()
        return torch.cat([torch.zeros_like(counts)[None], counts[None] - 1, rows])

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """One joint value, by site."""
        parts = row.split([shape.numel() for shape in self.shapes.values()])
        return {n: p.reshape(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def _by_element(self) -> list[int]:
        return [self.counts[n] for n, s in self.shapes.items() for _ in range(s.numel())]
