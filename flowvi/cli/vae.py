"""`flowvi vae`: from images to a trained variational autoencoder, its bounds and its pictures."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flowvi.cli.catalog import names
from flowvi.cli.errors import errors_without_traceback, interruptible, one_line_warnings
from flowvi.cli.folder import VAE_FILES, check_folder
from flowvi.cli.options import (
    EXISTING_FOLDER,
    memory_option,
    objective_call,
    one_of,
    out_option,
    seed_option,
)
from flowvi.cli.resume import (
    CHECKPOINT,
    announce_writing,
    explain_resume,
    results_folder,
    resume_option,
)
from flowvi.runtime.tables import is_table_file

if TYPE_CHECKING:
    from flowvi.cli.vae_data import Given
    from flowvi.objectives.renyi_bound import Renyi
    from flowvi.vae import Autoencoder, Images

LIKELIHOODS = names(("vae.likelihoods", "LIKELIHOODS"))
NETS = names(("vae.nets", "NETS"))
POSTERIORS = names(("vae.posteriors", "POSTERIORS"))
PRIORS = names(("vae.priors", "PRIORS"))
# Default preprocessing of pixels for each likelihood.
READ = {
    "bernoulli": "static",
    "categorical": "levels",
    "continuous_bernoulli": "grey",
    "discretised_logistic": "levels",
    "gaussian": "grey",
    "gaussian_fixed": "grey",
}
AUTO = "auto"
# Usual number of steps of a table, and the fewest and the most epochs that its warm-up is a tenth
# of; priors that need images.
TABLE_STEPS, TABLE_EPOCHS = 4000, (20, 500)
OF_IMAGES = ("glow", "vamp")
# Default sizes for scikit-learn's digits, and for image files.
SMALL = {"latent": 16, "hidden": 128, "batch_size": 20, "warmup": 10}
LARGE: dict[str, int] = {"latent": 64, "hidden": 300, "batch_size": 100, "warmup": 5}


def other_guides(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Names of guides with commas between them."""
    found = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in found:
        one_of("guide of a VAE", POSTERIORS)(ctx, param, name)
    if len(set(found)) < len(found):
        raise click.BadParameter(f"'{value}' names a guide twice.")
    return found


