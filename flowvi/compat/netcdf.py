"""Write ArviZ groups to disk. A file is complete or absent, and a full disk raises an error.

The HDF5 library aborts the process if the disk is full when it closes a file. So the file is
made in memory, and its bytes are written by `flowvi.runtime.files`.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowvi.compat.arviz_groups import ENGINE, ZARR, check_zarr
from flowvi.runtime import memory
from flowvi.runtime.files import atomic_replace, error_reason

if TYPE_CHECKING:
    import arviz as az

# Bytes of a file beside its numbers, at most: names, attributes, and a share for chunks.
BESIDE, SHARE = 2**20, 1.05


def write_groups(idata: az.InferenceData, path: Path) -> None:
    """Write all groups to a NetCDF file, or to a folder of Zarr if the name ends in .zarr.

    After an error an old file is unchanged, and no folder is left.

    Raises:
        OSError: The disk is full, or the folder of Zarr is there already.
    """
    if path.suffix != ZARR:
        write(idata, path)
        return
    check_zarr()
    if path.exists():
        raise FileExistsError(errno.EEXIST, "It is there already", str(path))
    tree: Any = idata if not hasattr(idata, "to_datatree") else idata.to_datatree()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Version 3 of the format does not specify text labels yet.
        tree.to_zarr(str(part), zarr_format=2)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error_reason(error), str(path)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(idata: az.InferenceData, path: Path) -> None:
    """Write all groups to a file.

    Groups that are too large for the limit of memory are written to the disk at once, if it
    has room for all their numbers.

    Raises:
        OSError: There is not enough room, or the file cannot be written; the old one stays.
    """
    with atomic_replace(path) as part:
        if _size(idata) <= memory.evaluation_bytes():
            with image(idata) as content:
                part.write_bytes(content)
        else:
            check_room(part, int(SHARE * _size(idata)) + BESIDE)
            idata.to_netcdf(str(part), engine=ENGINE)


def image(idata: az.InferenceData) -> memoryview:
    """The bytes of the file."""
    import h5netcdf
    import xarray as xr
    from xarray.backends import H5NetCDFStore

    content = io.BytesIO()
    with h5netcdf.File(content, "w") as file:
        if attrs := dict(getattr(idata, "attrs", {})):
            xr.Dataset(attrs=attrs).dump_to_store(H5NetCDFStore(file))
        for name, dataset in _groups(idata).items():
            # Variable-length text cannot be compressed.
            packed = {
                key: {"zlib": True}
                for key, value in dataset.variables.items()
                if value.dtype.kind in "biufc"
            }
            store = H5NetCDFStore(file.create_group(name))
            dataset.dump_to_store(store, encoding=packed)
    return content.getbuffer()


def check_room(file: Path, size: int) -> None:
    """Refuse to write so many bytes where there is no room for them.

    Raises:
        OSError: The disk, or a limit of the process, does not allow for them.
    """
    if size > shutil.disk_usage(file.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    try:
        import resource
    except ImportError:  # on Windows, where files have no limit
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file))


def _groups(idata: Any) -> dict[str, Any]:
    """Data sets by the name of their group, of either of ArviZ's kinds."""
    if hasattr(idata, "children"):
        return {str(name): node.to_dataset() for name, node in idata.children.items()}
    return {str(name): idata[name] for name in idata.groups()}


def _size(idata: Any) -> int:
    return sum(int(dataset.nbytes) for dataset in _groups(idata).values())
