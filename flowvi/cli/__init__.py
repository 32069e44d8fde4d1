"""The command line: `flowvi COMMAND`, one module for each command."""

import warnings

import click

from flowvi._version import __version__
from flowvi.cli.amortize import amortize_command, apply_command
from flowvi.cli.check import check_command
from flowvi.cli.evidence import evidence_command
from flowvi.cli.fit import fit_command
from flowvi.cli.list import list_command
from flowvi.cli.neutra_sbc import neutra_command, sbc_command
from flowvi.cli.new_model import new_model_command
from flowvi.cli.predict import predict_command
from flowvi.cli.report import report_command
from flowvi.cli.resample_compare import compare_command, resample_command
from flowvi.cli.vae import vae_command

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  flowvi fit models/eight_schools.py --out results/eight_schools
  flowvi evidence results/eight_schools
  flowvi list models
  flowvi fit --help""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Fit normalizing-flow guides to Bayesian models, and say whether to trust them."""
    # ArviZ announces its next version once a day; nobody who runs a command can act on that.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)


main.add_command(fit_command)
main.add_command(amortize_command)
main.add_command(apply_command)
main.add_command(evidence_command)
main.add_command(list_command)
main.add_command(vae_command)
main.add_command(report_command)
main.add_command(compare_command)
main.add_command(resample_command)
main.add_command(check_command)
main.add_command(neutra_command)
main.add_command(predict_command)
main.add_command(sbc_command)
main.add_command(new_model_command)