@click.command(
    "vae",
    short_help="Train a variational autoencoder on images or a table.",
    epilog="""\b
Examples:
  flowvi vae --out results/digits
  flowvi vae --compare planar,iaf --out results/digits
  flowvi vae --data mnist.npz --guide iaf --out results/iaf
  flowvi vae --data mnist.npz --prior maf --against results/iaf --out results/maf
  flowvi vae --data mnist.npz --guide iaf --resume results/iaf
  flowvi vae --data faces.npz --likelihood discretised_logistic --net conv --out results/faces
  flowvi vae --data people.csv --out results/people

\b
Exit codes:
  0    trained and written
  1    the data cannot be used; or a file could not be written (a full disk): all
       others are, and --resume writes the rest
  2    the command line was wrong; nothing was trained
  130  interrupted (Ctrl-C); the results so far are written; --resume continues the fit
  143  the same, by SIGTERM""",
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="An .npz file with train_x, val_x and test_x, or x; chardata.mat, the silhouettes' .mat, "
    "or the folder of .amat files; a table, .csv, .tsv or .parquet.  [default: scikit-learn's "
    "digits]",
)
@click.option(
    "--binarise",
    type=click.Choice(["static", "dynamic", "threshold"]),
    default="static",
    show_default=True,
    help="How pixels become 0 or 1, for --likelihood bernoulli.",
)
@click.option(
    "--likelihood",
    callback=one_of("likelihood", (AUTO, *LIKELIHOODS)),
    default=AUTO,
    help="bernoulli, continuous_bernoulli, categorical, discretised_logistic, gaussian, ...  "
    "[default: what suits the pixels: bernoulli, or for floats one of the densities]",
)
@click.option(
    "--prior",
    callback=one_of("prior", PRIORS),
    default="normal",
    show_default=True,
    help="normal, mixture, vamp, or a flow: coupling, maf, glow.",
)
@click.option(
    "--guide",
    callback=one_of("guide of a VAE", POSTERIORS),
    default="gaussian",
    show_default=True,
    help="gaussian, iaf, planar, radial, sylvester, coupling, spline, fvae, ...",
)
@click.option(
    "--compare",
    callback=other_guides,
    default="",
    metavar="GUIDES",
    help="Further guides, as in planar,iaf: each is trained with the same data and seed, into a "
    "folder of its own, and compared on the same test images.",
)
@click.option(
    "--net",
    callback=one_of("net", NETS),
    default="mlp",
    show_default=True,
    help="mlp: two hidden layers; conv: gated convolutions; maps: conv with an image as code.",
)
@click.option(
    "--latent",
    type=click.IntRange(min=1),
    help="Latent dimensions.  [default: 64; of a table, half of the numbers of a row, to 16]",
)
@click.option(
    "--objective",
    callback=objective_call,
    metavar="OBJECTIVE",
    help='elbo (the default), "iwelbo(50)": see `flowvi list objectives`.',
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Most epochs; over the last half of them the step size falls.  [default: 1000]",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Epochs without a rise of the validation bound before the step size falls; twice, then "
    "training ends.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows per step.  [default: 100]")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    help="Epochs over which the weight of the prior rises to 1.  [default: 5]",
)
@click.option(
    "--particles",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Importance samples K per row for the test bound.",
)
@click.option(
    "--test-images",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Largest number of test images, or rows, for that bound.",
)
@click.option(
    "--against",
    type=EXISTING_FOLDER,
    metavar="DIR",
    help="Results of another run, to compare with row by row.",
)
@seed_option
@click.option("--quiet", is_flag=True, help="No progress bar; print the bounds only.")
@out_option
@memory_option
@resume_option
@click.pass_context
def vae_command(
    ctx: click.Context,
    data: Path | None,
    binarise: str,
    likelihood: str,
    prior: str,
    guide: str,
    compare: tuple[str, ...],
    net: str,
    latent: int | None,
    objective: Renyi | None,
    epochs: int | None,
    patience: int,
    batch_size: int | None,
    lr: float,
    warmup: int | None,
    particles: int,
    test_images: int,
    against: Path | None,
    seed: int,
    quiet: bool,
    out: Path | None,
    resume: Path | None,
) -> None:
    """Train a variational autoencoder; write bounds, draws and pictures to a folder.

    Training ends by itself, when the bound of validation images has stopped rising; the best
    epoch is kept.
    The bounds are those of test images, or of test rows of a table: the ELBO, and the
    importance-weighted bound of K draws, with standard errors over images or rows. Columns of a
    table have likelihoods of their own: Gaussian for floats, Bernoulli for 0 and 1, categorical
    for strings and categories, negative binomial or Poisson for counts.
    """
    tabular = data is not None and data.is_file() and is_table_file(data)
    if tabular:
        _refuse_options_of_images(ctx, prior)
    if guide in compare:
        raise click.UsageError(f"--compare names '{guide}', which the others are compared with.")
    if compare and against is not None:
        raise click.UsageError("Give --compare or --against: the others are compared with --guide.")
    folder = results_folder(out, resume, VAE_FILES)
    places = [folder, *(folder / name for name in compare)]
    for place in places[1:]:
        check_folder(place, VAE_FILES)
    with one_line_warnings(), interruptible() as stop, errors_without_traceback():
        from flowvi.cli import vae_compare as guides
        from flowvi.cli import vae_results as results
        from flowvi.cli.results import describe_failures
        from flowvi.cli.vae_data import facts_of
        from flowvi.fitting.fit import fit
        from flowvi.objectives.renyi_bound import elbo
        from flowvi.targets import from_pyro
        from flowvi.training.minibatch import PLATEAU, Minibatch
        from flowvi.vae.model import PLATE

        images = {"likelihood": likelihood, "net": net, "binarise": binarise}
        if not tabular and likelihood == AUTO:
            images["likelihood"] = _proposed(data)
        outcomes: list[guides.Outcome] = []
        other = None
        for name, place in zip((guide, *compare), places, strict=True):
            if compare:
                click.echo(f"\n{name}:" if outcomes else f"{name}:")
            made, given, data_rows, held, usual = (
                _of_table(data, latent, name, prior, batch_size, seed)
                if tabular and data is not None
                else _of_images(data, latent, name, prior, seed, **images)
            )
            if against is not None:
                other = results.read_bounds(against, given, particles, test_images)
            target = from_pyro(made.model, data_rows, local=PLATE)
            target.name = given.name
            fitted = fit(
                target,
                made.guide,
                objective or elbo(1, "total"),
                validation=held,
                seed=seed,
                progress=not quiet,
                minibatch=Minibatch.to_plateau(
                    batch_size=batch_size or usual["batch_size"],
                    epochs=epochs or PLATEAU["epochs"],
                    patience=patience,
                    lr=lr,
                    warmup_epochs=usual["warmup"] if warmup is None else warmup,
                ),
                checkpoint=place / CHECKPOINT,
                resume=resume is not None,
            )
            if fitted.meta["interrupted"]:
                announce_writing("epochs", folder)
            facts = facts_of(given, made.parts, binarise)
            run = results.VaeRun(given, made.generator, fitted, facts, particles, test_images, seed)
            written = results.report(run, other, place, quiet)
            some, failed = written.some, written.failed
            if failed or fitted.meta["interrupted"]:
                break
            outcomes.append(guides.Outcome.of(name, written.found, fitted))
            other = outcomes[0].found if compare else other
        if len(outcomes) > 1 and len(outcomes) == len(places):
            some, failed = guides.report_guides(outcomes, given.unit, folder)
    if failed:
        there = (folder / CHECKPOINT).is_dir()
        raise click.ClickException(describe_failures(failed, some, folder, there))
    if fitted.meta["interrupted"]:
        explain_resume("epochs", folder)
        ctx.exit(stop.code)
    for place in places:
        shutil.rmtree(place / CHECKPOINT, ignore_errors=True)


