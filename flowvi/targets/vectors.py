"""Vectors that hold the values of all sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from flowvi.targets.schema import ModelError, Site

if TYPE_CHECKING:
    from flowvi.targets.target import Target


TRIES = 40
POINTS = 3


def split(
    flat: Tensor, sites: Mapping[str, Site], dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, Tensor]:
    """Cut the values of all sites in a row, (*), into one of each site's shape and type."""
    sizes = [Size(site.shape).numel() for site in sites.values()]
    pieces = zip(sites.items(), flat.split(sizes), strict=True)
    cut = {name: piece.reshape(site.shape) for (name, site), piece in pieces}
    return cut if dtypes is None else {name: v.to(dtypes[name]) for name, v in cut.items()}


def nearby(like: Tensor) -> Iterator[Tensor]:
    """Random points of R^D, nearer and nearer to zero, in the precision of a given one."""
    generator = torch.Generator().manual_seed(0)
    for i in range(TRIES):
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        yield (noise * (2.0 if i % 2 else 0.5) * (1 - i / TRIES)).to(like)


def finite_points(
    candidates: Iterator[Tensor], is_finite: Callable[[Tensor], bool]
) -> Tensor | None:
    """The first few points of finite density, (P, D), or None where there are none."""
    found: list[Tensor] = []
    for z in itertools.islice(candidates, TRIES):
        try:
            with torch.no_grad():
                finite = is_finite(z)
        except ModelError:
            raise
        except (ValueError, torch.linalg.LinAlgError):
            # A distribution refuses its parameters, or a matrix its factorisation: a bad point.
            continue
        if finite:
            found.append(z.detach())
        if len(found) == POINTS:
            break
    return torch.stack(found) if found else None


def label(target: Target, column: int) -> str:
    """The site of a column of z, with its place in the site."""
    name, part = next((n, s) for n, s in target.slices.items() if s.start <= column < s.stop)
    return name if part.stop - part.start == 1 else f"{name}[{column - part.start}]"
