"""Vectors that hold the values of all sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

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
            # Invalid parameters, or a matrix without a factorisation: reject the point.
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


def flattened(
    values: Mapping[str, Any], sites: Mapping[str, Site], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Values of all sites side by side. Each (*S, *shape) -> (*S, numbers of all sites).

    Args:
        values: By the names of sites.
        sites: In the order that is wanted.
        dtype: Precision of the result.
        device: Where it is wanted.

    Raises:
        ValueError: A site is missing, or a shape does not fit.
    """
    columns: list[Tensor] = []
    for name, site in sites.items():
        if name not in values:
            came = ", ".join(values) or "none"
            raise ValueError(f"unconstrain needs a value for site '{name}'; got {came}.")
        value = torch.as_tensor(values[name], device=device).to(dtype)
        cut = value.dim() - len(site.shape)
        if cut < 0 or tuple(value.shape[cut:]) != tuple(site.shape):
            raise ValueError(
                f"Site '{name}' has shape {tuple(site.shape)}; got a value of shape "
                f"{tuple(value.shape)}, whose last axes should be that."
            )
        lead = tuple(value.shape[:cut])
        if columns and lead != tuple(columns[0].shape[:-1]):
            raise ValueError(
                f"All sites need the same leading shape; '{name}' has {lead}, those before "
                f"it {tuple(columns[0].shape[:-1])}."
            )
        columns.append(value.reshape(*lead, -1))
    return torch.cat(columns, -1)
