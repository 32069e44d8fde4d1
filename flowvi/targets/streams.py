"""Rows that come one after the other: data sets that can only be iterated, and tables on disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, default_collate

from flowvi.runtime.arguments import check_integer, check_type, optional
from flowvi.runtime.columns import Columns
from flowvi.runtime.tables import PARQUET, PIECE, parquet_rows, table_kind, table_pieces
from flowvi.targets.schema import ModelError
from flowvi.targets.tabular import as_tensor, kind_of, remedy

# Items that are put together at a time.
ITEMS = 1000
EXPECTED = "a torch IterableDataset, or the path of a table (.csv, .tsv, .parquet)"


def read_rows(source: Any, columns: Sequence[str] | None = None, *, size: int | None = None) -> Any:
    """Read all rows of a stream or of a table once, into tensors whose first axis is that of rows.

    Tensors that take more than their share of `max_memory` lie in unnamed temporary files, in the
    folder TMPDIR. So minibatches, subsampled plates and everything after a fit find any row, in
    any order, and a fit can be resumed. What a stream does anew at every pass, such as random
    transformations, is done once: `Minibatch(transform=)` does it at every visit.

    Args:
        source: An `IterableDataset` or the path of a table.
        columns: For a table: the columns to read, all by default.
        size: Number of rows N; needed for a stream without a length. With a table it is checked.

    Returns:
        Of a table, tensors (N) by column. Of a stream, what its items hold, with N of each tensor:
        a tensor, a tuple or a mapping.

    Raises:
        ValueError: The number of rows is not the given one, or a column holds no numbers.
    """
    size = optional(check_integer, "size", size)
    if isinstance(source, DataLoader | IterableDataset):
        if columns is not None:
            raise ValueError("columns are those of a table; a stream's items hold what they hold.")
        return _read_stream(source, size)
    check_type("source", source, (str, os.PathLike), EXPECTED)
    return _read_table(source, columns, size)


def is_stream(value: Any) -> bool:
    """Whether a value is a data set that can only be iterated, or a loader of one."""
    return isinstance(value.dataset if isinstance(value, DataLoader) else value, IterableDataset)


def with_rows_read(arguments: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments of a model with the rows of streams in place of these, where they have a length.

    Raises:
        ModelError: A stream does not say how many rows it has.
    """

    def read(name: str, value: Any) -> Any:
        if not is_stream(value):
            return value
        size = _length(value)
        if size is None:
            raise ModelError(
                f"The argument {name} is a stream that does not say how many rows it has: pass "
                "flowvi.read_rows(stream, size=N)."
            )
        return _read_stream(value, size)

    positional: list[Any] = []
    for i, value in enumerate(arguments):
        found = read(str(i + 1), value)
        # Items of several values are several arguments, as those of other data sets.
        positional += found if is_stream(value) and isinstance(found, tuple) else [found]
    return tuple(positional), {name: read(f"'{name}'", value) for name, value in named.items()}


def _read_stream(source: Any, size: int | None) -> Any:
    stream = source.dataset if isinstance(source, DataLoader) else source
    collate = source.collate_fn if isinstance(source, DataLoader) else default_collate
    n = _length(stream) if size is None else size
    if n is None:
        raise ValueError("size must be the number of rows of a stream without a length; got None.")
    columns: Columns[int] = Columns(n)
    items = iter(stream)
    spec: TreeSpec | None = None
    while part := list(itertools.islice(items, min(ITEMS, n - columns.filled))):
        leaves, found = tree_flatten(collate(part))
        odd = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
        if odd:
            raise ValueError(f"Items of a stream must hold numbers; got {odd[0]}.")
        if spec is not None and found != spec:
            raise ValueError("Items of a stream must all hold the same; later ones differ.")
        spec = found
        columns.add(dict(enumerate(leaves)))
    if columns.filled < n:
        raise ValueError(
            f"The stream has {columns.filled} rows, not the {n} of size; give size="
            f"{columns.filled} if that is all of them."
        )
    if next(items, columns) is not columns:
        raise ValueError(f"The stream has more rows than the {n} of size.")
    assert spec is not None
    whole = tree_unflatten([as_tensor(columns.arrays[i]) for i in columns.arrays], spec)
    return tuple(whole) if isinstance(whole, list) else whole


def _length(stream: Any) -> int | None:
    rows: Any = stream.dataset if isinstance(stream, DataLoader) else stream
    try:
        return len(rows)
    except (TypeError, NotImplementedError):
        return None


def _read_table(
    path: str | os.PathLike[str], names: Sequence[str] | None, size: int | None
) -> dict[str, Tensor]:
    if table_kind(path) in PARQUET:
        found = parquet_rows(path)
        pieces: Iterator[Any] = table_pieces(path, names, PIECE)
    else:
        (table,) = table_pieces(path, names)
        found, pieces = len(table), iter([table])
    if size is not None and size != found:
        raise ValueError(f"{path} has {found} rows, not the {size} of size.")
    if not found:
        raise ValueError(f"{path} has no rows.")
    columns: Columns[str] = Columns(found)
    for piece in pieces:
        new = {str(name): _numbers(path, str(name), piece[name]) for name in piece.columns}
        for name, array in columns.arrays.items():
            if not np.can_cast(new[name].numpy().dtype, array.dtype):
                raise ValueError(
                    f"Column '{name}' of {path} has missing values among whole numbers or "
                    "booleans, in some parts of the file: fill them, or save the column as floats."
                )
        columns.add(new)
    return {name: as_tensor(array) for name, array in columns.arrays.items()}


def _numbers(path: Any, name: str, column: Any) -> Tensor:
    kind = kind_of(column)
    if kind is not None:
        raise ValueError(
            f"Column '{name}' of {path} holds {kind}, and a tensor numbers: read it with "
            f"flowvi.read_table and pass {remedy(kind, f'table[{name!r}]')}, or leave it out, "
            "columns=[...]."
        )
    found = as_tensor(column)
    assert isinstance(found, Tensor)
    return found
