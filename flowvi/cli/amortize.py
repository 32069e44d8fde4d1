"""`flowvi amortize` and `flowvi apply`: one guide for every data set of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowvi.cli.errors import (
    DISTRUSTED,
    command_line,
    errors_without_traceback,
    interruptible,
    one_line_warnings,
)
from flowvi.cli.folder import check_folder
from flowvi.cli.model_file import check_path, load_arguments, load_named_arguments, reads_a_file
from flowvi.cli.neutra_sbc import DATA, MODEL, QUIET
from flowvi.cli.options import folder_argument, memory_option, seed_option
from flowvi.cli.output import json_option, print_answer
from flowvi.cli.resume import lock_results
from flowvi.diagnostics.calibration import LEVEL

if TYPE_CHECKING:
    from collections.abc import Callable

GUIDE, REPORT, TABLE, SUMMARY, STORE = (
    "guide",
    "report.html",
    "fits.csv",
    "summary.csv",
    "fits.npz",
)


@click.command(
    "amortize",
    short_help="Train one guide for every data set of a model.",
    epilog="""\b
Examples:
  flowvi amortize models/eight_schools.py --out results/schools
  flowvi apply results/schools --model models/eight_schools.py --data new.csv

\b
Exit codes:
  0    trained, and the ranks of true values look uniform for plain or resampled draws
  1    the model file failed, or it cannot be amortised; the message says why
  2    the command line was wrong
  3    trained and written, but not calibrated
  130  interrupted; a training ends at its present step, and is calibrated""",
)
@MODEL
@DATA
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Largest wall-clock time of the training.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps.  [default: chosen]")
@click.option(
    "--rows",
    type=(click.IntRange(min=1), click.IntRange(min=1)),
    metavar="LEAST MOST",
    help="Numbers of rows of the data sets to come.  [default: half to twice the example's]",
)
@click.option(
    "--fits",
    type=click.IntRange(min=2),
    default=300,
    show_default=True,
    help="Simulated data sets of the calibration.",
)
@seed_option
@click.option("--out", type=Path, required=True, metavar="DIR", help="Folder of the results.")
@QUIET
@json_option
@click.pass_context
def amortize_command(
    ctx: click.Context,
    model: Path,
    data: Path | None,
    budget: float,
    steps: int | None,
    rows: tuple[int, int] | None,
    fits: int,
    seed: int,
    out: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a guide of MODEL.py on data sets that it simulates, and calibrate it.

    The arguments that data() returns are the example: their shapes, not their observed values,
    are used. DIR has the guide, and a report with the calibration first.
    """
    check_path(model)
    check_folder(out)
    lock_results(out, "'--out'")
    with one_line_warnings(), interruptible(), errors_without_traceback():
        import matplotlib as mpl

        mpl.use("agg")
        from flowvi.amortized.amortize import amortize
        from flowvi.analysis.sbc import sbc
        from flowvi.reporting.amortized import report_amortized

        run, arguments, dims, coords = load_named_arguments(model, data)
        guide = amortize(
            _named(run, model.stem),
            *arguments,
            budget=budget,
            steps=steps,
            rows=rows,
            seed=seed,
            progress=not quiet,
            dims=dims,
            coords=coords,
        )
        guide.meta["command"] = command_line(ctx)
        guide.save(out / GUIDE)
        calibration = sbc(guide, fits=fits, seed=seed, progress=not quiet)
        report = report_amortized(guide, calibration, out / REPORT)
    record = {
        "folder": out,
        "guide": guide.meta,
        "log": guide.log,
        "uniform": calibration.uniform,
        "trusted": calibration.trusted,
    }
    print_answer(as_json, record, f"{guide}\n\n{calibration}\n\nIn {out}: {GUIDE}/, {report.name}")
    if max(calibration.uniform.values()) < LEVEL:
        ctx.exit(DISTRUSTED)