def _proposed(data: Path | None) -> str:
    """The likelihood that suits the pixels; says so where it is not the usual one."""
    from flowvi.vae import propose_likelihood

    found = propose_likelihood(data)
    if found.reason:
        click.echo(f"{found.reason[:1].upper()}{found.reason[1:]}.", err=True)
    return found.likelihood


def _of_images(
    data: Path | None,
    latent: int | None,
    guide: str,
    prior: str,
    seed: int,
    *,
    likelihood: str,
    net: str,
    binarise: str,
) -> tuple[Autoencoder, Given, Any, Any, dict[str, int]]:
    """An autoencoder of images, the images, training and validation rows, and usual sizes."""
    from flowvi.cli.vae_data import GivenImages
    from flowvi.vae import build, load

    usual = SMALL if data is None else LARGE
    images = load(data, READ[likelihood] if likelihood != "bernoulli" else binarise)
    made = build(
        images.example,
        latent or _latent(net, images, usual["latent"]),
        guide,
        likelihood,
        prior,
        net,
        net_sizes={"hidden": [usual["hidden"]] * 2} if net == "mlp" else None,
        seed=seed,
    )
    return made, GivenImages(images), images.rows, images.val, usual


def _of_table(
    data: Path, latent: int | None, guide: str, prior: str, batch_size: int | None, seed: int
) -> tuple[Autoencoder, Given, Any, Any, dict[str, int]]:
    """The same of the rows of a table."""
    from flowvi.cli.vae_data import GivenTable
    from flowvi.vae import build_table, load_table

    table = load_table(data)
    made = build_table(table, latent, guide, prior, seed=seed)
    fewest, most = TABLE_EPOCHS
    size = min(batch_size or LARGE["batch_size"], len(table.train))
    epochs = min(max(TABLE_STEPS * size // len(table.train), fewest), most)
    usual = {"batch_size": size, "warmup": epochs // 10}
    return made, GivenTable(table), table.train, table.val, usual


def _refuse_options_of_images(ctx: click.Context, prior: str) -> None:
    """Refuse options that say how images are read and decoded."""
    for name in ("binarise", "likelihood", "net"):
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name} is for images: the likelihoods of a table are those of its columns, "
                "and its nets have two hidden layers."
            )
    if prior in OF_IMAGES:
        raise click.UsageError(f"--prior {prior} is made of images: take another for a table.")


def _latent(net: str, images: Images, usual: int) -> int:
    """The usual length of z, or that of a code of one channel where it is an image."""
    from flowvi.vae import code_shape

    return math.prod(code_shape(images.size)) if net == "maps" else usual
