"""Folders of results in which a fit was cut off, and going on with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from flowvi.cli.results import FILES, check_folder

# Folder of what a fit goes on from, in that of the results, until these are written.
CHECKPOINT = "checkpoint"

resume_option = click.option(
    "--resume",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="In place of --out, with the other options as before: go on where that fit was cut off.",
)


def folder_of(out: Path | None, resume: Path | None, names: Iterable[str] = FILES) -> Path:
    """Where the results go, and what the fit goes on from is.

    Args:
        out: Folder of new results.
        resume: Folder of a fit that was cut off, in its place.
        names: Files that will be written.
    """
    if (out is None) == (resume is None):
        raise click.UsageError("Name the folder of the results: --out DIR, or --resume DIR.")
    folder = out or resume
    assert folder is not None
    check_folder(folder, names)
    there = (folder / CHECKPOINT).exists()
    if out is not None and there:
        raise click.BadParameter(
            f"'{folder}' has a fit that was cut off: go on with --resume {folder}, or remove "
            f"{folder / CHECKPOINT}.",
            param_hint="'--out'",
        )
    if resume is not None and not there:
        raise click.BadParameter(
            f"'{folder}' has no fit that was cut off.", param_hint="'--resume'"
        )
    return folder


def say_cut_off(what: str, folder: Path) -> None:
    """Say that results are of an interrupted fit, and how to go on."""
    click.echo(
        f"Interrupted: these are the results of the {what} until then. The same command with "
        f"--resume {folder} in place of --out goes on.",
        err=True,
    )
