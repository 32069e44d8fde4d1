"""The folder of results: checked before a fit, written file by file after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from flowvi import statistics
from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws import Draws, resample
from flowvi.fit import Fit
from flowvi.groups import write_groups
from flowvi.inference_data import all_groups, to_inference_data

if TYPE_CHECKING:
    import pandas as pd

TRUST, RESAMPLE, DISTRUST = VERDICTS
REPORT = "report.html"
FILES = (
    *("posterior.nc", "resampled.nc", "guide.nc", "summary.csv", "loss.png", "pair.png"),
    REPORT,
)
FIT = "fit"
TABLE_ROWS = 20
# Draws of each chain for which data are simulated, and of the Gaussian start.
PREDICTED, STARTED = 400, 2000


class Judged(NamedTuple):
    """The draws that the verdict recommends, and what to call them."""

    draws: Draws
    word: str


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


def judged(draws: Draws, diagnosis: Diagnosis, seed: int) -> Judged:
    """Choose between the draws as they are and the resampled ones."""
    if diagnosis.verdict == RESAMPLE:
        return Judged(resample(draws, seed=seed), "resampled")
    word = "MCMC" if draws.mcmc else "plain"
    return Judged(draws, word if diagnosis.verdict == TRUST else "untrusted")


def summary(kept: Judged) -> pd.DataFrame:
    """Mean, sd and quantiles of every scalar, and which draws they are of."""
    posterior = to_inference_data(kept.draws, log_likelihood=False)
    numbers = statistics.summary(posterior)
    return numbers.assign(draws=kept.word).rename_axis("name")


def table(numbers: pd.DataFrame) -> str:
    """The first rows of a summary, scalars before elements of vectors, for reading."""
    names = sorted(numbers.index, key=lambda name: "[" in name)
    shown, columns = names[:TABLE_ROWS], ["mean", "sd", "5%", "95%"]
    width = max(map(len, shown))
    lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
    for name in shown:
        cells = "".join(f"{numbers.at[name, column]:11.4g}" for column in columns)
        lines.append(f"{name:<{width}}{cells}")
    if len(names) > len(shown):
        lines.append(f"... and {len(names) - len(shown)} more in summary.csv")
    return "\n".join(lines)


def write(
    fit: Fit, draws: Draws, kept: Judged, numbers: pd.DataFrame, folder: Path
) -> Iterator[tuple[str, str]]:
    """Write every file of the results but the fit; yields each one's name and what it holds."""
    import matplotlib as mpl

    mpl.use("agg")  # files are drawn, no windows
    for name in ("resampled.nc", "guide.nc"):
        # One of an earlier fit would pass for this one's.
        (folder / name).unlink(missing_ok=True)
    start = None if fit.start is None else fit.draw_start(STARTED)
    whole(folder / "posterior.nc", lambda file: _netcdf(draws, file, start, PREDICTED))
    if draws.weighted is None:
        yield "posterior.nc", "the guide's draws with their log weights, for ArviZ"
    else:
        yield "posterior.nc", "draws of NUTS in the guide's space, for ArviZ"
        guides = draws.weighted
        whole(folder / "guide.nc", lambda file: _netcdf(guides, file))
        yield "guide.nc", "the guide's own draws with their log weights, for the evidence"
    if kept.draws.resampled:
        whole(folder / "resampled.nc", lambda file: _netcdf(kept.draws, file))
        yield "resampled.nc", "the draws to use: resampled by those weights, for ArviZ"
    whole(folder / "summary.csv", numbers.to_csv)
    yield "summary.csv", f"mean, sd and quantiles of the {kept.word} draws"
    if np.isfinite(fit.history["bound"]).any():
        whole(folder / "loss.png", lambda file: _loss(fit, file))
        yield "loss.png", "the bound over the steps"
    whole(folder / "pair.png", lambda file: _pair(kept.draws, file))
    yield "pair.png", f"marginals and pairs of the {kept.word} draws"


def write_report(folder: Path) -> tuple[str, str]:
    """Write the report on a folder whose other files are written; its name and what it holds."""
    from flowvi.report import report

    whole(folder / REPORT, lambda file: report(folder, file))
    return REPORT, "all of this on one page, to read and to pass on"


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: under another name in its folder first."""
    final = path.resolve()
    part = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        write(part)
        os.replace(part, final)
    except OSError as error:
        raise click.ClickException(f"Could not write {path}: {error}.") from None
    finally:
        part.unlink(missing_ok=True)


def _netcdf(draws: Draws, file: Path, start: Draws | None = None, predicted: int = 0) -> None:
    write_groups(all_groups(draws, start, predicted), file)


def _loss(fit: Fit, file: Path) -> None:
    from flowvi.plots import plot_loss
    from flowvi.plots.loss import stage_names

    names = stage_names(fit.history, fit.meta["stages"])
    history = {"bound": fit.history["bound"], "stage": names}
    save(plot_loss(history).figure, file)


def _pair(draws: Draws, file: Path) -> None:
    from flowvi.plots import plot_pair

    save(plot_pair(draws).flat[0].figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    figure.savefig(file)
    plt.close(figure)
