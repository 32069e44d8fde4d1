"""`flowvi check`: the verdict on a fit again, with a second opinion by short chains."""

from __future__ import annotations

from pathlib import Path

import click

from flowvi.cli.errors import DISTRUSTED, errors_without_traceback, interruptible, one_line_warnings
from flowvi.cli.folder import DRAWS
from flowvi.cli.model_file import check_path
from flowvi.cli.neutra_sbc import DATA, load_fit
from flowvi.cli.options import folder_argument, seed_option
from flowvi.cli.output import json_option, print_answer
from flowvi.compat.arviz_groups import as_written, read_groups
from flowvi.diagnostics import VERDICTS, Diagnosis


@click.command(
    "check",
    short_help="Check a fit again, also by short Markov chains.",
    epilog="""\b
Examples:
  flowvi check results/eight_schools
  flowvi check results/eight_schools --model models/eight_schools.py --seed 3

\b
Exit codes:
  0    the draws can be trusted, as they are or resampled
  1    the model file, the fit or its draws cannot be read
  2    the command line was wrong
  3    the draws are not to be trusted
  130  interrupted""",
)
@folder_argument
@click.option(
    "--model",
    type=Path,
    metavar="MODEL.py",
    help="The model of the fit, which is run: chains start at fresh draws.",
)
@DATA
@click.option("--draws", type=click.IntRange(min=400), default=4000, show_default=True)
@seed_option
@json_option
@click.pass_context
def check_command(
    ctx: click.Context,
    folder: Path,
    model: Path | None,
    data: Path | None,
    draws: int,
    seed: int,
    as_json: bool,
) -> None:
    """Print the verdict on the fit in DIR, and with --model that of fresh draws and of chains.

    Without --model no code is run: the verdict is the one written with the draws, with what short
    chains said during the fit.
    """
    if model is not None:
        check_path(model)
    with one_line_warnings(), interruptible(), errors_without_traceback():
        if model is None:
            diagnosis = _written(folder)
        else:
            from flowvi.analysis.diagnosis import diagnose

            found = load_fit(model, folder, data).draw(draws, seed)
            diagnosis = diagnose(found, chains=not found.mcmc, seed=seed)
    print_answer(as_json, {"diagnosis": diagnosis}, str(diagnosis))
    if diagnosis.verdict == VERDICTS[-1]:
        ctx.exit(DISTRUSTED)


def _written(folder: Path) -> Diagnosis:
    """The verdict in a folder of results."""
    from flowvi.interop.read_draws import diagnosis_of

    file = folder / DRAWS
    if not file.is_file():
        raise click.UsageError(f"There is no {file}; name a folder that `flowvi fit` wrote.")
    with as_written(folder):
        found = diagnosis_of(read_groups(file))
    if found is None:
        raise click.ClickException(f"{file} has no verdict: it has too few draws.")
    return found
