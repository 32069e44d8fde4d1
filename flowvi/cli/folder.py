"""The folder of results: names of its files, and checks before anything is computed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

REPORT, DRAWS, RESAMPLED, GUIDES = "report.html", "posterior.nc", "resampled.nc", "guide.nc"
FILES = (DRAWS, RESAMPLED, GUIDES, "summary.csv", "loss.png", "pair.png", REPORT)
FIT = "fit"
# Files of `flowvi vae`.
PARTS, BOUNDS, TABLE = "parts.json", "test_bounds.csv", "table.csv"
PICTURES = {
    "epochs.png": "the bound over the epochs",
    "reconstructions.png": "test images and the mean images of draws of their codes",
    "samples.png": "mean images of draws from the prior",
    "interpolation.png": "interpolations between pairs of test images",
    "traversal.png": "one coordinate of a code changed, for the most active of them",
    "map.png": "posterior means of test images, projected to two dimensions",
}
COLUMNS, SIMULATED = "columns.csv", "simulated.csv"
TABLE_PICTURES = {
    "columns.png": "each column of new rows from the model, beside the test rows",
    "associations.png": "correlations of all pairs of columns, of new rows and of test rows",
    "epochs.png": PICTURES["epochs.png"],
    "map.png": "posterior means of test rows, projected to two dimensions",
}
VAE_FILES = (PARTS, BOUNDS, TABLE, COLUMNS, SIMULATED, *PICTURES, *TABLE_PICTURES)


def check_folder(folder: Path, names: Iterable[str] = FILES) -> None:
    """Make the folder of results, or say why it cannot be used, or one of the files in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _refused(f"'{folder}' cannot hold the results: {why}.") from None
    for name in names:
        if (folder / name).exists() and not (folder / name).is_file():
            raise _refused(f"'{folder / name}' is in the way: it is not a file.")
    if (folder / FIT).exists() and not (folder / FIT).is_dir():
        raise _refused(f"'{folder / FIT}' is in the way: it is not a folder.")


def _refused(message: str) -> click.BadParameter:
    return click.BadParameter(message, param_hint="'--out'")
