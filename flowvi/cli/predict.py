"""`flowvi predict`: new data from a fitted model."""

from __future__ import annotations

from pathlib import Path

import click

from flowvi.cli.errors import DISTRUSTED, errors_without_traceback, interruptible, one_line_warnings
from flowvi.cli.model_file import check_path, load_arguments
from flowvi.cli.neutra_sbc import DATA, MODEL, load_fit
from flowvi.cli.options import folder_argument, seed_option
from flowvi.cli.output import json_option, print_answer


@click.command(
    "predict",
    short_help="Predict new data by a fitted model.",
    epilog="""\b
Examples:
  flowvi predict models/garch11.py results/garch --data garch.json --new tomorrow.json
  flowvi predict models/radon.py results/radon --new other.csv --new-units county

\b
Exit codes:
  0    predicted
  1    the model file, the fit, the new data or the writing failed
  2    the command line was wrong
  3    predicted and written, but the draws behind it are not to be trusted""",
)
@MODEL
@folder_argument
@DATA
@click.option(
    "--new",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    required=True,
    help="New data, which the model's data() reads.",
)
@click.option(
    "--new-units",
    multiple=True,
    metavar="PLATE",
    help="A plate whose units are others than in the fit: their latents are drawn anew.",
)
@click.option("--draws", type=click.IntRange(min=1), default=1000, show_default=True)
@seed_option
@json_option
@click.pass_context
def predict_command(
    ctx: click.Context,
    model: Path,
    folder: Path,
    data: Path | None,
    new: Path,
    new_units: tuple[str, ...],
    draws: int,
    seed: int,
    as_json: bool,
) -> None:
    """Run MODEL.py on new data with draws of the fit in DIR; the result goes to predictions.nc.

    New data at observed sites are scored; new values are drawn there as well.
    """
    check_path(model)
    with one_line_warnings(), interruptible(), errors_without_traceback():
        from flowvi.cli import results
        from flowvi.compat.netcdf import write_groups
        from flowvi.draws.diagnose import diagnose
        from flowvi.draws.prediction import predict
        from flowvi.draws.resampling import resample
        from flowvi.interop.inference_data import to_inference_data

        fit = load_fit(model, folder, data)
        table = fit.draw(max(draws, 1000), seed)
        verdict = diagnose(table).verdict
        kept = resample(table, seed, draws) if verdict == results.RESAMPLE else table.thinned(draws)
        arguments = load_arguments(model, new, "--new")[1]
        found = predict(kept, *arguments, seed=seed, new_units=new_units)
        groups = to_inference_data(kept, log_likelihood=False, predictions=found)
        file = folder / "predictions.nc"
        with results.naming_file(file):
            write_groups(groups, file)
    shapes = {name: list(value.shape) for name, value in found.values.items()}
    densities = {name: found.log_density(name) for name in found.log_likelihood}
    scores = {k: {"sum": float(v.sum()), "rows": v.size} for k, v in densities.items()}
    record = {"file": file, "verdict": verdict, "shapes": shapes, "log_density": scores}
    print_answer(as_json, record, f"{found}\n\nIn {file}")
    if verdict == results.DISTRUST:
        click.echo("The fit is not to be trusted, so its predictions are not either.", err=True)
        ctx.exit(DISTRUSTED)
