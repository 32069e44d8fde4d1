"""`flowvi resample` and `flowvi compare`, which need only folders of results."""

from __future__ import annotations

from pathlib import Path

import click

from flowvi.cli.errors import DISTRUSTED, errors_without_traceback, one_line_warnings
from flowvi.cli.options import EXISTING_FOLDER, folder_argument, seed_option
from flowvi.cli.output import json_option, print_answer
from flowvi.compat.arviz_groups import as_written, read_groups


@click.command(
    "resample",
    short_help="Resample the draws of a fit by their weights.",
    epilog="""\b
Examples:
  flowvi resample results/eight_schools
  flowvi resample results/eight_schools --draws 1000 --seed 3

\b
Exit codes:
  0    resampled.nc was written
  1    there are no weights, or a file cannot be read or written
  2    the command line was wrong
  3    written, but the weights cannot be trusted: neither can the draws""",
)
@folder_argument
@click.option("--draws", type=click.IntRange(min=1), help="Number of draws.  [default: all]")
@seed_option
@json_option
@click.pass_context
def resample_command(
    ctx: click.Context, folder: Path, draws: int | None, seed: int, as_json: bool
) -> None:
    """Draw from posterior.nc in DIR in proportion to the smoothed weights, into resampled.nc.

    The result is one chain of draws that weigh the same. The model file is not needed.
    """
    from flowvi.cli import results
    from flowvi.compat.netcdf import write_groups
    from flowvi.interop.read_draws import diagnosis_of, resample_groups

    guide = folder / "guide.nc"
    with one_line_warnings(), errors_without_traceback(), as_written(folder):
        found = read_groups(guide if guide.exists() else folder / "posterior.nc")
        new = resample_groups(found, seed, draws)
        diagnosis = diagnosis_of(found)
    with results.naming_file(folder / "resampled.nc"):
        write_groups(new, folder / "resampled.nc")
    good = diagnosis is not None and (
        diagnosis.khat < diagnosis.khat_threshold and diagnosis.verdict != results.DISTRUST
    )
    size = new["posterior"].sizes["draw"]
    word = "" if diagnosis is None else f"; Pareto k-hat {diagnosis.khat:.2f}"
    record = {"file": folder / "resampled.nc", "draws": size, "diagnosis": diagnosis}
    print_answer(as_json, record, f"{size} draws in {folder / 'resampled.nc'}{word}")
    if not good:
        click.echo("The weights cannot be trusted, so these draws cannot be either.", err=True)
        ctx.exit(DISTRUSTED)


@click.command(
    "compare",
    short_help="Compare fitted models by evidence and by prediction.",
    epilog="""\b
Examples:
  flowvi compare results/pooled results/partial results/separate

\b
Exit codes:
  0    compared
  1    the models are of different data, or a file cannot be read
  2    the command line was wrong""",
)
@click.argument("folders", type=EXISTING_FOLDER, nargs=-1, required=True, metavar="DIR DIR...")
@click.option("--site", metavar="NAME", help="Observed site to predict, where there are several.")
@json_option
def compare_command(folders: tuple[Path, ...], site: str | None, as_json: bool) -> None:
    """Compare models of the same data, each in a folder that `flowvi fit` wrote.

    By evidence, all models being equally probable beforehand, and by
    leave-one-out prediction, corrected for the approximation.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    with one_line_warnings(), errors_without_traceback():
        if len(set(names)) < 2:
            raise click.UsageError("Name at least two different folders.")
        from flowvi.analysis.compare import compare

        models = {}
        for name, folder in zip(names, folders, strict=True):
            guide = folder / "guide.nc"
            models[name] = read_groups(guide if guide.exists() else folder / "posterior.nc")
        found = compare(models, var_name=site)
    table = None if found.loo is None else found.loo.reset_index(names="name").to_dict("records")
    record = {"models": found.models, "loo": table, "notes": found.notes}
    print_answer(as_json, record, str(found))
