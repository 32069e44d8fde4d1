"""Names of axes and labels along them, as users give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowvi.targets.tabular import is_column


def renamed(
    dims: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Sequence[str] | str],
) -> dict[str, tuple[str, ...]]:
    """Names of axes with those that the user gives, for all axes or for those without a plate.

    Args:
        dims: Present names of the axes of each variable: plates, and made-up ones.
        shapes: Sizes of the axes.
        given: Names by variable.

    Raises:
        ValueError: A variable is unknown, the number of names does not fit, a plate would have
            another name, a dim has two sizes, or has the name of a variable.
    """
    out = dict(dims)
    for name, names in given.items():
        new = (names,) if isinstance(names, str) else tuple(names)
        if name not in dims:
            raise ValueError(f"No variable named '{name}' for dims; there are {', '.join(dims)}.")
        free = [i for i, dim in enumerate(dims[name]) if dim == f"{name}_dim_{i}"]
        places = free if len(new) == len(free) else range(len(dims[name]))
        if len(new) != len(places):
            raise ValueError(
                f"dims['{name}'] must name the {len(dims[name])} axes of shape {shapes[name]}; got "
                f"{list(new)}."
            )
        axes = list(dims[name])
        for place, dim in zip(places, new, strict=True):
            if place not in free and axes[place] != dim:
                raise ValueError(
                    f"Axis {place} of '{name}' is plate '{axes[place]}', and keeps this name; got "
                    f"'{dim}' for it in dims. Name the plate so in the model."
                )
            axes[place] = dim
        if len(set(axes)) < len(axes):
            raise ValueError(f"dims['{name}'] names two axes alike: {axes}. Use two names.")
        out[name] = tuple(axes)
    _check_names(out, shapes, {dim for name in given for dim in out[name]})
    return out


def _check_names(
    dims: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]], new: set[str]
) -> None:
    sizes: dict[str, tuple[str, int]] = {}
    for name, axes in dims.items():
        for dim, size in zip(axes, shapes[name], strict=False):
            first, known = sizes.setdefault(dim, (name, size))
            if known != size and dim in new:
                raise ValueError(
                    f"dim '{dim}' has size {known} in '{first}' and {size} in '{name}': axes that "
                    "share a name have one size."
                )
    for dim in sorted(new & set(dims)):
        raise ValueError(
            f"'{dim}' is the name of a variable and of a dim, which no table can hold: call the "
            f"dim another name, such as '{dim}_name'."
        )


def labels_from(labels: Any) -> list[Any]:
    """Labels along a dim: a list, an index of pandas, or the categories of a column.

    A column of categories stands for these, in their order; their codes are places along the dim.
    """
    categories = getattr(getattr(labels, "cat", labels), "categories", None)
    return list(labels if categories is None else categories)


def indices_of(arguments: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Labels of the rows of columns of pandas among arguments, where they are no mere numbers."""
    found = {}
    for name, value in arguments.items():
        index = getattr(value, "index", None)
        if not is_column(value) or index is None or not hasattr(index, "is_unique"):
            continue
        counted = type(index).__name__ == "RangeIndex"
        if not counted and index.is_unique:
            found[name] = list(index)
    return found
