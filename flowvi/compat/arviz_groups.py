"""ArviZ's groups in its versions: `InferenceData` up to 0.23, trees of xarray from 1.0 on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.compat.arviz_module import import_arviz

if TYPE_CHECKING:
    import arviz as az

ENGINE = "h5netcdf"  # the one that both versions read
ZARR = ".zarr"
# Largest compression factor of deflation, and largest depth of nested groups.
MOST_PACKED, DEEPEST = 1032, 8


def has_trees() -> bool:
    """Whether this ArviZ keeps groups in trees."""
    # Access to az.InferenceData raises a warning.
    return "InferenceData" not in vars(import_arviz())


def make_groups(datasets: dict[str, Any]) -> az.InferenceData:
    """Put data sets together, one a group."""
    import xarray as xr

    if not has_trees():
        return import_arviz().InferenceData(**datasets)
    tree: Any = xr.DataTree.from_dict(datasets)
    return tree


def group_names(idata: az.InferenceData) -> list[str]:
    """Names of the groups of either kind."""
    names = idata.groups() if callable(idata.groups) else idata.groups
    return [name for path in names if (name := str(path).strip("/"))]


def has_group(idata: az.InferenceData, group: str) -> bool:
    """Whether groups of either kind have one of this name."""
    if not hasattr(idata, "groups"):
        raise TypeError(
            "draws must be the draws of a fit, such as fit.draw(4000), or ArviZ's groups of them; "
            f"got a {type(idata).__name__}."
        )
    return group in group_names(idata)


def to_dataset(group: Any) -> Any:
    """A group as a data set: it is one already, or a node of a tree."""
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def xr_index(places: np.ndarray) -> Any:
    """Places along the axes of chains and draws, (chain, draw), for pointwise indexing."""
    import xarray as xr

    return xr.DataArray(places, dims=("chain", "draw"))


def read_groups(path: Path) -> az.InferenceData:
    """Read a file or folder that `flowvi.compat.netcdf` wrote.

    Raises:
        ValueError: It cannot be read, or points at other files.
    """
    try:
        if path.suffix == ZARR:
            check_zarr()
        else:
            _check_file(path)
        return _read(path)
    except ImportError:
        raise
    except Exception as error:  # whatever the reader makes of a file of another kind
        raise ValueError(
            f"{path} cannot be read as ArviZ's groups: {error}.{_rebuilt(path)}"
        ) from error


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Report errors of reading as a file that lacks what flowvi writes."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} does not hold what flowvi writes there ({what}).") from error


def _check_file(path: Path) -> None:
    """Refuse a file that links to other files, or claims more values than it can hold."""
    import h5py

    if not path.is_file():
        raise ValueError("it is no regular file" if path.exists() else "it is missing")
    size = path.stat().st_size
    with h5py.File(path, "r") as file:
        _check_group(file, MOST_PACKED * size, [])


def _check_group(group: Any, most: float, above: list[Any]) -> None:
    import h5py

    if len(above) > DEEPEST:
        raise ValueError("its groups lie too deep within each other")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"'{name}' is a link")
        item = group[name]
        if isinstance(item, h5py.Group):
            if item in above:
                raise ValueError(f"'{name}' holds itself")
            _check_group(item, most, [*above, group])
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise ValueError(f"the values of '{name}' are in another file")
            if item.nbytes > most:
                raise ValueError(f"'{name}' claims {item.size} values, more than the file can hold")


def _rebuilt(path: Path) -> str:
    """Hint at the saved fit, if the draws of a folder of results cannot be read."""
    fit = path.parent / "fit"
    if not (fit / "fit.json").is_file():
        return ""
    return (
        f" The fit itself is still in {fit}: flowvi.load('{fit}', target).draw(4000) makes the "
        "draws again, to_inference_data the file."
    )


def _read(path: Path) -> Any:
    import xarray as xr

    if not has_trees() and path.suffix != ZARR:
        return import_arviz().from_netcdf(str(path), engine=ENGINE)
    with xr.open_datatree(str(path), engine="zarr" if path.suffix == ZARR else ENGINE) as tree:
        return make_groups({name: node.to_dataset().load() for name, node in tree.children.items()})


def check_zarr() -> None:
    """Say how to install what folders of Zarr need, where it is missing."""
    if find_spec("zarr") is None:
        raise ImportError("Zarr folders need zarr: pip install 'flowvi[zarr]'.")
