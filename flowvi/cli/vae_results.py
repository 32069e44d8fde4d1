"""The folder of `flowvi vae`: bounds of test images, pictures, and the fit itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from flowvi.cli.folder import BOUNDS, FIT, PARTS, PICTURES, REPORT, TABLE
from flowvi.cli.results import ResultFile, WriteFailure, atomically, save, write_files
from flowvi.draws.row_bounds import RowBounds
from flowvi.fitting.result import RowFit
from flowvi.reporting.vae import vae_page
from flowvi.vae import (
    Generator,
    Images,
    active_units,
    interpolation,
    moments,
    reconstructions,
    traversal,
)

SHOWN = 10
MAPPED = 1000


@dataclass(frozen=True)
class VaeRun:
    """A trained autoencoder, and settings of its measurements.

    Attributes:
        images: The data.
        generator: The model of images.
        fit: The fit.
        facts: Names of the data and of the parts.
        particles: Draws K of the test bound.
        tests: Test images that it is for, at most.
        seed: Of all draws.
    """

    images: Images
    generator: Generator
    fit: RowFit
    facts: dict[str, Any]
    particles: int
    tests: int
    seed: int


def report(
    run: VaeRun, other: RowBounds | None, out: Path, quiet: bool
) -> tuple[bool, list[WriteFailure]]:
    """Measure, write and print.

    Returns:
        Whether any file was written, and those that could not be.
    """
    found = run.fit.iw_bound(
        run.images.test[: run.tests], run.particles, run.seed, progress=not quiet
    )
    rows = list(_rows(run, found, other))
    written, failed = write_files(_files(run, found, rows), out)
    more, worse = write_files([_page(run, rows, out)], out)
    written, failed = written + more, failed + worse
    click.echo(_table(rows))
    if not quiet:
        click.echo(f"\nIn {out}:")
        for file in written:
            click.echo(f"  {file.name:<20} {file.what}")
    return bool(written), failed


def _files(
    run: VaeRun, found: RowBounds, rows: list[tuple[str, float, float]]
) -> Iterator[ResultFile]:
    """Every file of the results, the most important first."""
    yield ResultFile(f"{FIT}/", "the fit, for flowvi.load", run.fit.save)
    facts = json.dumps(run.facts, indent=1)
    for name, what, write in (
        (PARTS, "the data and parts, by name", lambda file: file.write_text(facts)),
        (BOUNDS, "the bounds of every test image", partial(_write_bounds, found)),
        (TABLE, "the table above", partial(_write_table, rows)),
    ):
        yield ResultFile(name, what, atomically(write))
    yield from draw_pictures(run)


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
    facts = {str(key): str(value) for key, value in run.facts.items()}
    pictures = {
        name.removesuffix(".png").capitalize(): (out / name, what)
        for name, what in PICTURES.items()
    }

    def write(file: Path) -> None:
        page = vae_page(run.fit.target.name, facts, numbers, pictures, run.fit.log)
        file.write_text(page)

    return ResultFile(REPORT, "these results as one HTML file", atomically(write))


def read_bounds(folder: Path, images: Images, particles: int, tests: int) -> RowBounds:
    """The test bounds of another run, if they are of the same images.

    Raises:
        ValueError: They are not; the message says what differs.
    """
    for name in (PARTS, BOUNDS):
        if not (folder / name).is_file():
            raise ValueError(f"There is no {folder / name}; name a folder that `flowvi vae` wrote.")
    facts = json.loads((folder / PARTS).read_text())
    if facts["data"] != images.name:
        raise ValueError(f"{folder} is of the data {facts['data']}, not of {images.name}.")
    with (folder / BOUNDS).open(newline="") as file:
        table = list(csv.DictReader(file))
    found = int(table[0]["particles"])
    count = min(tests, len(images.test))
    if found != particles or len(table) != count:
        raise ValueError(
            f"{folder} has bounds of {found} draws for {len(table)} test images: compare with "
            f"--particles {found} --test-images {len(table)}, not {particles} and {count}."
        )
    bound, elbo = (np.array([float(row[key]) for row in table]) for key in ("bound", "elbo"))
    return RowBounds(bound, elbo, found)


def _rows(
    run: VaeRun, found: RowBounds, other: RowBounds | None
) -> Iterator[tuple[str, float, float]]:
    """Name, value and standard error of every line of the table."""
    yield "-ELBO, nats per image", -found.elbo_mean, found.elbo_se
    yield f"-L_{found.particles}, nats per image", -found.mean, found.se
    pixels = run.images.size[0] * run.images.size[1]
    bits = 1 / (pixels * np.log(2))
    yield f"-L_{found.particles}, bits per pixel", -found.mean * bits, found.se * bits
    if other is not None:
        elbo = RowBounds(found.elbo, found.elbo, 1).minus(RowBounds(other.elbo, other.elbo, 1))
        yield "ELBO better by, paired", elbo.value, elbo.se
        bound = found.minus(other)
        yield f"L_{found.particles} better by, paired", bound.value, bound.se
    units = active_units(run.fit.guide, run.images.test[:MAPPED], seed=run.seed)
    yield "active units", units.count, np.nan
    yield "epochs", run.fit.meta["epochs"], np.nan
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


def _write_bounds(found: RowBounds, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "bound", "elbo", "particles"])
        pairs = zip(found.values, found.elbo, strict=True)
        writer.writerows((i, *pair, found.particles) for i, pair in enumerate(pairs))


def draw_pictures(run: VaeRun) -> Iterator[ResultFile]:
    """Every picture that the run allows."""
    import matplotlib as mpl

    mpl.use("agg")  # files are drawn, no windows
    from flowvi import plots

    model, guide, x = run.generator, run.fit.guide, run.images.test
    top = model.likelihood.top
    few = x[:SHOWN]
    mean, _ = moments(guide, x[:MAPPED], seed=run.seed)
    drawn = {
        "reconstructions.png": lambda: plots.plot_reconstructions(
            few / top, reconstructions(model, guide, few, run.seed)
        ),
        "samples.png": lambda: plots.plot_images(model.sample(SHOWN**2, run.seed)),
        "interpolation.png": lambda: plots.plot_images(
            interpolation(model, guide, x[: SHOWN // 2], x[SHOWN // 2 : SHOWN])
        ),
        "traversal.png": lambda: _traversal(mean, model),
    }
    if np.isfinite(run.fit.history["bound"]).any():
        drawn["epochs.png"] = lambda: plots.plot_epochs(run.fit.history)
    if model.prior.dim > 1:
        labels = (run.images.labels or {}).get("test")
        known = None if labels is None else labels[: len(mean)]
        drawn["map.png"] = lambda: plots.plot_latent_map(mean, known)
    for name, picture in drawn.items():
        yield ResultFile(name, PICTURES[name], atomically(partial(_draw, picture)))


def _traversal(mean: torch.Tensor, model: Generator) -> Any:
    """The most active coordinates, over the range in which their means lie."""
    from flowvi import plots

    most = mean.var(0).argsort(descending=True)[:8].tolist()
    dtype = next(model.decoder.parameters()).dtype
    values = torch.linspace(-2.5, 2.5, SHOWN, dtype=dtype)
    images = traversal(model, mean[0].to(dtype), most, values)
    return plots.plot_images(images, names=[f"z[{unit}]" for unit in most])


def _draw(picture: Callable[[], Any], file: Path) -> None:
    save(picture().figure, file)
