"""`flowvi neutra` and `flowvi sbc`, which need the model file again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowvi.cli.errors import DISTRUSTED, errors_without_traceback, interruptible, one_line_warnings
from flowvi.cli.folder import FIT, check_folder
from flowvi.cli.model_file import check_path, load_arguments, load_target
from flowvi.cli.options import folder_argument, guide_name, seed_option
from flowvi.cli.output import json_option, print_answer
from flowvi.cli.resume import lock_results
from flowvi.diagnostics import VERDICTS
from flowvi.diagnostics.calibration import LEVEL

if TYPE_CHECKING:
    from flowvi.fitting.result import Fit

MODEL = click.argument("model", type=Path, metavar="MODEL.py")
DATA = click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The file that the model's data() read for the fit.",
)

QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")


@click.command(
    "neutra",
    short_help="Run NUTS in the space of a fitted guide.",
    epilog="""\b
Examples:
  flowvi neutra models/eight_schools.py results/eight_schools
  flowvi evidence results/eight_schools --mcmc results/eight_schools/mcmc.nc

\b
Exit codes:
  0    sampled, and the chains can be trusted
  1    the model file, the fit or the writing of the draws failed
  2    the command line was wrong
  3    sampled and written, but the chains are not to be trusted
  130  interrupted""",
)
@MODEL
@folder_argument
@DATA
@click.option("--draws", type=click.IntRange(min=100), default=1000, show_default=True)
@click.option("--warmup", type=click.IntRange(min=100), default=300, show_default=True)
@click.option("--chains", type=click.IntRange(min=2), default=4, show_default=True)
@seed_option
@QUIET
@json_option
@click.pass_context
def neutra_command(
    ctx: click.Context,
    model: Path,
    folder: Path,
    data: Path | None,
    draws: int,
    warmup: int,
    chains: int,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Sample the posterior of MODEL.py by NUTS, with the fit in DIR, into DIR/mcmc.nc."""
    check_path(model)
    lock_results(folder, "'DIR'")
    with one_line_warnings(), interruptible(), errors_without_traceback():
        from flowvi.analysis.neutra import neutra
        from flowvi.cli import results
        from flowvi.compat.netcdf import write_groups
        from flowvi.draws.diagnose import diagnose
        from flowvi.interop.inference_data import all_groups

        fit = load_fit(model, folder, data)
        found = neutra(fit, warmup, draws, chains, seed, progress=not quiet)
        diagnosis = diagnose(found)
        groups = all_groups(found)
        file, failed = results.write_or_fallback(folder / "mcmc.nc", partial(write_groups, groups))
    print_answer(as_json, {"file": file, "diagnosis": diagnosis}, f"{diagnosis}\n\nIn {file}")
    if failed is not None:
        raise click.ClickException(f"{failed.message} The draws are in {file} instead.")
    if diagnosis.verdict == VERDICTS[-1]:
        ctx.exit(DISTRUSTED)


@click.command(
    "sbc",
    short_help="Check fits of a model on simulated data.",
    epilog="""\b
Examples:
  flowvi sbc models/eight_schools.py --fits 200 --guide fullrank --out results/calibration

\b
Exit codes:
  0    the ranks of the true values look uniform, or are too few to tell (fewer than 100 fits)
  1    the model file failed, or it cannot simulate its data
  2    the command line was wrong
  3    some ranks are not uniform: fits of this model are not calibrated
  130  interrupted; the finished fits are kept, and the same command continues""",
)
@MODEL
@DATA
@click.option("--fits", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--draws", type=click.IntRange(min=200), default=1000, show_default=True)
@click.option("--guide", callback=guide_name, default="auto", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each fit.  [default: chosen]")
@seed_option
@click.option("--out", type=Path, required=True, metavar="DIR", help="Folder of the results.")
@QUIET
@json_option
@click.pass_context
def sbc_command(
    ctx: click.Context,
    model: Path,
    data: Path | None,
    fits: int,
    draws: int,
    guide: str,
    steps: int | None,
    seed: int,
    out: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fit MODEL.py to data sets that it simulates itself, and rank the true values.

    Finished fits are kept in DIR/sbc.npz, where a later call with the same options goes on.
    """
    check_path(model)
    check_folder(out)
    lock_results(out, "'--out'")
    settings: dict[str, Any] = (
        {"guide": guide} if steps is None else {"guide": guide, "steps": steps}
    )
    with one_line_warnings(), interruptible(), errors_without_traceback():
        from flowvi.analysis.sbc import sbc
        from flowvi.cli import results

        run, arguments = load_arguments(model, data)
        found = sbc(
            run,
            *arguments,
            fits=fits,
            draws=draws,
            seed=seed,
            file=out / "sbc.npz",
            progress=not quiet,
            **settings,
        )
    import matplotlib as mpl

    mpl.use("agg")
    from flowvi.plots import plot_sbc

    picture = out / "sbc.png"
    results.write_atomic(picture, lambda file: results.save(plot_sbc(found).flat[0].figure, file))
    record = {"picture": picture, "calibration": found, "enough": found.enough}
    print_answer(as_json, record, f"{found}\n\nIn {picture}")
    if max(found.uniform.values()) < LEVEL:
        ctx.exit(DISTRUSTED)


def load_fit(model: Path, folder: Path, data: Path | None) -> Fit:
    """The fit in a folder of results, to the model of a file."""
    from flowvi.fitting.load import load

    return load(folder / FIT, load_target(model, data))
