"""A log density of one row, written by hand, as a target with local latents."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flowvi.targets.local.rows import Arguments, candidate_row_counts
from flowvi.targets.local.schema import LocalFacts, RowFunctions
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.precision import precisions
from flowvi.targets.recording.capture import Trial, capture, capture_values
from flowvi.targets.schema import ModelError, Site
from flowvi.targets.streams import with_rows_read
from flowvi.targets.vectors import finite_points, nearby


class Plain(Protocol):
    """A density by hand, with its sites laid out."""

    name: str
    dim: int
    log_prob: Any
    sites: dict[str, Site]
    slices: dict[str, slice]
    precision: torch.dtype | None

    def in_precision(self, dtype: torch.dtype, *row: Tensor) -> None: ...
    def density(self, z: Tensor, *row: Tensor) -> Tensor: ...
    def values(self, z: Tensor) -> dict[str, Tensor]: ...
    def inverse(self, flat: Tensor) -> Tensor: ...
    def dims(self) -> dict[str, tuple[str, ...]]: ...


class PlainRows:
    """One density of a row on its way to a target.

    Args:
        plain: The density.
        data: What has one entry a row.
        local: Name of the rows.
    """

    def __init__(self, plain: Plain, data: Any, local: str) -> None:
        self.plain, self.local = plain, local
        given = list(data) if isinstance(data, list | tuple) else [data]
        columns, _ = with_rows_read(given, {})
        columns = [torch.as_tensor(c) if isinstance(c, np.ndarray) else c for c in columns]
        for c in columns:
            if not isinstance(c, Tensor | Dataset | DataLoader):
                raise ModelError(
                    "data must be a tensor, a Dataset, a DataLoader or a tuple of tensors; got "
                    f"{type(c).__name__}."
                )
        self.rows = Arguments(columns, {}, candidate_row_counts(columns, {})[0])
        self.own: dict[str, nn.Parameter] = {}
        if isinstance(plain.log_prob, nn.Module):
            learned = plain.log_prob.named_parameters()
            self.own = {name: p for name, p in learned if p.requires_grad}

    def target(self) -> LocalTarget:
        """Find points and capture the density."""
        plain = self.plain
        last = min(1, self.rows.size - 1)
        inputs = [
            [*self.own.values(), *(t[0] for t in self.rows.batch([i]).data)] for i in (0, last)
        ]
        data = inputs[0][len(self.own) :]
        if {torch.float64} == precisions(data) - {torch.get_default_dtype()}:
            plain.in_precision(torch.float64, *data)
        like = torch.zeros(plain.dim, dtype=plain.precision)
        points = finite_points(
            nearby(like), lambda z: bool(self._density(z, *inputs[0]).isfinite())
        )
        if points is None:
            raise ModelError(
                f"{plain.name} is not finite for the first row at any point near the centre of the "
                "supports; check the supports of the sites and the scale of the data."
            )
        trial = Trial(points, inputs[0], inputs[1:])
        density = capture(self._density, trial, plain.name, reads=True, double=False)
        flat = torch.stack(
            [torch.cat([v.reshape(-1) for v in plain.values(p).values()]) for p in points]
        )
        functions = RowFunctions(
            capture_values(self._terms, trial, density),
            capture_values(lambda z, *_: plain.values(z), trial, density),
            capture_values(lambda f, *_: plain.inverse(f), Trial(flat, inputs[0]), density),
        )
        facts = LocalFacts(
            plain.name,
            self.local,
            plain.sites,
            plain.slices,
            deterministics=(),
            observed=(),
            dims=plain.dims(),
            rows=self.rows,
            parts=False,
        )
        return LocalTarget(facts, functions, None, self.own)

    def _density(self, z: Tensor, *inputs: Tensor) -> Tensor:
        return self.plain.density(z, *inputs[len(self.own) :])

    def _terms(self, z: Tensor, *inputs: Tensor) -> Tensor:
        log_p = self._density(z, *inputs)
        return torch.stack([log_p, torch.zeros_like(log_p)])
