"""Which guide of an autoencoder is worth it: paired differences on the same test rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from flowvi.cli.results import ResultFile, WriteFailure, atomically, write_files
from flowvi.draws.row_bounds import Difference, RowBounds
from flowvi.fitting.result import RowFit

GUIDES_TABLE = "guides.csv"
# Standard errors by which a guide has to gain to be worth its time.
CLEAR = 2.0


@dataclass(frozen=True)
class Outcome:
    """A guide, its bounds on the test rows, and what its training took.

    Attributes:
        guide: Its name.
        found: Bounds of the test rows.
        epochs: Number of epochs.
        kept: The epoch that was kept.
        seconds: Time of training.
    """

    guide: str
    found: RowBounds
    epochs: int
    kept: int
    seconds: float

    @classmethod
    def of(cls, guide: str, found: RowBounds, fit: RowFit) -> Outcome:
        """The outcome of a fit."""
        facts = fit.meta
        return cls(guide, found, facts["epochs"], facts["kept"], facts["seconds"])

    def elbo_gain(self, other: Outcome) -> Difference:
        """How much higher its ELBO is, paired by row."""
        return _elbos(self.found).minus(_elbos(other.found))

    def bound_gain(self, other: Outcome) -> Difference:
        """How much higher its importance-weighted bound is, paired by row."""
        return self.found.minus(other.found)


def conclusion(outcomes: Sequence[Outcome], unit: str) -> list[str]:
    """Sentences on what each guide gains on the first one, and which one is worth it."""
    first, *others = outcomes
    lines = []
    for one in others:
        elbo, bound = one.elbo_gain(first), one.bound_gain(first)
        ratio = one.seconds / max(first.seconds, 1e-9)
        lines.append(
            f"{one.guide} gains {_gain(elbo)} nats on {first.guide} in the ELBO of these {unit}s, "
            f"and {_gain(bound)} in L_{one.found.particles}, in {ratio:.2g} times the seconds."
        )
    clear = [one for one in others if _is_clear(one.elbo_gain(first))]
    if not clear:
        lines.append(f"Worth it: none. No guide gains {CLEAR:g} standard errors on {first.guide}.")
    else:
        best = max(clear, key=lambda one: one.elbo_gain(first).value)
        lines.append(f"Worth it: {best.guide}, the largest clear gain in the ELBO.")
    return lines


def report_guides(
    outcomes: Sequence[Outcome], unit: str, folder: Path
) -> tuple[bool, list[WriteFailure]]:
    """Print the comparison and write its table.

    Returns:
        Whether the table was written, and the failure if it was not.
    """
    write = partial(_write, outcomes)
    file = ResultFile(GUIDES_TABLE, "the guides side by side", atomically(write))
    written, failed = write_files([file], folder)
    click.echo("\n" + "\n".join(conclusion(outcomes, unit)))
    click.echo(
        f"(Standard errors are over test {unit}s; another --seed shows what trainings differ by.)"
    )
    return bool(written), failed


def _write(outcomes: Sequence[Outcome], path: Path) -> None:
    heads = ["guide", "elbo", "elbo_se", "bound", "bound_se", "elbo_better", "elbo_better_se"]
    heads += ["bound_better", "bound_better_se", "particles", "epochs", "kept", "seconds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        for one in outcomes:
            gains = (
                ("", "", "", "")
                if one is outcomes[0]
                else (*one.elbo_gain(outcomes[0]), *one.bound_gain(outcomes[0]))
            )
            found = one.found
            numbers = (found.elbo_mean, found.elbo_se, found.mean, found.se)
            cost = (found.particles, one.epochs, one.kept, one.seconds)
            writer.writerow((one.guide, *numbers, *gains, *cost))


def _elbos(found: RowBounds) -> RowBounds:
    return RowBounds(found.elbo, found.elbo, 1)


def _gain(found: Difference) -> str:
    return f"{found.value:.2f} +- {found.se:.2f}"


def _is_clear(found: Difference) -> bool:
    return found.value > CLEAR * found.se
