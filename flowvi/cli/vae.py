"""`flowvi vae`: from images to a trained variational autoencoder, its bounds and its pictures."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowvi.cli.catalog import names
from flowvi.cli.errors import errors_without_traceback, interruptible, one_line_warnings
from flowvi.cli.folder import VAE_FILES
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

if TYPE_CHECKING:
    from flowvi.objectives.renyi_bound import Renyi
    from flowvi.vae import Images

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
# Default sizes for scikit-learn's digits, and for image files.
SMALL = {"latent": 16, "hidden": 128, "batch_size": 20, "epochs": 60, "warmup": 10}
LARGE = {"latent": 64, "hidden": 300, "batch_size": 100, "epochs": 40, "warmup": 5}


@click.command(
    "vae",
    short_help="Train a variational autoencoder on images.",
    epilog="""\b
Examples:
  flowvi vae --out results/digits
  flowvi vae --data mnist.npz --guide iaf --epochs 40 --out results/iaf
  flowvi vae --data mnist.npz --prior maf --against results/iaf --out results/maf
  flowvi vae --data mnist.npz --guide iaf --epochs 40 --resume results/iaf
  flowvi vae --data faces.npz --likelihood discretised_logistic --net conv --out results/faces

\b
Exit codes:
  0    trained and written
  1    the images cannot be used; or a file could not be written (a full disk): all
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
    "or the folder of .amat files.  [default: scikit-learn's digits]",
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
    callback=one_of("likelihood", LIKELIHOODS),
    default="bernoulli",
    show_default=True,
    help="bernoulli, continuous_bernoulli, categorical, discretised_logistic, gaussian, ...",
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
    "--net",
    callback=one_of("net", NETS),
    default="mlp",
    show_default=True,
    help="mlp: two hidden layers; conv: gated convolutions; maps: conv with an image as code.",
)
@click.option("--latent", type=click.IntRange(min=1), help="Latent dimensions.  [default: 64]")
@click.option(
    "--objective",
    callback=objective_call,
    metavar="OBJECTIVE",
    help='elbo (the default), "iwelbo(50)": see `flowvi list objectives`.',
)
@click.option("--epochs", type=click.IntRange(min=1), help="Number of epochs.  [default: 40]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images per step.  [default: 100]")
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
    help="Importance samples K per image for the test bound.",
)
@click.option(
    "--test-images",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Largest number of test images for that bound.",
)
@click.option(
    "--against",
    type=EXISTING_FOLDER,
    metavar="DIR",
    help="Results of another run, to compare with image by image.",
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
    net: str,
    latent: int | None,
    objective: Renyi | None,
    epochs: int | None,
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
    """Train a variational autoencoder on images; write bounds, draws and pictures to a folder.

    The bounds are those of test images: the ELBO, and the importance-weighted
    bound of K draws, with standard errors over images.
    """
    folder = results_folder(out, resume, VAE_FILES)
    usual = SMALL if data is None else LARGE
    with one_line_warnings(), interruptible() as stop, errors_without_traceback():
        from flowvi.cli import vae_results as results
        from flowvi.cli.results import describe_failures
        from flowvi.fitting.fit import fit
        from flowvi.objectives.renyi_bound import elbo
        from flowvi.targets import from_pyro
        from flowvi.training.minibatch import Minibatch
        from flowvi.vae import build, load
        from flowvi.vae.model import PLATE

        images = load(data, READ[likelihood] if likelihood != "bernoulli" else binarise)
        other = (
            None
            if against is None
            else results.read_bounds(against, images, particles, test_images)
        )
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
        target = from_pyro(made.model, images.rows, local=PLATE)
        target.name = images.name
        fitted = fit(
            target,
            made.guide,
            objective or elbo(1, "total"),
            validation=images.val,
            seed=seed,
            progress=not quiet,
            minibatch=Minibatch(
                batch_size=batch_size or usual["batch_size"],
                epochs=epochs or usual["epochs"],
                lr=lr,
                warmup_epochs=usual["warmup"] if warmup is None else warmup,
            ),
            checkpoint=folder / CHECKPOINT,
            resume=resume is not None,
        )
        if fitted.meta["interrupted"]:
            announce_writing("epochs", folder)
        facts: dict[str, Any] = {"data": images.name, "binarise": binarise, **made.parts}
        run = results.VaeRun(images, made.generator, fitted, facts, particles, test_images, seed)
        written, failed = results.report(run, other, folder, quiet)
    if failed:
        there = (folder / CHECKPOINT).is_dir()
        raise click.ClickException(describe_failures(failed, written, folder, there))
    if fitted.meta["interrupted"]:
        explain_resume("epochs", folder)
        ctx.exit(stop.code)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)


def _latent(net: str, images: Images, usual: int) -> int:
    """The usual length of z, or that of a code of one channel where it is an image."""
    from flowvi.vae import code_shape

    return math.prod(code_shape(images.size)) if net == "maps" else usual
