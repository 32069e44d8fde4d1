"""Names of dimensions and coordinates that files can store."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


Arrays = Mapping[str, np.ndarray]
# A slash separates group names; the other characters cannot be encoded, or end a name.
UNSAVEABLE = re.compile(r"[/\x00-\x1f\x7f\ud800-\udfff]")
LONGEST_NAME = 200
SAMPLE = ("chain", "draw")
STATS = {
    "log_p": "log joint density of model and data, log Jacobian included",
    "log_q": "log density of the guide",
    "log_weight": "log_p - log_q; without constant if a prior is improper",
}


class Labels:
    """Names of variables and dims that xarray and NetCDF accept, the same in every group.

    A dim has one size, and a name that no variable of the same group has. Where a model's dims
    violate this, the axis is called ``<variable>_dim_<axis>``, ArviZ's default.

    Args:
        dims: For each variable, the names of its axes.
        coords: Labels along dims.
        variables: Names of all variables of all groups.

    Attributes:
        lost: Dims whose labels a variable could not have, with the variable.
    """

    def __init__(
        self,
        dims: Mapping[str, Sequence[str | None]],
        coords: Mapping[str, Sequence[Any]],
        variables: Iterable[str],
    ) -> None:
        self.dims = dims
        self.coords = coords
        self.names: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.labels: dict[str, np.ndarray] = {}
        self.lost: dict[str, str] = {}
        for name in variables:
            if name not in self.names:
                self.names[name] = _unused(_saveable(name), {*self.names.values(), *SAMPLE})

    def dataset(self, arrays: Arrays, lead: Sequence[str], attrs: Mapping[str, Any]) -> xr.Dataset:
        """A group whose variables all begin with the given leading dims."""
        import xarray as xr

        variables: dict[str, xr.Variable] = {}
        coords: dict[str, np.ndarray] = {}
        taken = {*(self.names[name] for name in arrays), *SAMPLE}
        for name, array in arrays.items():
            own = self._axes(name, array.shape[len(lead) :], taken)
            notes = {} if name == self.names[name] else {"original_name": _written(name)}
            if name in STATS:
                notes |= {"description": STATS[name], "space": "unconstrained, Jacobian included"}
            variables[self.names[name]] = xr.Variable((*lead, *own), array, notes)
            coords |= {dim: np.arange(size) for dim, size in zip(lead, array.shape, strict=False)}
            coords |= {dim: self.labels[dim] for dim in own}
        return xr.Dataset(variables, coords, attrs)

    def _axes(self, name: str, shape: tuple[int, ...], taken: Collection[str]) -> list[str]:
        """Names of the axes of a variable."""
        axes: list[str] = []
        given = [*self.dims.get(name, ())]
        for axis, size in enumerate(shape):
            dim = given[axis] if axis < len(given) else None
            default = f"{self.names[name]}_dim_{axis}"
            known = self.coords.get(dim, ()) if dim else ()
            chosen = _saveable(dim or default)
            if chosen in axes or not self._fits(chosen, size, taken):
                chosen = default
                if dim and known and _saveable(dim) in taken:
                    self.lost.setdefault(dim, name)
            while chosen in axes or not self._fits(chosen, size, taken):
                chosen += "_"
            self.sizes[chosen] = size
            labels = _coordinate(known) if len(known) == size else np.arange(size)
            self.labels.setdefault(chosen, labels)
            axes.append(chosen)
        return axes

    def _fits(self, dim: str, size: int, taken: Collection[str]) -> bool:
        return dim not in taken and self.sizes.get(dim, size) == size


def _saveable(name: str) -> str:
    """A name that files can store and terminals can show."""
    words = UNSAVEABLE.sub("_", name).strip()[:LONGEST_NAME]
    return words if words.strip(".") else f"_{len(words)}"


def _written(name: str) -> str:
    """A name in a form that an attribute can store."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _coordinate(labels: Sequence[Any]) -> np.ndarray:
    """Convert labels to an array of numbers, or else of strings."""
    if all(isinstance(label, (int, float)) for label in labels):
        return np.asarray(labels)
    return np.asarray([str(label) for label in labels])


def storable(value: Any) -> str | int | float:
    """Convert a value to a NetCDF attribute: numbers and strings; the rest as JSON."""
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, (str, int, float)) else json.dumps(value)
