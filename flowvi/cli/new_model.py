"""`flowvi new-model`: a model file to start from, which fits as it is."""

from pathlib import Path

import click

from flowvi.cli.options import EXISTING_FOLDER

TEMPLATE = '''"""{title}: say here what is modelled, and where the data come from."""

import flowvi
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# Labels of the members of a plate, for tables and pictures. Leave it out if there are none.
coords = {{"group": ["a", "b", "c", "d"]}}


def data(path: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of the model, in double precision: those below, or of a table x,y,member.

    `flowvi fit {name}.py --data FILE` reads such a table, CSV or Parquet, and
    `flowvi predict {name}.py DIR --new FILE` one of new rows, in which the column y can be left
    out if it is not known.
    """
    if path is not None:
        table = flowvi.read_rows(path)
        x = table["x"].double()
        return x, table.get("y", torch.zeros_like(x)), table["member"].long()
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    y = torch.tensor([1.1, 1.9, 3.2, 3.8, 0.9, 2.1, 2.4, 4.4], dtype=torch.float64)
    member = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])  # the group of each row
    return x, y, member


def model(x: Tensor, y: Tensor, member: Tensor) -> None:
    zero = x.new_zeros(())  # priors take their precision from the data
    slope = pyro.sample("slope", dist.Normal(zero, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(zero + 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(zero + 1.0))
    # One value for each group, standardised: such a model is easier to fit.
    with pyro.plate("group", 4):
        offset = pyro.sample("offset", dist.Normal(zero, 1.0))
        # A derived value that is to be reported.
        level = pyro.deterministic("level", spread * offset)
    # What was observed is named by obs=.
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(level[member] + slope * x, noise), obs=y)
'''


@click.command(
    "new-model",
    short_help="Write a model file to start from.",
    epilog="""\b
Examples:
  flowvi new-model wells
  flowvi fit wells.py --out results/wells

\b
Exit codes:
  0    the file was written
  1    it is there already, or cannot be written
  2    the command line was wrong""",
)
@click.argument("name")
@click.option(
    "--dir",
    "folder",
    type=EXISTING_FOLDER,
    default=".",
    show_default=True,
    help="Where to write it.",
)
def new_model_command(name: str, folder: Path) -> None:
    """Write NAME.py: a commented model of groups of rows, which fits as it is. Change it."""
    stem = name.removesuffix(".py")
    if not stem.isidentifier():
        raise click.BadParameter(
            f"'{name}' is no name for a Python file; use letters, digits and underscores.",
            param_hint="'NAME'",
        )
    file = folder / f"{stem}.py"
    title = stem.replace("_", " ").strip().capitalize() or stem
    try:
        with file.open("x") as out:
            out.write(TEMPLATE.format(name=stem, title=title))
    except FileExistsError:
        raise click.ClickException(f"{file} is there already; nothing was written.") from None
    except OSError as error:
        raise click.ClickException(f"Could not write {file}: {error.strerror}.") from error
    click.echo(f"{file}\nNow: flowvi fit {file} --out results/{stem}")
