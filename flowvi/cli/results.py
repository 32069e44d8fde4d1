"""The folder of results: checked before a fit, written file by file after it."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from flowvi.cli.folder import DRAWS, FIT, GUIDES, REPORT, RESAMPLED
from flowvi.compat.netcdf import write_groups
from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws import scalars
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample
from flowvi.draws.selection import first_scalars
from flowvi.fitting.result import Fit
from flowvi.interop.inference_data import all_groups
from flowvi.reporting.decimals import decimals, even
from flowvi.runtime.files import CheckpointError, atomic_replace, error_reason

if TYPE_CHECKING:
    import pandas as pd

TRUST, RESAMPLE, DISTRUST = VERDICTS
TABLE_ROWS = 20
# Number of draws of each chain with simulated data, and of draws of the Gaussian start.
PREDICTED, STARTED = 400, 2000
# Draws from the prior.
PRIOR = 1000


class RecommendedDraws(NamedTuple):
    """The draws that the verdict recommends, and their name in the summary."""

    draws: Draws
    word: str


def recommended_draws(draws: Draws, diagnosis: Diagnosis, seed: int) -> RecommendedDraws:
    """Choose between the draws as they are and the resampled ones."""
    if diagnosis.verdict == RESAMPLE:
        return RecommendedDraws(resample(draws, seed=seed), "resampled")
    word = "MCMC" if draws.mcmc else "plain"
    return RecommendedDraws(draws, word if diagnosis.verdict == TRUST else "untrusted")


def summary(kept: RecommendedDraws) -> pd.DataFrame:
    """Mean, sd, HDI, errors and quantiles of every scalar, and which draws they are of."""
    return scalars.table(kept.draws).assign(draws=kept.word)


def table(numbers: pd.DataFrame, kept: RecommendedDraws) -> str:
    """The rows of a summary that a reader wants to see first, with even decimals."""
    first = (one.label for one in first_scalars(kept.draws))
    shown = [name for name in itertools.islice(first, TABLE_ROWS) if name in numbers.index]
    shown = shown or list(numbers.index[:TABLE_ROWS])
    sds = numbers.loc[shown, "sd"].to_numpy()
    places = decimals(sds)
    heads = ["mean", "sd", "5%", "95%"]
    cells = [
        [even(float(numbers.at[name, head]), float(sd), places) for head in heads]
        for name, sd in zip(shown, sds, strict=True)
    ]
    width = max(map(len, shown))
    widths = [max(map(len, column)) + 3 for column in zip(heads, *cells, strict=True)]
    lines = [" " * width + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    for name, row in zip(shown, cells, strict=True):
        lines.append(
            f"{name:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True))
        )
    if len(numbers) > len(shown):
        lines.append(f"... and {len(numbers) - len(shown)} more in summary.csv")
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """A text whose lines end between words where the output is a terminal."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.splitlines():
        indent = "    " if line.startswith("  - ") else ""
        lines += textwrap.wrap(line, width, subsequent_indent=indent) or [""]
    return "\n".join(lines)


class ResultFile(NamedTuple):
    """A file of the results.

    Attributes:
        name: In the folder; a folder's ends in a slash.
        what: Description of its content.
        write: Writes the file to a path, completely or not at all.
    """

    name: str
    what: str
    write: Callable[[Path], object]


