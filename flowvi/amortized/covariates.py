"""Covariates of simulated data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowvi.targets import ModelError

# A function of the number of rows that draws the covariates of one data set, with torch.
Covariates = Callable[[int], Mapping[str, Any]]
# Standard deviation of the noise on resampled numbers, in standard deviations of their column.
SMOOTHING = 0.25
# A column with fewer different values is one of categories or of a design.
FEWEST_VALUES = 8


class ResampledRows:
    """Draws rows of given covariates with replacement, and smooths columns of numbers.

    Columns without negative values are smoothed on the log scale, and stay positive.

    Args:
        columns: Covariates by name, (N, *shape) each.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __call__(self, n: int, rows: int) -> dict[str, Tensor]:
        """Covariates of n data sets, (n, rows, *shape) each."""
        first = next(iter(self.columns.values()), None)
        if first is None:
            return {}
        index = torch.randint(len(first), (n, rows), device=first.device)
        return {name: _smoothed(t, t[index]) for name, t in self.columns.items()}


class DrawnCovariates:
    """Covariates from the user's own function, one call for each data set.

    Args:
        function: The function.
        like: The covariates of the example, by name.
    """

    def __init__(self, function: Covariates, like: Mapping[str, Tensor]) -> None:
        self.function, self.like = function, dict(like)

    def __call__(self, n: int, rows: int) -> dict[str, Tensor]:
        """Covariates of n data sets, (n, *shape) each."""
        each = [self.function(rows) for _ in range(n)]
        return {
            name: torch.stack([torch.as_tensor(one[name]) for one in each]).to(like)
            for name, like in self.like.items()
        }


class UnsavedCovariates:
    """Stands for a user's function that was not saved with the guide.

    Args:
        name: Name of the model.
        names: The arguments that the function draws.
    """

    def __init__(self, name: str, names: Sequence[str]) -> None:
        self.name, self.names = name, list(names)

    def __call__(self, rows: int) -> Mapping[str, Any]:
        """Raise a ModelError: only the guide's draws are available."""
        raise ModelError(
            f"The covariates of {self.name} were drawn by a function that was not saved with the "
            "guide: pass it, flowvi.amortized.storage.load_guide(folder, model, covariates=...)."
        )


def names_drawn(function: Covariates, rows: int, known: Mapping[str, Tensor]) -> list[str]:
    """The arguments that a user's function of covariates draws.

    Raises:
        ModelError: It returns no dictionary of arguments of the model.
    """
    if isinstance(function, UnsavedCovariates):
        return function.names
    found = function(rows)
    if not isinstance(found, Mapping) or not found:
        raise ModelError(
            "covariates must be a function of the number of rows that returns a dictionary "
            f"{{argument: values}}; it returned {type(found).__name__}."
        )
    strange = [name for name in found if name not in known]
    if strange:
        raise ModelError(
            f"covariates returns '{strange[0]}', which is no argument with an array: the model has "
            f"{', '.join(known) or 'none'}."
        )
    return list(found)


def _smoothed(column: Tensor, drawn: Tensor) -> Tensor:
    """Resampled values with noise, where the column holds numbers and no categories."""
    if not column.is_floating_point() or len(column) < FEWEST_VALUES:
        return drawn
    flat = column.reshape(len(column), -1)
    many = torch.tensor([len(c.unique()) >= FEWEST_VALUES for c in flat.T]).reshape(
        column.shape[1:]
    )
    noise = SMOOTHING * torch.randn_like(drawn)
    if bool((column > 0).all()):
        moved = drawn * (noise * column.log().std(0)).exp()
    else:
        moved = drawn + noise * column.std(0)
    return torch.where(many, moved, drawn)
