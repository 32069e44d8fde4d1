"""The folder of `flowvi vae`: bounds of test rows, pictures, and the fit itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from flowvi.cli.folder import BOUNDS, COLUMNS, FIT, PARTS, REPORT, TABLE
from flowvi.cli.results import ResultFile, WriteFailure, atomically, save, write_files
from flowvi.cli.vae_data import MAPPED, Given, Trained
from flowvi.draws.row_bounds import RowBounds
from flowvi.fitting.result import RowFit
from flowvi.reporting.vae import vae_page
from flowvi.vae import Generator, active_units


@dataclass(frozen=True)
class VaeRun:
    """A trained autoencoder, and settings of its measurements.

    Attributes:
        given: The data.
        generator: The model.
        fit: The fit.
        facts: Names of the data and of the parts.
        particles: Draws K of the test bound.
        tests: Test rows that it is for, at most.
        seed: Of all draws.
    """

    given: Given
    generator: Generator
    fit: RowFit
    facts: dict[str, Any]
    particles: int
    tests: int
    seed: int

    @property
    def trained(self) -> Trained:
        """The parts that pictures are made of."""
        return Trained(self.generator, self.fit.guide, self.fit.history, self.seed)


@dataclass(frozen=True)
class Written:
    """What `report` measured, and what became of its files.

    Attributes:
        found: Bounds of the test rows.
        some: Whether any file was written.
        failed: Files that could not be.
    """

    found: RowBounds
    some: bool
    failed: list[WriteFailure]


def report(run: VaeRun, other: RowBounds | None, out: Path, quiet: bool) -> Written:
    """Measure, write and print."""
    found = run.fit.iw_bound(
        run.given.test[: run.tests], run.particles, run.seed, progress=not quiet
    )
    rows = list(_rows(run, found, other))
    written, failed = write_files(_files(run, found, rows), out)
    more, worse = write_files([_page(run, rows, out)], out)
    written, failed = written + more, failed + worse
    click.echo(_table(rows))
    click.echo(training_line(run.fit))
    if not quiet:
        click.echo(f"\nIn {out}:")
        for file in written:
            click.echo(f"  {file.name:<20} {file.what}")
    return Written(found, bool(written), failed)


def training_line(fit: RowFit) -> str:
    """Which epoch was kept, and why training stopped, in one line."""
    facts = fit.meta
    return f"Kept epoch {facts['kept']} of {facts['epochs']}; stopped by {facts['stopped']}."


def _files(
    run: VaeRun, found: RowBounds, rows: list[tuple[str, float, float]]
) -> Iterator[ResultFile]:
    """Every file of the results, the most important first."""
    yield ResultFile(f"{FIT}/", "the fit, for flowvi.load", run.fit.save)
    facts, unit = json.dumps(run.facts, indent=1), run.given.unit
    for name, what, write in (
        (PARTS, "the data and parts, by name", lambda file: file.write_text(facts)),
        (
            BOUNDS,
            f"the bounds of every test {unit}",
            partial(_write_bounds, found, unit),
        ),
        (TABLE, "the table above", partial(_write_table, rows)),
    ):
        yield ResultFile(name, what, atomically(write))
    for name, (what, put) in run.given.tables(run.trained).items():
        yield ResultFile(name, what, atomically(put))
    import matplotlib as mpl

    mpl.use("agg")  # files are drawn, no windows
    for name, picture in run.given.pictures(run.trained).items():
        yield ResultFile(name, run.given.captions[name], atomically(partial(_draw, picture)))


def _page(run: VaeRun, rows: list[tuple[str, float, float]], out: Path) -> ResultFile:
    """The report, made of the pictures that were written before."""
    numbers = [
        (
            name,
            f"{value:.4g}" if np.isnan(se) else f"{value:.3f}",
            "" if np.isnan(se) else f"{se:.2g}",
        )
        for name, value, se in rows
    ]
    facts = {
        str(key): _words(value)
        for key, value in run.facts.items()
        if value not in ({}, []) and key != "columns"
    }
    pictures = {
        name.removesuffix(".png").capitalize(): (out / name, what)
        for name, what in run.given.captions.items()
    }

    def write(file: Path) -> None:
        name, unit = run.fit.target.name, run.given.unit
        page = vae_page(name, facts, numbers, pictures, run.fit.log, unit, _columns(out))
        file.write_text(page)

    return ResultFile(REPORT, "these results as one HTML file", atomically(write))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _columns(out: Path) -> list[list[str]]:
    """The lines of the file on columns, if there is one, with few digits."""
    file = out / COLUMNS
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        _, *rows = csv.reader(lines)
    return [
        [
            name,
            f"{float(alone):.3f}",
            f"{float(given):.3f}",
            f"{likelihood}, {float(levels):.0f} levels" if levels else likelihood,
        ]
        for name, _, likelihood, levels, alone, given in rows
    ]


def read_bounds(folder: Path, given: Given, particles: int, tests: int) -> RowBounds:
    """The test bounds of another run, if they are of the same data.

    Raises:
        ValueError: They are not; the message says what differs.
    """
    for name in (PARTS, BOUNDS):
        if not (folder / name).is_file():
            raise ValueError(f"There is no {folder / name}; name a folder that `flowvi vae` wrote.")
    facts = json.loads((folder / PARTS).read_text())
    if facts["data"] != given.name:
        raise ValueError(f"{folder} is of the data {facts['data']}, not of {given.name}.")
    with (folder / BOUNDS).open(newline="") as file:
        table = list(csv.DictReader(file))
    found = int(table[0]["particles"])
    count = min(tests, len(given.test))
    if found != particles or len(table) != count:
        raise ValueError(
            f"{folder} has bounds of {found} draws for {len(table)} test {given.unit}s: compare "
            f"with --particles {found} --test-images {len(table)}, not {particles} and {count}."
        )
    bound, elbo = (np.array([float(row[key]) for row in table]) for key in ("bound", "elbo"))
    return RowBounds(bound, elbo, found)


def _rows(
    run: VaeRun, found: RowBounds, other: RowBounds | None
) -> Iterator[tuple[str, float, float]]:
    """Name, value and standard error of every line of the table."""
    unit = run.given.unit
    yield f"-ELBO, nats per {unit}", -found.elbo_mean, found.elbo_se
    yield f"-L_{found.particles}, nats per {unit}", -found.mean, found.se
    yield from run.given.numbers(found)
    if other is not None:
        elbo = RowBounds(found.elbo, found.elbo, 1).minus(RowBounds(other.elbo, other.elbo, 1))
        yield "ELBO better by, paired", elbo.value, elbo.se
        bound = found.minus(other)
        yield f"L_{found.particles} better by, paired", bound.value, bound.se
    units = active_units(run.fit.guide, run.given.test[:MAPPED], seed=run.seed)
    yield "active units", units.count, np.nan
    yield "epochs", run.fit.meta["epochs"], np.nan
    yield "epoch kept", run.fit.meta["kept"], np.nan
    yield "seconds of training", run.fit.meta["seconds"], np.nan


def _table(rows: list[tuple[str, float, float]]) -> str:
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        f"{name:<{width}}  "
        + (f"{value:10.3f}  +- {se:.2g}" if np.isfinite(se) else f"{value:10.4g}")
        for name, value, se in rows
    )


def _write_table(rows: list[tuple[str, float, float]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["measure", "value", "se"])
        writer.writerows((name, value, "" if np.isnan(se) else se) for name, value, se in rows)


def _write_bounds(found: RowBounds, unit: str, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([unit, "bound", "elbo", "particles"])
        pairs = zip(found.values, found.elbo, strict=True)
        writer.writerows((i, *pair, found.particles) for i, pair in enumerate(pairs))


def _draw(picture: Callable[[], Any], file: Path) -> None:
    save(picture().figure, file)
