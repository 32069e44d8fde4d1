"""Training on minibatches of rows: epochs, validation, early stopping."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.objectives.reweighted import WakeSleep
from flowvi.objectives.rows import row_step
from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock
from flowvi.runtime.rng import own_randomness, stream
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.local.rows import pieces
from flowvi.training.adam import Adam
from flowvi.training.flat import Finest, Flat
from flowvi.training.guard import Guard
from flowvi.training.minibatch import Minibatch
from flowvi.training.records import JUDGE, TRAIN, TRIAL

ORDER = TRIAL
# Evaluations after which a density of rows is recorded.
RECORDED = 2


class Epoch(NamedTuple):
    """What is told after every epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        bound: Mean bound of a row over the epoch's steps, in nats.
        validation: The same on the validation rows; NaN without.
        divergence: Mean of log q - log p(z).
        lr: Step size at its end.
        beta: Weight of prior and guide at its end.
        skipped: Steps skipped.
        seconds: Since the fit began.
    """

    epoch: int
    bound: float
    validation: float
    divergence: float
    lr: float
    beta: float
    skipped: int
    seconds: float


@dataclass
class RowState:
    """Where a training is: all that a continuation needs.

    Attributes:
        epochs: What was told so far.
        best: Parameters with the best validation bound, and that bound.
        since: Epochs since then.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: Tensor | None = None
    best_bound: float = -math.inf
    since: int = 0
    interrupted: bool = False


