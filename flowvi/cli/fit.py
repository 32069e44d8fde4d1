"""`flowvi fit`: from a model file to a folder of results."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowvi.cli.errors import (
    DISTRUSTED,
    command_line,
    errors_without_traceback,
    interruptible,
    one_line_warnings,
)
from flowvi.cli.folder import FIT
from flowvi.cli.model_file import check_path, load_target
from flowvi.cli.options import guide_name, memory_option, objective_call, out_option, seed_option
from flowvi.cli.output import json_option, print_answer
from flowvi.cli.resume import (
    CHECKPOINT,
    announce_writing,
    explain_resume,
    results_folder,
    resume_option,
)
from flowvi.diagnostics import MIN_DRAWS, VERDICTS

if TYPE_CHECKING:
    from flowvi.cli.results import ResultFile, WriteFailure
    from flowvi.fitting.result import Fit
    from flowvi.objectives.renyi_bound import Renyi
    from flowvi.training.compiling import Compile

# Draws of each guide.
DRAWS = 4000
COMPILE: dict[str, Compile] = {"auto": "auto", "on": True, "off": False}


@click.command(
    "fit",
    short_help="Fit a model file; write a judged posterior.",
    epilog="""\b
Examples:
  flowvi fit models/eight_schools.py --out results/eight_schools
  flowvi fit models/garch11.py --data garch.json --out results/garch
  flowvi fit models/funnel.py --guide realnvp --objective "iwelbo(16)" \\
      --steps 5000 --restarts 4 --seed 1 --out results/funnel
  flowvi fit models/garch11.py --data garch.json --resume results/garch
  torchrun --nproc-per-node 4 -m flowvi fit models/garch11.py --out results/garch

