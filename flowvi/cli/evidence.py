"""`flowvi evidence`: bounds and estimates of the evidence from a saved fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowvi.cli.errors import DISTRUSTED, errors_without_traceback, one_line_warnings
from flowvi.cli.options import folder_argument
from flowvi.cli.output import json_option, print_answer
from flowvi.compat.arviz_groups import as_written, read_groups

if TYPE_CHECKING:
    import arviz as az

PICTURE = "evidence.png"


@click.command(
    "evidence",
    short_help="Estimate and bound the log evidence of a fitted model.",
    epilog="""\b
Examples:
  flowvi evidence results/eight_schools
  flowvi evidence results/eight_schools --mcmc mcmc.nc

\b
Exit codes:
  0    the estimates of the log evidence can be relied on
  1    there is no evidence (an improper prior), or a file cannot be read or written
  2    the command line was wrong
  3    the bounds hold, but the estimates cannot be relied on""",
)
@folder_argument
@click.option(
    "--mcmc",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draws of neutra, saved as NetCDF, for an upper bound.",
)
@json_option
@click.pass_context
def evidence_command(ctx: click.Context, folder: Path, mcmc: Path | None, as_json: bool) -> None:
    """Print lower bounds, estimates and upper bounds of the log evidence, and draw them.

    DIR is a folder that `flowvi fit` wrote. The model file is not needed: the
    draws in posterior.nc carry their weights. The picture goes to
    evidence.png in the same folder.
    """
    from flowvi.analysis.evidence import evidence
    from flowvi.cli import results

    draws = folder / "posterior.nc"
    if (folder / "guide.nc").exists():
        # The fit ended in Markov chains.
        draws, mcmc = folder / "guide.nc", mcmc or draws
    with one_line_warnings(), errors_without_traceback(), as_written(folder):
        found = evidence(_read(draws), None if mcmc is None else _read(mcmc))
    import matplotlib as mpl

    mpl.use("agg")  # files are drawn, no windows
    from flowvi.plots import plot_evidence

    picture = folder / PICTURE
    results.write_atomic(picture, lambda file: results.save(plot_evidence(found).figure, file))
    where = f"In {folder}:\n  {PICTURE:<13} the bounds and estimates as a picture"
    print_answer(as_json, {"evidence": found, "picture": picture}, f"{found}\n\n{where}")
    if not found.reliable:
        ctx.exit(DISTRUSTED)


def _read(file: Path) -> az.InferenceData:
    if not file.is_file():
        raise click.UsageError(f"There is no {file}; name a folder that `flowvi fit` wrote.")
    return read_groups(file)
