"""The rows of a local plate, and how a model is called with some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, default_collate

from flowvi.targets.schema import ModelError

# Index of a row that is not one of the captured rows.
NOWHERE = -1


class Batch(NamedTuple):
    """Some rows: their places (B,) in the fitted data, NOWHERE if new; their data, (B, *shape)."""

    places: Tensor
    data: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device."""
        return Batch(self.places.to(device), tuple(t.to(device) for t in self.data))


class Call(NamedTuple):
    """The rows in a call of the model.

    Attributes:
        data: Its arguments that have one entry a row, (M, *shape) each.
        size: Size N that the model gives the plate; None if it names none.
        subsample_size: How many rows the plate is to draw, if the model says so.
        subsample: Rows that the model itself gives the plate, if it does.
    """

    data: tuple[Tensor, ...]
    size: int | None
    subsample_size: int | None
    subsample: Any


@dataclass(frozen=True)
class Place:
    """Stands for the i-th of the data among the arguments."""

    index: int


class Arguments:
    """Arguments of a model, of which some tensors have one entry a row.

    A `torch.utils.data.Dataset`, or a `DataLoader` of one, stands for its items: a
    tuple for several arguments, everything else for one.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        size: Number of rows N; of the tensors, those whose first axis has that length are rows.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], size: int) -> None:
        self.size = size
        self._dataset, self._collate = _dataset_of(args)
        if self._dataset is None:
            self._leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
            self._is_row = [
                isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size for t in self._leaves
            ]
            self.data = tuple(t for t, row in zip(self._leaves, self._is_row, strict=True) if row)
            return
        self.data = ()
        self._leaves, self._spec, self._is_row = self._expanded(args, kwargs)

    def batch(self, index: Tensor | Sequence[int]) -> Batch:
        """The rows at some places."""
        index = torch.as_tensor(index)
        if self._dataset is None:
            return Batch(index, tuple(t[index.to(t.device)] for t in self.data))
        return Batch(index, self.collated([self._dataset[i] for i in index.tolist()]))

    def collated(self, items: list[Any]) -> tuple[Tensor, ...]:
        """The data of items of the data set."""
        leaves, _ = tree_flatten(self._collate(items))
        odd = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
        if odd:
            raise ModelError(f"Items of the data set must hold numbers; got {odd[0]}.")
        return tuple(leaves)

    def items(self) -> Dataset[Any] | None:
        """The data set behind the rows, where there is one."""
        return self._dataset

    def call(self, data: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments with other rows in place of the first ones."""
        rows = iter(data)
        pairs = zip(self._leaves, self._is_row, strict=True)
        args, kwargs = tree_unflatten([next(rows) if r else t for t, r in pairs], self._spec)
        return args, kwargs

    def places(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments with a `Place` for each tensor of rows."""
        return self.call([Place(i) for i in range(sum(self._is_row))])

    def _expanded(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], TreeSpec, list[bool]]:
        """Leaves, structure and kinds where items of a data set take the place of one argument."""
        assert self._dataset is not None
        item = self._collate([self._dataset[0]])
        out: list[Any] = []
        for arg in args:
            if not isinstance(arg, Dataset | DataLoader):
                out.append(arg)
            elif isinstance(item, list | tuple):
                out += item
            else:
                out.append(item)
        leaves, spec = tree_flatten((tuple(out), dict(kwargs)))
        rows = {id(leaf) for leaf in tree_flatten(item)[0]}
        return leaves, spec, [id(leaf) in rows for leaf in leaves]


def candidate_row_counts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """Numbers of rows that there may be, the most likely first."""
    dataset, _ = _dataset_of(args)
    if dataset is not None:
        return [len(dataset)]  # type: ignore[arg-type]
    leaves = tree_flatten((tuple(args), dict(kwargs)))[0]
    lengths = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
    return sorted(set(lengths), key=lambda n: (-lengths.count(n), -n))


def _dataset_of(args: Sequence[Any]) -> tuple[Dataset[Any] | None, Any]:
    for arg in args:
        if isinstance(arg, DataLoader):
            return arg.dataset, arg.collate_fn
        if isinstance(arg, Dataset):
            return arg, default_collate
    return None, None


def split_batch(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in smaller ones."""
    for start in range(0, len(batch.places), size):
        part = slice(start, start + size)
        yield Batch(batch.places[part], tuple(t[part] for t in batch.data))