class RowTrainer:
    """Trains a guide for rows, and the target's own parameters with it.

    Args:
        target: The log densities of rows.
        guide: The guide, changed in place.
        objective: The bound.
        settings: How to go through the rows.
        rows: Places of the rows to train on.
        validation: Rows that are not trained on.
        seed: Of everything random.
        clock: The time that is left.
        progress: Whether to show a bar.
        callback: Told of every epoch; a true answer stops.
    """

    def __init__(
        self,
        target: LocalTarget,
        guide: Guide,
        objective: Renyi | WakeSleep,
        settings: Minibatch,
        rows: Tensor,
        validation: Batch | None,
        seed: int,
        clock: Clock,
        progress: bool = False,
        callback: Callable[[Epoch], object] | None = None,
    ) -> None:
        self.target, self.guide, self.objective = target, guide, objective
        self.settings, self.rows, self.validation = settings, rows, validation
        self.seed, self.clock, self.progress, self.callback = seed, clock, progress, callback
        self.guard = Guard()
        self.state = RowState()
        learned = {id(p): p for m in (guide, target) for p in m.parameters() if p.requires_grad}
        self.finest = Finest(list(learned.values()))
        self.flat = Flat(self.finest.tensors)
        self.optimiser = Adam([self.flat.vector])
        self.save: Callable[[], None] = lambda: None

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.rows) / self.settings.batch_size)

    def run(self) -> RowState:
        """Train until the last epoch, or for as long as it pays."""
        state, settings = self.state, self.settings
        first = len(state.epochs)
        total = settings.epochs * self.steps
        self._record()
        with self._bar(total, first * self.steps) as bar:
            try:
                for epoch in range(first, settings.epochs):
                    told = self._epoch(epoch, bar)
                    state.epochs.append(told)
                    self._judge(told)
                    self.save()
                    stop = self.callback is not None and bool(self.callback(told))
                    if distributed.agreed(stop) or self._tired() or self.clock.over():
                        break
            except KeyboardInterrupt:
                state.interrupted = True
        if state.best is not None:
            self._set(state.best)
        self.flat.release()
        return state

    def snapshot(self) -> dict[str, Any]:
        """All that a continuation after the last epoch needs, as numbers and tensors."""
        state = self.state
        return {
            "vector": self.flat.copy(),
            "adam": self.optimiser.state(),
            "buffers": {name: b.clone() for name, b in self.guide.named_buffers()},
            "epochs": [list(told) for told in state.epochs],
            "best": state.best,
            "best_bound": state.best_bound,
            "since": state.since,
            "norms": list(self.guard.norms),
            "skipped": self.guard.skipped,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self._set(saved["vector"])
        self.optimiser.restore(saved["adam"])
        buffers = dict(self.guide.named_buffers())
        for name, value in saved["buffers"].items():
            buffers[name].copy_(value)
        self.state = RowState(
            [Epoch(*told) for told in saved["epochs"]],
            None if saved["best"] is None else saved["best"].to(self.flat.vector),
            saved["best_bound"],
            saved["since"],
        )
        self.guard.norms.extend(saved["norms"])
        self.guard.skipped = saved["skipped"]

    def bound_of(self, batch: Batch) -> float:
        """Mean bound of rows on fresh draws, the same noise at every call."""
        with own_randomness(stream(self.seed, JUDGE)), torch.no_grad():
            total = 0.0
            for part in pieces(batch, self.settings.batch_size):
                found = row_step(self.target, self.guide, self.objective, part)
                total += float(found.bound) * len(part.places)
        return total / len(batch.places)

    def _record(self) -> None:
        """Have the densities of all sizes recorded now, in this run as in one that goes on later.

        A recorded density may differ from one row by row in the last bits.
        """
        parts = list(self.rows.tensor_split(self.steps))
        if distributed.size() > 1:
            parts = [places[distributed.rank() :: distributed.size()] for places in parts]
        batches = {len(p): self.target.batch(p) for p in parts if len(p)}
        if self.validation is not None:
            held = pieces(self.validation, self.settings.batch_size)
            batches |= {len(piece.places): piece for piece in held}
        with own_randomness(stream(self.seed, JUDGE)), torch.no_grad():
            for batch in batches.values():
                for _ in range(RECORDED):
                    row_step(self.target, self.guide, self.objective, batch)

    def _epoch(self, epoch: int, bar: tqdm[Any]) -> Epoch:
        settings = self.settings
        # Processes go through the same rows in the same order, and take noise of their own.
        torch.manual_seed(stream(self.seed, TRAIN, epoch, distributed.rank()))
        skipped, bounds, divergences, lr, beta = self.guard.skipped, [], [], settings.lr, 1.0
        for i, batch in enumerate(self._batches(epoch)):
            lr = settings.rate(epoch * self.steps + i, settings.epochs * self.steps)
            beta = settings.beta(epoch + i / self.steps)
            bound, divergence = self._step(settings.transformed(batch), lr, beta)
            bounds.append(bound)
            divergences.append(divergence)
            bar.update()
            if i % 20 == 0:
                bar.set_postfix_str(f"bound {np.mean(bounds[-100:]):.3f}")
        seen = np.array(bounds)[np.isfinite(bounds)]
        return Epoch(
            epoch + 1,
            float(seen.mean()) if len(seen) else math.nan,
            math.nan if self.validation is None else self.bound_of(self.validation),
            float(np.mean(divergences)),
            lr,
            beta,
            self.guard.skipped - skipped,
            self.clock.seconds,
        )

    def _step(self, batch: Batch, lr: float, beta: float) -> tuple[float, float]:
        bound, divergence = self._gradient(batch, beta)
        admitted, _ = self.guard.admits(float(bound), self.flat.gradient)
        if admitted:
            self.optimiser.step(self.flat.gradient, lr)
            self.finest.follow()
        return float(bound), float(divergence)

    def _gradient(self, batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
        """Bound and divergence of a batch; its gradient is left in the flat vector.

        Of several processes each takes its part of the rows.
        """
        count, processes = len(batch.places), distributed.size()
        if processes > 1:
            part = slice(distributed.rank(), None, processes)
            batch = Batch(batch.places[part], tuple(t[part] for t in batch.data))
        self.flat.zero()
        bound = divergence = self.flat.gradient.new_zeros(())
        if len(batch.places):
            with self._precision():
                found = row_step(
                    self.target, self.guide, self.objective, batch, beta, self.settings.free_bits
                )
            # Parts need not be equal: their means over all processes make that of the batch.
            share = len(batch.places) * processes / count
            (-share * found.objective).backward()
            self.finest.gather()
            bound, divergence = share * found.bound, found.divergence
        if processes > 1:
            bound, averaged, _ = distributed.averaged(bound, self.flat.gradient)
            self.flat.gradient.copy_(averaged)
        return bound, divergence

    def _set(self, vector: Tensor) -> None:
        """Give all parameters the values of a vector."""
        self.flat.set(vector)
        self.finest.follow()

    def _judge(self, told: Epoch) -> None:
        state = self.state
        if self.validation is None:
            return
        if told.validation > state.best_bound:
            state.best, state.best_bound, state.since = self.flat.copy(), told.validation, 0
        else:
            state.since += 1

    def _tired(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.state.since >= patience

    def _batches(self, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(stream(self.seed, ORDER, epoch))
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        # As equal as can be: a last batch of a few rows would take as long a step as a whole one.
        parts = order.tensor_split(self.steps)
        arguments = self.target.arguments
        items = arguments.items()
        if items is None or not self.settings.workers:
            for places in parts:
                yield self.target.batch(places)
            return
        loader: DataLoader[Any] = DataLoader(
            _Numbered(items),
            generator=torch.Generator().manual_seed(stream(self.seed, ORDER, epoch, 1)),
            batch_sampler=[places.tolist() for places in parts],
            num_workers=self.settings.workers,
            collate_fn=_Collated(arguments.collated),
        )
        for batch in loader:
            yield batch.to(self.target.device)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.settings.amp or self.target.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)

    def _bar(self, total: int, done: int) -> tqdm[Any]:
        hidden = distributed.rank() > 0 or not self.progress or not sys.stderr.isatty()
        return tqdm(
            total=total,
            initial=done,
            desc=self.target.name,
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
        )


class _Numbered(Dataset[Any]):
    """Items with their places."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.items[i]


class _Collated:
    """Numbered items as a batch."""

    def __init__(self, collate: Callable[[list[Any]], tuple[Tensor, ...]]) -> None:
        self.collate = collate

    def __call__(self, numbered: list[tuple[int, Any]]) -> Batch:
        index, items = zip(*numbered, strict=True)
        return Batch(torch.tensor(index), self.collate(list(items)))
