"""Recipes of guides that are built for a given target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from flowvi.flows import FLOWS
from flowvi.guides.amortized import CONTEXT, Amortised, Encoder
from flowvi.guides.blocks import BlockGuide
from flowvi.guides.multiplicative import MultiplicativeGuide
from flowvi.guides.prefixes import PrefixGuide, prefix_guide
from flowvi.guides.registry import block_guide, make_guide, multiplicative_guide
from flowvi.targets import LocalTarget, Target


def amortised(target: LocalTarget, name: str = "realnvp", **sizes: Any) -> Amortised:
    """An amortised guide for a target, with a perceptron that reads its standardised rows.

    Args:
        target: The target.
        name: Row of `GUIDES` or `FLOWS`.
        **sizes: Of the guide or the flow, such as its depth.
    """
    sample = target.batch(torch.arange(min(target.rows, 1000))).data
    x = torch.cat([t.reshape(len(t), -1).to(target.dtype) for t in sample], -1)
    scale = x.std(0, correction=0)
    encoder = Encoder(x.shape[1], loc=x.mean(0), scale=torch.where(scale > 0, scale, 1.0))
    guide = make_guide(name, target.dim, CONTEXT, **sizes)
    return Amortised(encoder, guide).to(dtype=target.dtype, device=target.device)


@dataclass(frozen=True)
class Blocks:
    """A recipe for a guide by block: which guide each of a target's sites has.

    ``flowvi.fit(target, flowvi.Blocks({"head.*": "realnvp", "*": "meanfield"}))`` has a flow over
    all weights of the head together, and independent normals for the rest. The first
    pattern that fits a site counts, and all sites of a pattern are one block; "kronecker" makes
    one block of each site, a matrix of as many rows as its first axis is long.

    Args:
        guides: Glob pattern of site names -> name of a guide or flow.
        given: Pattern -> the patterns of other blocks that it depends on, all of them before it.
        sizes: Pattern -> sizes of its guide, such as ``{"depth": 4}``.
    """

    guides: Mapping[str, str]
    given: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def build(self, target: Target) -> BlockGuide:
        """The guide for a target.

        Raises:
            ValueError: A site has no pattern, a pattern no site, or what it depends on comes
                after it.
        """
        self._check()
        blocks: list[dict[str, Any]] = []
        numbers: dict[str, list[int]] = {}
        for pattern, sites in self._sites(target).items():
            wanted = self.given.get(pattern, ())
            others = [wanted] if isinstance(wanted, str) else list(wanted)
            late = [other for other in others if other not in numbers]
            if late:
                raise ValueError(
                    f"Block '{pattern}' can only be given blocks before it; got {late}."
                )
            block: dict[str, Any] = {
                "guide": self.guides[pattern],
                "given": [n for other in others for n in numbers[other]],
                "sizes": dict(self.sizes.get(pattern, {})),
            }
            alone = self.guides[pattern] == "kronecker"
            groups = [[site] for site in sites] if alone else [sites]
            numbers[pattern] = list(range(len(blocks), len(blocks) + len(groups)))
            for group in groups:
                spans = [target.slices[site] for site in group]
                columns = {"columns": [[s.start, s.stop] for s in spans]}
                rows = _rows(target, group[0]) if alone else {}
                blocks.append({**block, **columns, "sizes": rows | block["sizes"]})
        return block_guide(target.dim, blocks=blocks)

    def _check(self) -> None:
        for what in (self.given, self.sizes):
            for pattern in what:
                if pattern not in self.guides:
                    raise ValueError(
                        f"No block '{pattern}'; the blocks are {', '.join(self.guides)}."
                    )

    def _sites(self, target: Target) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {pattern: [] for pattern in self.guides}
        for site in target.sites:
            fitting = [pattern for pattern in self.guides if fnmatchcase(site, pattern)]
            if not fitting:
                raise ValueError(
                    f"Site '{site}' of {target.name} fits no pattern of {', '.join(self.guides)}; "
                    "add '*' for all others."
                )
            found[fitting[0]].append(site)
        for pattern, sites in found.items():
            if not sites:
                raise ValueError(
                    f"No site of {target.name} is left for pattern '{pattern}'; it has "
                    f"{', '.join(target.sites)}."
                )
        return found


def _rows(target: Target, site: str) -> dict[str, int]:
    """Rows of the matrix that a site is, where its unconstrained values have its shape."""
    shape, span = target.sites[site].shape, target.slices[site]
    fits = len(shape) > 1 and torch.Size(shape).numel() == span.stop - span.start
    return {"rows": shape[0] if fits else 1}


@dataclass(frozen=True)
class Prefixes:
    """A recipe for a flow whose depth is chosen when drawing: each prefix of it is a guide.

    ``flowvi.fit(target, flowvi.Prefixes("iaf", sizes={"depth": 6}))`` trains the mean of the
    bounds of all prefixes; ``fit.draw(layers=2)`` draws from the first two layers, and
    ``fit.prefixes()`` tells what each prefix is worth.

    Args:
        flow: Row of `FLOWS` that is made of layers.
        sizes: Of the flow, such as its depth.
    """

    flow: str = "realnvp"
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def build(self, target: Target) -> PrefixGuide:
        """The guide for a target.

        Raises:
            ValueError: There is no such flow, or it is one layer.
        """
        return prefix_guide(target.dim, 0, self.flow, self.sizes)


@dataclass(frozen=True)
class Multiplicative:
    """A recipe for a multiplicative normalizing flow over the weights of a network.

    ``flowvi.fit(target, flowvi.Multiplicative())`` scales each input of a weight matrix by a
    multiplier, and each filter of a convolution; one flow draws the multipliers of all
    layers. Sites with fewer than two axes, such as biases, have independent normals.

    Args:
        sites: Glob patterns of the sites that are scaled.
        flow: Row of `FLOWS`.
        sizes: Of the flow.
    """

    sites: str | Sequence[str] = "*"
    flow: str = "realnvp"
    sizes: Mapping[str, Any] = field(default_factory=lambda: {"depth": 4})

    def build(self, target: Target) -> MultiplicativeGuide:
        """The guide for a target.

        Raises:
            ValueError: No site with two axes fits, or there is no such flow.
        """
        if self.flow not in FLOWS:
            raise ValueError(f"No flow named '{self.flow}'; choose from {', '.join(FLOWS)}.")
        patterns = [self.sites] if isinstance(self.sites, str) else list(self.sites)
        matrices = []
        for name, site in target.sites.items():
            span, shape = target.slices[name], tuple(site.shape)
            fits = any(fnmatchcase(name, pattern) for pattern in patterns)
            if not fits or len(shape) < 2 or math.prod(shape) != span.stop - span.start:
                continue
            axis = 1 if len(shape) == 2 else 0
            matrices.append([span.start, shape[0], math.prod(shape[1:]), axis])
        if not matrices:
            raise ValueError(
                f"No site of {target.name} with two axes or more fits {', '.join(patterns)}; it "
                f"has {', '.join(f'{n} {tuple(s.shape)}' for n, s in target.sites.items())}."
            )
        return multiplicative_guide(target.dim, 0, matrices, self.flow, self.sizes)