\b
Exit codes:
  0    fitted, and the draws or the resampled draws can be trusted
  1    the model file or its data failed; or a file could not be written (a full disk):
       all others are, and --resume writes the rest
  2    the command line was wrong; nothing was fitted
  3    fitted and written, but the verdict is "do not trust"
  130  interrupted (Ctrl-C); the results so far are written; --resume continues the fit
  143  the same, by SIGTERM""",
)
@click.argument("model", type=Path, metavar="MODEL.py")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The file that the model's data() reads.",
)
@click.option(
    "--guide",
    callback=guide_name,
    default="auto",
    show_default=True,
    help="A name from `flowvi list guides` or `flowvi list flows`.",
)
@click.option(
    "--objective",
    callback=objective_call,
    metavar="OBJECTIVE",
    help='elbo (the default), "iwelbo(16)", "renyi(0.5, 16)": see `flowvi list objectives`.',
)
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps.  [default: chosen]")
@click.option(
    "--draws",
    type=click.IntRange(min=MIN_DRAWS),
    help="Draws from each restart's guide.  [default: 4000, fewer of over 10,000 latents]",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Independent fits, each a chain of the results.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes in which restarts run.  [default: one after the other in this one]",
)
@seed_option
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Largest wall-clock time of the fit.  [default: no limit]",
)
@click.option(
    "--no-escalate",
    is_flag=True,
    help="Do not try other guides and NUTS after a result that is not to be trusted.",
)
@click.option(
    "--compile",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Compile the gradient step; auto: only for long fits, in the background.",
)
@click.option("--quiet", is_flag=True, help="No progress bar; print the verdict only.")
@out_option
@memory_option
@resume_option
@json_option
@click.pass_context
def fit_command(
    ctx: click.Context,
    model: Path,
    data: Path | None,
    guide: str,
    objective: Renyi | None,
    steps: int | None,
    draws: int | None,
    restarts: int,
    processes: int | None,
    seed: int,
    budget: float | None,
    no_escalate: bool,
    compile: str,
    quiet: bool,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
) -> None:
    """Fit a guide to the model in MODEL.py and write draws, summary and pictures to a folder.

    MODEL.py is run: it defines `model`, a Pyro model, and `data()` or
    `data(path)`, which returns the tuple of its arguments. The verdict on the
    result is printed first.
    """
    check_path(model)
    folder = results_folder(out, resume)
    with one_line_warnings(), interruptible() as stop:
        from flowvi.cli import results
        from flowvi.fitting.fit import fit
        from flowvi.runtime import distributed

        ctx.with_resource(distributed.join_process_group())
        target = load_target(model, data)
        with errors_without_traceback(), _executor(processes) as executor:
            fitted = fit(
                target,
                guide,
                objective,
                steps=steps,
                restarts=restarts,
                seed=seed,
                budget=budget,
                escalate=not no_escalate,
                compile=COMPILE[compile],
                progress=not quiet,
                checkpoint=folder / CHECKPOINT,
                resume=resume is not None,
                executor=executor,
            )
        if distributed.rank():
            return  # the first process writes and speaks
        fitted.meta["command"] = command_line(ctx)
        if fitted.meta["interrupted"]:
            announce_writing("steps", folder)
        verdict, written, failed = _report(fitted, draws, seed, folder, quiet, as_json)
    if failed:
        there = (folder / CHECKPOINT).is_dir()
        raise click.ClickException(results.describe_failures(failed, bool(written), folder, there))
    if fitted.meta["interrupted"]:
        explain_resume("steps", folder)
        click.echo(f"flowvi report {folder} writes a report on them.", err=True)
        ctx.exit(stop.code)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    if verdict == VERDICTS[-1]:
        ctx.exit(DISTRUSTED)


@contextmanager
def _executor(processes: int | None) -> Iterator[Executor | None]:
    """An executor of spawned processes; forked ones would copy locks of threads that they lack."""
    if not processes:
        yield None
        return
    executor = ProcessPoolExecutor(processes, get_context("spawn"))
    try:
        yield executor
    except BaseException:
        # Unfinished restarts are cancelled; their finished work is in the checkpoint.
        workers = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    executor.shutdown()


def _report(
    fitted: Fit, n: int | None, seed: int, out: Path, quiet: bool, as_json: bool
) -> tuple[str, list[ResultFile], list[WriteFailure]]:
    """Draw, diagnose, print and write; returns the verdict, and files written and not written."""
    from flowvi.cli import results
    from flowvi.draws.diagnose import diagnose
    from flowvi.fitting.structured_fit import StructuredFit

    if n is None:
        n = fitted.most_draws if isinstance(fitted, StructuredFit) else DRAWS
    if not quiet and sys.stderr is not None and sys.stderr.isatty():
        click.echo(
            f"Drawing {n:,} times; then tables, pictures and a report in {out} ...", err=True
        )
    draws = fitted.draw(n, seed=seed)
    try:
        with errors_without_traceback():
            diagnosis = diagnose(draws)
    except click.ClickException:
        with results.naming_file(out / FIT):
            fitted.save(out / FIT)
        raise
    kept = results.recommended_draws(draws, diagnosis, seed)
    numbers = results.summary(kept)
    try:
        # Write all files before the first output: its reader may close the pipe early.
        written, failed = results.write(fitted, draws, kept, numbers, out)
    finally:
        if not as_json:
            click.echo(results.wrapped(str(diagnosis)))
    names = {file.name: file.what for file in written if file.name != f"{FIT}/"}
    if as_json:
        facts = {**fitted.meta, "log": fitted.log, "folder": out, "files": names}
        posterior = numbers.drop(columns="draws").to_dict("index")
        answer = {"diagnosis": diagnosis, "draws": kept.word, "posterior": posterior, "fit": facts}
        print_answer(True, answer, "")
    elif not quiet:
        click.echo(f"\nPosterior ({kept.word} draws)\n{results.table(numbers, kept)}\n\nIn {out}:")
        # The folder of the fit is listed last.
        for file in sorted(written, key=lambda file: file.name.endswith("/")):
            click.echo(f"  {file.name:<13} {file.what}")
    elif failed:
        # Files are missing, so the table is printed in spite of --quiet.
        click.echo(f"\nPosterior ({kept.word} draws)\n{results.table(numbers, kept)}")
    return diagnosis.verdict, written, failed