@click.command(
    "apply",
    short_help="Posteriors of new data sets by an amortised guide.",
    epilog="""\b
Examples:
  flowvi apply results/schools --model models/eight_schools.py --data new.csv
  flowvi apply results/assays --model assay.py --data all.csv --by plate --out results/all

\b
A data file is read by the model's data(path), if it takes a path. Otherwise it is a table (.csv)
with a column for each argument of the model that differs among data sets.

\b
Exit codes:
  0    the draws of all data sets can be trusted, by the guide or by fits of their own
  1    the model file, the guide or a data file failed
  2    the command line was wrong
  3    done and written, but some data sets are not to be trusted
  130  interrupted; what is finished is kept, and the same command goes on""",
)
@folder_argument
@click.option("--model", type=Path, required=True, metavar="MODEL.py", help="The model, as before.")
@click.option(
    "--data",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE",
    help="A data set; several of them by several options.",
)
@click.option("--by", metavar="COLUMN", help="Column of a table whose values tell data sets apart.")
@click.option("--draws", type=click.IntRange(min=200), default=1000, show_default=True)
@click.option("--no-escalate", is_flag=True, help="No fits of data sets that are not trusted.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Largest wall-clock time of each of these fits.  [default: no limit]",
)
@seed_option
@click.option("--out", type=Path, metavar="DIR", help="Folder of the results.  [default: DIR]")
@QUIET
@memory_option
@json_option
@click.pass_context
def apply_command(
    ctx: click.Context,
    folder: Path,
    model: Path,
    files: tuple[Path, ...],
    by: str | None,
    draws: int,
    no_escalate: bool,
    budget: float | None,
    seed: int,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Draw from the guide in DIR for each data set, judge it, and fit those not trusted.

    The results are fits.csv, one line for each data set, and summary.csv, means and quantiles.
    """
    check_path(model)
    out = out or folder
    check_folder(out)
    lock_results(out, "'--out'")
    with one_line_warnings(), interruptible(), errors_without_traceback():
        from flowvi.amortized.storage import load_guide
        from flowvi.cli import results

        run, _ = load_arguments(model, None) if not reads_a_file(model) else (None, ())
        named: dict[str, Any] = {}
        for file in files:
            named |= _data_sets(model, file, by)
        if run is None:
            run, _ = load_arguments(model, files[0])
        guide = load_guide(folder / GUIDE, _named(run, model.stem))
        settings: dict[str, Any] = {} if budget is None else {"budget": budget}
        fits = guide.fit_many(
            list(named.values()),
            draws,
            not no_escalate,
            progress=not quiet,
            file=out / STORE,
            seed=seed,
            **settings,
        )
        table = fits.to_dataframe()
        table.index = list(named)
        summaries = []
        for name, line, i in zip(named, fits.lines, range(len(fits)), strict=True):
            if line.method != "failed":
                summaries.append(fits[i].summary().assign(**{"data set": name}))
        results.write_atomic(out / TABLE, lambda file: table.to_csv(file, index_label="data set"))
        if summaries:
            import pandas as pd

            whole = pd.concat(summaries).rename_axis("scalar").reset_index()
            whole = whole.set_index("data set")
            results.write_atomic(out / SUMMARY, whole.to_csv)
    lines = [{"data set": n, **vars(line)} for n, line in zip(named, fits.lines, strict=True)]
    record = {"folder": out, "trusted": int(fits.trusted.sum()), "data sets": lines}
    print_answer(as_json, record, f"{fits}\n\nIn {out}: {TABLE}, {SUMMARY}")
    if not fits.trusted.all():
        ctx.exit(DISTRUSTED)


def _named(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The model under the name of its file."""
    if hasattr(run, "__dict__"):
        run.__name__ = name
    return run


def _data_sets(model: Path, file: Path, by: str | None) -> dict[str, Any]:
    """Data sets of a file by name."""
    if reads_a_file(model) and by is None:
        return {file.name: load_arguments(model, file)[1]}
    import pandas as pd

    if file.suffix != ".csv":
        raise click.UsageError(f"{file} is no table (.csv), and the model's data() takes no path.")
    try:
        table = pd.read_csv(file)
    except (ValueError, OSError) as error:
        raise click.ClickException(
            f"{file} is no table of comma-separated values: {error}"
        ) from None
    if by is None:
        return {file.name: table}
    if by not in table.columns:
        raise click.UsageError(
            f"{file} has no column '{by}' for --by; it has {', '.join(map(str, table.columns))}."
        )
    return {
        f"{file.name}: {by} {value}": part.drop(columns=by)
        for value, part in table.groupby(by, sort=False)
    }
