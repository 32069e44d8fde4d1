"""Columns of a table: their kinds, their numbers, and refusals by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowvi.targets.tabular import NUMBERS, as_tensor, kind_of, remedy

if TYPE_CHECKING:
    import pandas as pd

FLOAT, BINARY, CATEGORY, COUNT = "float", "binary", "category", "count"
LIKELIHOODS = {FLOAT: "Gaussian", BINARY: "Bernoulli", CATEGORY: "categorical", COUNT: "counts"}
# More levels than this, with less than so many rows of each, are names of rows and no categories.
MOST_LEVELS, ROWS_OF_LEVEL = 50, 4
# Whole numbers beyond this lose digits.
LARGEST = 2**53


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its name.
        kind: "float", "binary", "category" or "count".
        levels: Its values in the order of their codes, for "binary" and "category".
        mean: Mean of its numbers.
        sd: Standard deviation of its numbers.
    """

    name: str
    kind: str
    levels: tuple[Any, ...] = ()
    mean: float = 0.0
    sd: float = 1.0

    @property
    def likelihood(self) -> str:
        """Name of the likelihood of its values."""
        if self.kind == COUNT:
            return "negative binomial" if self.sd**2 > self.mean else "Poisson"
        return LIKELIHOODS[self.kind]

    @property
    def outputs(self) -> int:
        """Number of outputs of a decoder for it."""
        return len(self.levels) if self.kind == CATEGORY else 1

    def facts(self) -> dict[str, Any]:
        """All attributes, in the form of JSON."""
        return {**asdict(self), "levels": [str(level) for level in self.levels]}


def columns_of(table: pd.DataFrame) -> list[Column]:
    """The columns of a table, with the kind of each.

    Columns of 0 and 1 or of booleans are binary, those of strings or categories are categories,
    those of whole numbers from 0 are counts, and all others are floats.

    Raises:
        ValueError: A column has missing or infinite values, is constant, holds neither numbers nor
            categories, or names the rows; the message has its name.
    """
    if not len(table.columns):
        raise ValueError("The table has no columns.")
    twice = [str(name) for name in table.columns[table.columns.duplicated()]]
    if twice:
        raise ValueError(f"The table has more than one column '{twice[0]}': rename them.")
    return [_column(str(name), table[name]) for name in table.columns]


def encoded(table: pd.DataFrame, columns: Sequence[Column]) -> Tensor:
    """The table in numbers, categories as codes, (N, C), in the default precision."""
    found = []
    for column in columns:
        values = table[column.name]
        if column.levels:
            codes = {level: i for i, level in enumerate(column.levels)}
            found.append(torch.tensor([codes[v] for v in _plain(values)], dtype=torch.float64))
        else:
            found.append(as_tensor(values).double())
    return torch.stack(found, 1).to(torch.get_default_dtype())


def decoded(values: Tensor, columns: Sequence[Column]) -> pd.DataFrame:
    """Numbers (N, C) as a table, codes as categories again."""
    import pandas as pd  # slow to import

    numbers = values.detach().double().cpu().numpy()
    made: dict[str, Any] = {}
    for column, x in zip(columns, numbers.T, strict=True):
        if column.levels:
            made[column.name] = np.array(column.levels, dtype=object)[x.astype(int)]
        else:
            made[column.name] = x.round().astype(np.int64) if column.kind == COUNT else x
    return pd.DataFrame(made).infer_objects()


def _column(name: str, values: Any) -> Column:
    missing = int(values.isna().sum())
    if missing:
        raise ValueError(
            f"Column '{name}' has {missing} missing values of {len(values)}: leave out these rows "
            "(table.dropna()) or the column, or fill them in."
        )
    kind = kind_of(values)
    if kind in ("strings", "categories"):
        return _categories(name, values)
    if kind is not None:
        raise ValueError(
            f"Column '{name}' holds {kind}, for which there is no likelihood: pass "
            f"{remedy(kind, f'table[{name!r}]')}."
        )
    numbers = np.asarray(as_tensor(values))
    if numbers.dtype.kind not in NUMBERS or numbers.dtype.kind == "c":
        raise ValueError(f"Column '{name}' holds {numbers.dtype}; expected real numbers.")
    return _numbers(name, numbers)


def _numbers(name: str, x: np.ndarray) -> Column:
    if not np.isfinite(x).all():
        raise ValueError(f"Column '{name}' has infinite values: leave out these rows.")
    seen = np.unique(x)
    if len(seen) < 2:
        raise _constant(name, seen[0])
    if x.dtype.kind == "b" or (len(seen) == 2 and set(seen.tolist()) == {0, 1}):
        return Column(name, BINARY, tuple(seen.tolist()), float(x.mean()), float(x.std()))
    whole = x.dtype.kind in "iu"
    if whole and len(seen) == len(x) > MOST_LEVELS and seen[-1] - seen[0] == len(x) - 1:
        raise _names_rows(name, "numbers the rows")
    numbers = x.astype(np.float64)
    # Two passes: large numbers of little spread would lose it.
    mean = float(numbers.mean())
    kind = COUNT if whole and seen[0] >= 0 and seen[-1] < LARGEST else FLOAT
    return Column(name, kind, (), mean, float((numbers - mean).std()))


def _categories(name: str, values: Any) -> Column:
    plain = _plain(values)
    known = getattr(values.dtype, "categories", None)
    seen = set(plain)
    # Categories have an order of their own; those that no row has are left out.
    order = sorted(seen, key=str) if known is None else [v for v in known.tolist() if v in seen]
    if len(order) < 2:
        raise _constant(name, order[0])
    if len(order) > MOST_LEVELS and len(order) * ROWS_OF_LEVEL > len(plain):
        raise _names_rows(name, f"has {len(order)} different values in {len(plain)} rows")
    return Column(name, CATEGORY, tuple(order))


def _plain(values: Any) -> list[Any]:
    found: list[Any] = values.tolist()
    return found


def _constant(name: str, value: Any) -> ValueError:
    return ValueError(f"Column '{name}' is constant, {value}: leave it out.")


def _names_rows(name: str, why: str) -> ValueError:
    return ValueError(f"Column '{name}' {why}, as a name of each row does: leave it out.")
