"""The density of a nested fit as what `Trainer` trains on, and its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime.clock import Clock
from flowvi.training.records import Judged, Record, Stage
from flowvi.training.settings import Settings
from flowvi.training.trainer import RATES, Trainer

if TYPE_CHECKING:
    from flowvi.objectives.nested import Nested

# Numbers of the latents of rows that are held at a time.
NUMBERS = 2_000_000
# Draws by which the start, the last iterate and the average of a stage are compared.
FEWEST_DRAWS, MOST_DRAWS = 30, 500
# Steps of each stage, where no number of steps is asked for.
LENGTHS = (100, 200, 400, 800)
# Another stage follows unless so little is left to gain, or so small a share of it was gained.
ENOUGH, WORTH = 0.005, 0.15


class NestedTarget(nn.Module):
    """A bound on the log density of theta, from all rows or from those of a batch.

    Where rows are subsampled and no batch is given, the rows are the same ones at each call, so
    that guides are compared on equal terms.

    Args:
        nested: The density.
        within: The bound over the latents of a row.
        size: Rows of a batch.
    """

    def __init__(self, nested: Nested, within: Renyi, size: int) -> None:
        super().__init__()
        shared = nested.target.shared
        assert shared is not None
        self.nested, self.within, self.size = nested, within, size
        rows, fewest = nested.target.rows, FEWEST_DRAWS * within.particles * nested.target.dim
        some = max(size, NUMBERS // fewest)
        self.places = torch.randperm(rows)[:some] if size < rows else torch.arange(rows)
        self.name, self.dim, self.sites = nested.target.name, shared.dim, shared.sites
        self.slices, self.constrain = shared.slices, shared.constrain
        self.dtype, self.device = shared.dtype, shared.device
        plate = nested.target.plate
        self.subsampled = {plate: (rows, size)} if size < rows else {}

    def log_prob(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """An estimate of the bound. (*S, G) -> (*S)."""
        (places,) = [self.places] if not batch else batch.values()
        theta = z.reshape(-1, self.dim)
        rows = self.nested.target.batch(places.cpu())
        return self.nested.log_prob(theta, rows, self.within).reshape(z.shape[:-1])

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Nothing: rows have a bound, and no likelihood."""
        return {}

    def chunk(self) -> int:
        """How many values of theta to evaluate at a time."""
        return self._fitting(len(self.places))

    def at_once(self) -> int:
        """How many draws a step may evaluate at a time."""
        return self._fitting(self.size)

    def draws(self) -> int:
        """By how many draws guides are compared."""
        return int(np.clip(self.chunk(), FEWEST_DRAWS, MOST_DRAWS))

    @property
    def density(self) -> NestedTarget:
        """What is evaluated, point by point: this."""
        return self

    def batched(self, z: Tensor, *places: Tensor) -> Tensor:
        """The same as `log_prob`, of the rows of each plate."""
        return self.log_prob(z, dict(zip(self.subsampled, places, strict=True)))

    def _fitting(self, rows: int) -> int:
        return max(1, NUMBERS // (rows * self.within.particles * self.nested.target.dim))


class Trained(NamedTuple):
    """What a training was.

    Attributes:
        bounds: The bound at each step.
        lr: Largest step size.
        record: What was decided, and what failed.
    """

    bounds: np.ndarray
    lr: float
    record: Record


def train(
    target: NestedTarget,
    guide: Guide,
    over: Renyi,
    steps: int | None,
    draws: int,
    lr: float | None,
    seed: int,
) -> Trained:
    """Train the guide of theta, that of rows and the model's own parameters, as a fit does.

    Steps without a finite gradient are skipped; where there are many, or the bound collapses,
    training goes on from the last good state with half the step. Of the start, the last iterate
    and the average of the last ones the best is kept.

    Args:
        target: What to train on, and what is trained with the guide.
        guide: The guide of theta, changed in place.
        over: The bound over theta.
        steps: Number of steps; until a plateau without.
        draws: Draws of theta a step.
        lr: Largest step size; the middle one of those that a fit tries without.
        seed: Of everything random.
    """
    record, rate = Record(), lr or RATES[1]
    repeats = max(1, draws // over.particles)
    settings = Settings(over, steps, lr, repeats, seed, False, None, False, Clock(), compile=False)
    most = max(FEWEST_DRAWS * over.particles, target.draws())
    trainer = Trainer(target, guide, settings, 0, record, most)  # type: ignore[arg-type]
    judged = trainer.judge()
    for i, length in enumerate(_lengths(steps) if trainer.trained else []):
        before = judged
        judged = trainer.run(Stage(f"stage {i + 1}", 0, length, repeats, rate))
        gained = judged.bound - before.bound
        if steps is None and i and _enough(gained, judged):
            break
        rate *= 0.5 ** max(trainer.halvings, int(not gained > 0))
    if not math.isfinite(judged.bound):
        record.failures.append(
            f"The bound of {target.name} is {judged.bound:g} on fresh draws, after training as "
            "before it: the guides put mass where the density is not finite."
        )
    return Trained(np.array([row.bound for row in record.rows]), rate, record)


def _lengths(steps: int | None) -> list[int]:
    """Steps of each stage; the first is short.

    While the guide of rows is fresh its gradients are large. The optimiser remembers their squares
    for a thousand steps, in which it would hold theta: so it begins again once they are small.
    """
    if steps is None:
        return list(LENGTHS)
    first = min(LENGTHS[0], steps // 3)
    return [first, steps - first] if first else [steps]


def _enough(gained: float, judged: Judged) -> bool:
    """Whether no further stage is worth its time; one that gained nothing had too large steps."""
    left = judged.gap if math.isfinite(judged.gap) else math.inf
    return left <= ENOUGH or 0 < gained < WORTH * (left + gained)
