"""ArviZ's groups in its versions: `InferenceData` up to 0.23, trees of xarray from 1.0 on.

Everything that differs between them is in this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import arviz as az

ENGINE = "h5netcdf"  # the one that both versions read
ZARR = ".zarr"


def make_groups(datasets: dict[str, Any]) -> az.InferenceData:
    """Put data sets together, one a group."""
    import arviz as az

    if hasattr(az, "InferenceData"):
        return az.InferenceData(**datasets)
    import xarray as xr

    tree: Any = xr.DataTree.from_dict(datasets)
    return tree


def has_group(idata: az.InferenceData, group: str) -> bool:
    """Whether groups of either kind have one of this name."""
    names = idata.groups() if callable(idata.groups) else idata.groups
    return any(str(name).strip("/") == group for name in names)


def write_groups(idata: az.InferenceData, path: Path) -> None:
    """Write all groups to a NetCDF file, or to a folder of Zarr if the name ends in .zarr."""
    if path.suffix == ZARR:
        _zarr()
        idata.to_zarr(str(path))
    else:
        idata.to_netcdf(str(path), engine=ENGINE)


def read_groups(path: Path) -> az.InferenceData:
    """Read what `write_groups` wrote.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if path.suffix == ZARR:
            _zarr()
        return _read(path)
    except ImportError:
        raise
    except Exception as error:  # whatever the reader makes of a file of another kind
        raise ValueError(f"{path} cannot be read as ArviZ's groups: {error}") from error


def _read(path: Path) -> Any:
    import arviz as az

    if hasattr(az, "InferenceData"):
        if path.suffix == ZARR:
            return az.from_zarr(str(path))
        return az.from_netcdf(str(path), engine=ENGINE)
    import xarray as xr

    tree = xr.open_datatree(str(path), engine="zarr" if path.suffix == ZARR else ENGINE)
    return tree.load()


def _zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise ImportError("Zarr folders need zarr: pip install 'flowvi[zarr]'.") from None