class WriteFailure(click.ClickException):
    """A file of the results could not be written; the exit code is 1.

    Attributes:
        path: The file.
        reason: Why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"Could not write {path}: {reason}.")
        self.path, self.reason = path, reason


def files(
    fit: Fit, draws: Draws, kept: RecommendedDraws, numbers: pd.DataFrame
) -> Iterator[ResultFile]:
    """Every file of the results but the report, which is made of the others."""
    yield ResultFile(f"{FIT}/", "the fitted guide, for flowvi.load", fit.save)
    # After an interrupt, skip the simulated data and the draws of the start, which take time.
    hurried = bool(fit.meta["interrupted"])
    start = None if fit.start is None or hurried else fit.draw_start(STARTED)
    predicted = 0 if hurried else PREDICTED
    what = (
        "draws of NUTS in the guide's space, for ArviZ"
        if draws.weighted is not None
        else "the guide's draws with their log weights, for ArviZ"
    )
    prior = 0 if hurried else PRIOR
    yield ResultFile(DRAWS, what, lambda file: _netcdf(draws, file, start, predicted, prior))
    if draws.weighted is not None:
        guides = draws.weighted
        what = "the guide's own draws with their log weights, for the evidence"
        yield ResultFile(GUIDES, what, lambda file: _netcdf(guides, file))
    if kept.draws.resampled:
        what = "the draws to use: resampled by those weights, for ArviZ"
        yield ResultFile(RESAMPLED, what, lambda file: _netcdf(kept.draws, file))
    what = f"mean, sd and quantiles of the {kept.word} draws"
    yield ResultFile("summary.csv", what, atomically(numbers.to_csv))
    if np.isfinite(fit.history["bound"]).any():
        yield ResultFile(
            "loss.png", "the bound over the steps", atomically(lambda f: _loss(fit, f))
        )
    what = f"marginals and pairs of the {kept.word} draws"
    yield ResultFile("pair.png", what, atomically(lambda f: _pair(kept.draws, f)))


def write(
    fit: Fit, draws: Draws, kept: RecommendedDraws, numbers: pd.DataFrame, folder: Path
) -> tuple[list[ResultFile], list[WriteFailure]]:
    """Write every file of the results that there is room for; no report if it was interrupted.

    Returns:
        What was written, and what could not be.
    """
    import matplotlib as mpl

    mpl.use("agg")  # files are drawn, no windows
    for name in (RESAMPLED, GUIDES, REPORT) if fit.meta["interrupted"] else (RESAMPLED, GUIDES):
        # Remove files of an earlier fit, which could be mistaken for those of this fit.
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    written, failed = write_files(files(fit, draws, kept, numbers), folder)
    if fit.meta["interrupted"]:
        # After an interrupt, skip the report, which `flowvi report` can write later.
        return written, failed
    lacking = {error.path.name for error in failed} & {DRAWS, GUIDES, RESAMPLED}
    if lacking:
        # The file of an earlier fit may still be there.
        failed.append(WriteFailure(folder / REPORT, f"it is made of {sorted(lacking)[0]}"))
        return written, failed
    more, worse = write_files([_report(folder)], folder)
    return written + more, failed + worse


def _report(folder: Path) -> ResultFile:
    from flowvi.reporting import report

    what = "these results as one HTML file"
    return ResultFile(REPORT, what, lambda file: report(folder, file))


def write_files(
    files: Iterable[ResultFile], folder: Path
) -> tuple[list[ResultFile], list[WriteFailure]]:
    """Write files to a folder; a file that cannot be written does not stop the next ones.

    Returns:
        What was written, and what could not be.
    """
    written: list[ResultFile] = []
    failed: list[WriteFailure] = []
    for file in files:
        try:
            with naming_file(folder / file.name):
                file.write(folder / file.name)
            written.append(file)
        except WriteFailure as error:
            failed.append(error)
    return written, failed


def describe_failures(
    failed: Sequence[WriteFailure], some: bool, folder: Path, resume: bool
) -> str:
    """Message on files that could not be written.

    Args:
        failed: The files.
        some: Whether other files are written.
        folder: Folder of the results.
        resume: Whether the checkpoint still exists.
    """
    names: dict[str, list[str]] = {}
    for error in failed:
        first = error is failed[0]
        names.setdefault(error.reason, []).append(str(error.path) if first else error.path.name)
    words = "; ".join(f"{', '.join(files)}: {reason}" for reason, files in names.items())
    rest = (
        f"the same command with --resume {folder} in place of --out writes the rest"
        if resume
        else "repeat the command"
    )
    done = "All other files are" if some else "Nothing is"
    return f"Could not write {words}. {done} written: free disk space, and {rest}."


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the name of a file to operating system errors."""
    try:
        yield
    except CheckpointError as error:
        raise WriteFailure(path, str(error).rstrip(".")) from error
    except OSError as error:
        raise WriteFailure(path, error_reason(error)) from error


def write_or_fallback(
    path: Path, write: Callable[[Path], object]
) -> tuple[Path, WriteFailure | None]:
    """Write a file that took long to make; where that fails, to a folder for temporary files.

    Returns:
        Where it is, and why it is not where it should be.

    Raises:
        NotWritten: It can be written to neither place.
    """
    try:
        with naming_file(path):
            write(path)
        return path, None
    except WriteFailure as error:
        try:
            other = Path(tempfile.mkdtemp(prefix="flowvi-")) / path.name
            write(other)
        except OSError:
            raise error from None
        return other, error


def atomically(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Make a function that writes a file in parts write it completely or not at all."""

    def whole_file(path: Path) -> None:
        with atomic_replace(path) as part:
            write(part)

    return whole_file


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Raises:
        NotWritten: The file cannot be written, such as on a full disk.
    """
    with naming_file(path):
        atomically(write)(path)


def _netcdf(
    draws: Draws, file: Path, start: Draws | None = None, predicted: int = 0, prior: int = 0
) -> None:
    write_groups(all_groups(draws, start, predicted, prior), file)


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
    """Write a figure to a file and close it."""
    import matplotlib.pyplot as plt

    figure.savefig(file, format="png")
    plt.close(figure)
