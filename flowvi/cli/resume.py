"""Resuming an interrupted fit in a folder of results."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from flowvi.cli.folder import FILES, check_folder
from flowvi.cli.options import EXISTING_FOLDER
from flowvi.runtime import files

# Subfolder with the checkpoint; it is removed once the results are written.
CHECKPOINT = "checkpoint"

resume_option = click.option(
    "--resume",
    type=EXISTING_FOLDER,
    metavar="DIR",
    help="Continue the interrupted fit in DIR: replaces --out; all other options as before.",
)


def results_folder(out: Path | None, resume: Path | None, names: Iterable[str] = FILES) -> Path:
    """The folder of the results, which also contains the checkpoint.

    Args:
        out: Folder of new results.
        resume: Folder of an interrupted fit, instead of `out`.
        names: Files that will be written.
    """
    if (out is None) == (resume is None):
        raise click.UsageError("Name the folder of the results: --out DIR, or --resume DIR.")
    folder = out or resume
    assert folder is not None
    check_folder(folder, names)
    lock_results(folder, "'--out'" if resume is None else "'--resume'")
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


def lock_results(folder: Path, hint: str) -> None:
    """Keep a folder of results until the command ends, and remove what crashes left there.

    Args:
        folder: The folder.
        hint: The option or argument that named it.

    Raises:
        click.BadParameter: Another run is busy in it; nothing of that is touched.
    """
    if int(os.environ.get("RANK", "0")):
        return  # of several processes the first one keeps it
    free = click.get_current_context().with_resource(files.hold_folder(folder))
    busy = files.lock_owner(folder / CHECKPOINT) or ("" if free else "another command")
    if busy:
        raise click.BadParameter(
            f"'{folder}' is in use by another run ({busy}); wait for it, or name another folder.",
            param_hint=hint,
        )
    files.remove_partial_files(folder)


def announce_writing(what: str, folder: Path) -> None:
    """Say that the results of an interrupted fit are being written, which may take a while."""
    click.echo(
        f"Writing the results of the {what} so far to {folder}. A second interrupt stops at once; "
        f"--resume {folder} continues the {what} in both cases.",
        err=True,
    )


def explain_resume(what: str, folder: Path) -> None:
    """Say that results are of an interrupted fit, and how to go on."""
    click.echo(
        f"Interrupted: these are the results of the {what} so far. The same command with "
        f"--resume {folder} in place of --out continues the {what}.",
        err=True,
    )
