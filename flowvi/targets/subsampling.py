"""Batches of rows of subsampled plates: how they cover all rows, and how to put them together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Plates = Mapping[str, tuple[int, int]]
RowIndices = dict[str, Tensor]


def cover(plates: Plates, device: torch.device | None = None) -> Iterator[tuple[float, RowIndices]]:
    """Batches and weights whose weighted densities add up to that of all rows.

    Args:
        plates: Plate -> its size N and batch size B.
        device: Where the indices are wanted.
    """
    parts = [_cover_one(size, batch, device) for size, batch in plates.values()]
    for combination in itertools.product(*parts):
        weight = math.prod(w for w, _ in combination)
        yield weight, dict(zip(plates, (rows for _, rows in combination), strict=True))


def _cover_one(size: int, batch: int, device: torch.device | None) -> list[tuple[float, Tensor]]:
    """Batches of one plate, and their weights.

    A plate of N rows and batches of B scales its rows by N / B, so disjoint
    batches of weight B / N add up. They leave R = N mod B rows. With
    P any B - R other rows and p one row, those are

        (R + P) - (P + R times p) + R / B (B times p).
    """
    rows = torch.arange(size, device=device)
    whole, rest = size - size % batch, size % batch
    parts = [(batch / size, rows[i : i + batch]) for i in range(0, whole, batch)]
    if rest:
        other, one = rows[: batch - rest], rows[:1]
        parts += [
            (batch / size, torch.cat([rows[whole:], other])),
            (-batch / size, torch.cat([other, one.expand(rest)])),
            (rest / size, one.expand(batch)),
        ]
    return parts


def assemble(
    pieces: Iterable[tuple[RowIndices, Mapping[str, Tensor]]],
    plates: Plates,
    dims: Mapping[str, Sequence[str]],
    lead: int = 0,
) -> dict[str, Tensor]:
    """Assemble values of batches into arrays of all rows.

    Args:
        pieces: Batches, and the values of their rows.
        plates: Plate -> its size N and batch size B.
        dims: Name of a value -> the plates, or other dims, of its axes.
        lead: Number of axes before those.
    """
    out: dict[str, Tensor] = {}
    if not plates:
        return dict(next(iter(pieces))[1])
    for batch, values in pieces:
        for name, value in values.items():
            axes = list(zip(dims[name], value.shape[lead:], strict=False))
            shape = [plates.get(dim, (n,))[0] for dim, n in axes]
            if name not in out:
                out[name] = value.new_zeros((*value.shape[:lead], *shape))
            places = [batch.get(d, torch.arange(n, device=value.device)) for d, n in axes]
            # Without axes there is one place, and meshgrid wants at least one.
            grid: tuple[Any, ...] = torch.meshgrid(*places, indexing="ij") if places else ()
            out[name][(..., *grid)] = value
    return out
