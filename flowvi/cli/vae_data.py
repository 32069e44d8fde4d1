"""What `flowvi vae` is given: images or the rows of a table, with the measures of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.cli.folder import COLUMNS, PICTURES, SIMULATED, TABLE_PICTURES
from flowvi.draws.row_bounds import RowBounds
from flowvi.guides.guide import Guide
from flowvi.vae import (
    Generator,
    Images,
    Table,
    by_column,
    decoded,
    independent,
    interpolation,
    moments,
    reconstructions,
    simulated,
    traversal,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Images in a picture, images of a map, and new rows that are written.
SHOWN, MAPPED, NEW_ROWS = 10, 1000, 1000


class Trained(NamedTuple):
    """The parts of a trained autoencoder, and a seed."""

    generator: Generator
    guide: Guide
    history: Mapping[str, np.ndarray]
    seed: int


class Given(ABC):
    """Data of `flowvi vae`. Abstract.

    Attributes:
        unit: What one of them is called.
        test: Test rows.
        labels: Classes of the test rows, if there are any.
        captions: Files of pictures and what they show.
    """

    unit: str
    name: str
    test: Tensor
    labels: Tensor | None = None
    captions: Mapping[str, str]

    @abstractmethod
    def numbers(self, found: RowBounds) -> Iterator[tuple[str, float, float]]:
        """Further lines of the table: name, value and standard error."""

    @abstractmethod
    def pictures(self, trained: Trained) -> dict[str, Callable[[], Axes]]:
        """Pictures by their files."""

    def tables(self, trained: Trained) -> dict[str, tuple[str, Callable[[Path], object]]]:
        """Further files, what each is, and what writes it."""
        return {}

    def common(self, trained: Trained) -> dict[str, Callable[[], Axes]]:
        """Pictures of data of every kind."""
        from flowvi import plots

        drawn: dict[str, Callable[[], Axes]] = {}
        if np.isfinite(trained.history["bound"]).any():
            drawn["epochs.png"] = lambda: plots.plot_epochs(trained.history)
        if trained.generator.prior.dim > 1:
            mean, _ = moments(trained.guide, self.test[:MAPPED], seed=trained.seed)
            known = None if self.labels is None else self.labels[: len(mean)]
            drawn["map.png"] = lambda: plots.plot_latent_map(mean, known)
        return drawn


class GivenImages(Given):
    """Images.

    Args:
        images: The data.
    """

    unit, captions = "image", PICTURES

    def __init__(self, images: Images) -> None:
        self.images, self.name, self.test = images, images.name, images.test
        self.labels = (images.labels or {}).get("test")
        if len(self.test) < 2:
            raise ValueError(
                f"{self.name} has {len(self.test)} test images: at least two are needed, for "
                "standard errors."
            )

    def numbers(self, found: RowBounds) -> Iterator[tuple[str, float, float]]:
        bits = 1 / (self.images.size[0] * self.images.size[1] * np.log(2))
        yield f"-L_{found.particles}, bits per pixel", -found.mean * bits, found.se * bits

    def pictures(self, trained: Trained) -> dict[str, Callable[[], Axes]]:
        from flowvi import plots

        model, guide, x, seed = trained.generator, trained.guide, self.test, trained.seed
        top, few = model.likelihood.top, x[:SHOWN]
        pairs = len(few) // 2
        return {
            "reconstructions.png": lambda: plots.plot_reconstructions(
                few / top, reconstructions(model, guide, few, seed)
            ),
            "samples.png": lambda: plots.plot_images(model.sample(SHOWN**2, seed)),
            "interpolation.png": lambda: plots.plot_images(
                interpolation(model, guide, few[:pairs], few[pairs : 2 * pairs])
            ),
            "traversal.png": lambda: _traversal(trained, x),
            **self.common(trained),
        }


class GivenTable(Given):
    """Rows of a table.

    Args:
        table: The rows.
    """

    unit, captions = "row", TABLE_PICTURES

    def __init__(self, table: Table) -> None:
        self.table, self.name, self.test = table, table.name, table.test

    def numbers(self, found: RowBounds) -> Iterator[tuple[str, float, float]]:
        alone = independent(self.table, self.test[: len(found.elbo)]).sum(1).double().numpy()
        error = float(alone.std(ddof=1)) / np.sqrt(len(alone))
        yield "columns by themselves, nats per row", float(alone.mean()), error
        apart = RowBounds(-alone, -alone, 1)
        better = found.minus(apart)
        yield f"L_{found.particles} better than these by, paired", better.value, better.se

    def pictures(self, trained: Trained) -> dict[str, Callable[[], Axes]]:
        from flowvi import plots

        columns = self.table.columns
        seen = decoded(self.test, columns)
        new = decoded(simulated(trained.generator, len(seen) * 10, trained.seed), columns)
        return {
            "columns.png": lambda: plots.plot_columns(seen, new),
            "associations.png": lambda: plots.plot_associations(seen, new),
            **self.common(trained),
        }

    def tables(self, trained: Trained) -> dict[str, tuple[str, Callable[[Path], object]]]:
        import pandas as pd  # slow to import

        alone = independent(self.table, self.test).mean(0)
        given = by_column(trained.generator, trained.guide, self.test, trained.seed).mean(0)
        numbers = pd.DataFrame(
            {
                "column": [c.name for c in self.table.columns],
                "kind": [c.kind for c in self.table.columns],
                "likelihood": [c.likelihood for c in self.table.columns],
                "levels": [len(c.levels) or None for c in self.table.columns],
                "alone": alone.numpy(),
                "given_code": given.numpy(),
            }
        )
        new = decoded(simulated(trained.generator, NEW_ROWS, trained.seed), self.table.columns)
        return {
            COLUMNS: (
                "nats of each column by itself, and given the code of its row",
                partial(numbers.to_csv, index=False),
            ),
            SIMULATED: ("new rows from the model", partial(new.to_csv, index=False)),
        }


def _traversal(trained: Trained, x: Tensor) -> Axes:
    """The most active coordinates, over the range in which their means lie."""
    from flowvi import plots

    mean, _ = moments(trained.guide, x[:MAPPED], seed=trained.seed)
    most = mean.var(0).argsort(descending=True)[:8].tolist()
    dtype = next(trained.generator.decoder.parameters()).dtype
    values = torch.linspace(-2.5, 2.5, SHOWN, dtype=dtype)
    images = traversal(trained.generator, mean[0].to(dtype), most, values)
    return plots.plot_images(images, names=[f"z[{unit}]" for unit in most])


def facts_of(given: Given, parts: Mapping[str, Any], binarise: str) -> dict[str, Any]:
    """Names of the data and of the parts, as JSON has them."""
    facts: dict[str, Any] = {"data": given.name}
    if isinstance(given, GivenTable):
        return {**facts, **parts, "columns": [c.facts() for c in given.table.columns]}
    return {**facts, "binarise": binarise, **parts}
