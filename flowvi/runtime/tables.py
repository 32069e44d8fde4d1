"""Tables on disk: CSV, and Parquet with pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
PACKED = (".gz", ".bz2", ".xz", ".zip")
# Rows that are read at a time.
PIECE = 65_536


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table with a line of names: CSV or TSV, also compressed, or Parquet.

    Args:
        path: A file that ends in .csv, .tsv, .csv.gz or .parquet, for example.
        columns: Names of the columns to read; all by default.

    Raises:
        ValueError: The file is of another kind or cannot be read, has no such column, or is
            Parquet and pyarrow is missing.
    """
    import pandas as pd  # slow to import

    pieces = list(table_pieces(path, columns))
    return pieces[0] if len(pieces) == 1 else pd.concat(pieces, ignore_index=True)


def table_pieces(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, piece: int | None = None
) -> Iterator[pd.DataFrame]:
    """The rows of a table in pieces, at least one; CSV in one piece, since its types are inferred.

    Args:
        path: As for `read_table`.
        columns: As for `read_table`.
        piece: Largest number of rows of a piece of Parquet; all rows by default.
    """
    file, kind = Path(path), table_kind(path)
    if kind in PARQUET:
        yield from _parquet(file, columns, piece)
        return
    import pandas as pd  # slow to import

    try:
        table = pd.read_csv(file, sep=SEPARATORS[kind])
    except (OSError, ValueError) as error:  # errors of the parser are ValueErrors
        raise ValueError(f"{file} cannot be read as a table: {error}") from None
    _check_columns(file, table.columns, columns)
    yield table if columns is None else table[list(columns)]


def table_kind(path: str | os.PathLike[str]) -> str:
    """The ending that says how a table is written, without that of its compression.

    Raises:
        ValueError: There is no such ending.
    """
    endings = [end.lower() for end in Path(path).suffixes if end.lower() not in PACKED]
    kind = endings[-1] if endings else ""
    if kind not in (*SEPARATORS, *PARQUET):
        raise ValueError(
            f"{path} is no table that is known by its ending; expected one of "
            f"{', '.join([*SEPARATORS, *PARQUET])}."
        )
    return kind


def is_table_file(path: str | os.PathLike[str]) -> bool:
    """Whether the ending of a file is that of a table."""
    try:
        table_kind(path)
    except ValueError:
        return False
    return True


def parquet_rows(path: str | os.PathLike[str]) -> int:
    """Number of rows of a Parquet file, from its footer."""
    return int(_open_parquet(Path(path)).metadata.num_rows)


def _parquet(
    file: Path, columns: Sequence[str] | None, piece: int | None
) -> Iterator[pd.DataFrame]:
    opened = _open_parquet(file)
    _check_columns(file, opened.schema_arrow.names, columns)
    kept = None if columns is None else list(columns)
    if piece is None or not opened.metadata.num_rows:
        yield opened.read(columns=kept).to_pandas()
        return
    for batch in opened.iter_batches(piece, columns=kept):
        yield batch.to_pandas()


def _open_parquet(file: Path) -> Any:
    if find_spec("pyarrow") is None:
        raise ValueError(
            f"{file} is a Parquet file, which pyarrow reads: pip install 'flowvi[parquet]', or "
            "save the table as CSV."
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from None


def _check_columns(file: Path, found: Any, wanted: Sequence[str] | None) -> None:
    lacking = [name for name in wanted or () if name not in list(found)]
    if lacking:
        raise ValueError(
            f"{file} has no column '{lacking[0]}'; its columns are {', '.join(map(str, found))}."
        )
