"""`flowvi report`: one HTML file on a folder of results."""

from pathlib import Path

import click

from flowvi.cli.errors import errors_without_traceback, one_line_warnings
from flowvi.cli.options import folder_argument


@click.command(
    "report",
    short_help="Write one HTML file on a fitted model.",
    epilog="""\b
Examples:
  flowvi report results/eight_schools
  flowvi report results/eight_schools --out eight_schools.html

\b
Exit codes:
  0    the report was written, whatever its verdict
  1    a file cannot be read or written
  2    the command line was wrong""",
)
@folder_argument
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write it.  [default: DIR/report.html]",
)
def report_command(folder: Path, out: Path | None) -> None:
    """Write a report on the results in DIR, a folder that `flowvi fit` wrote.

    The file needs no network and no other file. The model file is not needed,
    and not run: all comes from the folder.
    """
    from flowvi.reporting import report

    with one_line_warnings(), errors_without_traceback():
        try:
            file = report(folder, out)
        except OSError as error:
            raise click.ClickException(f"Could not write the report: {error}.") from error
    click.echo(file)
