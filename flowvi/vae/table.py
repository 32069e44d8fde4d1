"""Variational autoencoders of tables: rows to train on, and the parts for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import Guide
from flowvi.runtime.arguments import check_choice
from flowvi.runtime.tables import read_table
from flowvi.vae.columns import CATEGORY, COUNT, FLOAT, Column, columns_of, encoded
from flowvi.vae.mixed import MixedLikelihood, MixedRow
from flowvi.vae.model import Autoencoder, Generator, named
from flowvi.vae.nets import Decoder, layers
from flowvi.vae.posteriors import posterior
from flowvi.vae.priors import PRIORS, PriorInputs

if TYPE_CHECKING:
    import pandas as pd

# Fewest rows of a table, and shares of validation and test rows.
FEWEST, SHARE = 20, 0.1
# Priors that are made of images.
OF_IMAGES = ("glow", "vamp")
# Largest length of the latent vector by default.
MOST_LATENT = 16


@dataclass(frozen=True)
class Table:
    """Rows of a table in numbers, categories as codes.

    Attributes:
        name: What to call it.
        columns: Its columns.
        train: Training rows, (N, C).
        val: Validation rows.
        test: Test rows.
    """

    name: str
    columns: tuple[Column, ...]
    train: Tensor
    val: Tensor
    test: Tensor

    @property
    def latent(self) -> int:
        """Length of the latent vector by default: half of the numbers that a row holds."""
        held = sum(c.outputs - (c.kind == CATEGORY) for c in self.columns)
        return max(1, min(MOST_LATENT, (held + 1) // 2))


def load_table(source: str | os.PathLike[str] | pd.DataFrame, name: str | None = None) -> Table:
    """Read a table of mixed columns, and split its rows at random: 80, 10 and 10 %.

    Args:
        source: A file, CSV, TSV or Parquet, or a table of pandas.
        name: What to call it; the name of the file by default.

    Raises:
        ValueError: A column cannot be used, or there are too few rows; the message has its name.
    """
    if isinstance(source, str | os.PathLike):
        table, name = read_table(source), name or Path(source).name
    else:
        table = source
    if len(table) < FEWEST:
        raise ValueError(f"A table needs at least {FEWEST} rows; got {len(table)}.")
    columns = columns_of(table)
    x = encoded(table.set_axis([c.name for c in columns], axis=1), columns)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = max(1, round(SHARE * len(x)))
    test, val, train = order[:held], order[held : 2 * held], order[2 * held :]
    return Table(name or "table", tuple(columns), x[train], x[val], x[test])


class RowEncoder(nn.Module):
    """Features of a row, the context of a guide. (*B, C) -> (*B, width).

    Floats are standardised, counts are the standardised square roots, and categories columns of 0
    and 1.

    Args:
        columns: The columns.
        x: Training rows, (N, C).
        hidden: Widths of the hidden layers; the last is that of the features.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, columns: Sequence[Column], x: Tensor, hidden: Sequence[int]) -> None:
        super().__init__()
        self.columns, self.width = tuple(columns), hidden[-1]
        raw = self._raw(x)
        self.register_buffer("centre", raw.mean(0))
        self.register_buffer("spread", raw.std(0).clamp_min(1e-3))
        self.body = nn.Sequential(*layers([raw.shape[-1], *hidden]))

    def forward(self, x: Tensor) -> Tensor:
        raw = self._raw(x.to(self.centre.dtype))
        features: Tensor = self.body((raw - self.centre) / self.spread)
        return features

    def _raw(self, x: Tensor) -> Tensor:
        parts = []
        for i, column in enumerate(self.columns):
            value = x[..., i : i + 1]
            if column.kind == CATEGORY:
                value = one_hot(value[..., 0].long(), len(column.levels)).to(x.dtype)
            elif column.kind == COUNT:
                value = value.sqrt()
            elif column.kind == FLOAT:
                value = (value - column.mean) / column.sd
            parts.append(value)
        return torch.cat(parts, -1)


def build_table(
    table: Table,
    latent: int | None = None,
    guide: str = "gaussian",
    prior: str = "normal",
    *,
    hidden: Sequence[int] = (128, 128),
    seed: int = 0,
) -> Autoencoder:
    """Build a variational autoencoder of the rows of a table.

    The decoder starts at the distribution of each column by itself. Parameters are in the default
    precision, and the global generators are left as they were.

    Args:
        table: The rows.
        latent: Length D of the latent vector; half of the numbers of a row by default.
        guide: Row of `POSTERIORS`.
        prior: Row of `PRIORS`, but for those of images.
        hidden: Widths of the hidden layers of the encoder, and in the opposite order of the
            decoder.
        seed: Of the initial parameters.

    Raises:
        ValueError: There is no part of that name.
    """
    latent = latent or table.latent
    check_choice("prior of rows", prior, sorted(set(PRIORS) - set(OF_IMAGES)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = MixedLikelihood(table.columns)
        encoder = RowEncoder(table.columns, table.train, hidden)
        back = [latent, *reversed(hidden)]
        last = nn.Linear(back[-1], family.outputs, bias=False)
        with torch.no_grad():
            # Rows begin close to the distributions of the columns.
            last.weight.mul_(0.1)
        decoder = Decoder(nn.Sequential(*layers(back), last), family.marginal(table.train))
        inner = posterior(guide, latent, encoder.width)
        beside = PriorInputs(latent, inner, encoder, table.train, 1.0)
        before = named("prior", PRIORS, prior, None, beside)
    parts: dict[str, Any] = {
        "latent": latent,
        "guide": guide,
        "prior": prior,
        "hidden": list(hidden),
        "seed": seed,
    }
    return Autoencoder(Generator(before, decoder, family), Amortised(encoder, inner), parts)


def simulated(made: Generator, n: int, seed: int = 0) -> Tensor:
    """New rows from the model, (n, C): codes from the prior, then each column given its code."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows: Tensor = made.likelihood(made.decoder(made.prior.sample((n,)))).sample()
    return rows


def by_column(made: Generator, guide: Guide, x: Tensor, seed: int = 0) -> Tensor:
    """Nats of each column of rows given a draw of their codes, less is better. (N, C) -> (N, C)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return -_of_columns(made, made.decoder(guide.sample((1,), x).z[0]), x)


def independent(table: Table, x: Tensor) -> Tensor:
    """Nats of each column of rows by its own distribution in the training rows. (N, C).

    Floats are normal there, and counts negative binomial with the mean and the variance of the
    column: what a model without latents says.
    """
    family = MixedLikelihood(table.columns).to(x.dtype)
    with torch.no_grad():
        return -family(family.marginal(table.train)).log_prob_of_columns(x)


def _of_columns(made: Generator, params: Tensor, x: Tensor) -> Tensor:
    row = made.likelihood(params)
    assert isinstance(row, MixedRow)
    return row.log_prob_of_columns(x)
