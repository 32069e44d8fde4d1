"""Training on minibatches of rows: epochs, validation, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.objectives.reweighted import WakeSleep
from flowvi.objectives.rows import row_step
from flowvi.runtime import distributed
from flowvi.runtime.checkpoint_folder import warn_if_unwritable
from flowvi.runtime.clock import Interrupted
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.local.rows import split_batch
from flowvi.training.minibatch import DROP, Minibatch
from flowvi.training.records import EVALUATE, TRAIN, TRIAL, Record
from flowvi.training.row_gradient import RowGradient
from flowvi.training.settings import Session
from flowvi.training.state import TrainState
from flowvi.training.trainer import Phase, Taken, Trainer

ORDER = TRIAL


class Epoch(NamedTuple):
    """Argument of the callback after every epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        bound: Mean bound of a row over the steps of the epoch, in nats.
        validation: Mean bound of the validation rows; NaN without such rows.
        divergence: Mean of log q(z) - log p(z).
        lr: Step size at the end of the epoch.
        beta: Weight of the prior and the guide at the end of the epoch.
        skipped: Number of skipped steps.
        seconds: Time since the fit began.
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
class EpochState:
    """State of a training over epochs, in addition to the state of its steps.

    Attributes:
        epochs: The epochs so far.
        best: Parameters with the best validation bound.
        best_bound: That bound.
        since: Number of epochs since the best one, or since the last smaller step size.
        drops: Number of times the step size fell for lack of a rise.
        stopped: Why training ended; empty while it goes on.
        bounds: Bounds of the steps of the present epoch.
        divergences: Divergences of the steps of the present epoch.
        skipped: Number of steps skipped before the present epoch.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: Tensor | None = None
    best_bound: float = -math.inf
    since: int = 0
    drops: int = 0
    stopped: str = ""
    bounds: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in the form that `write_state` takes."""
        return {**vars(self), "epochs": [list(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Restore a state that `state_dict` returned."""
        for name in vars(self).keys() & state.keys():  # earlier versions had fewer
            setattr(self, name, state[name])
        self.epochs = [Epoch(*epoch) for epoch in state["epochs"]]
        self.best = None if self.best is None else self.best.to(like)


class Epochs:
    """Trains a guide for rows, together with the target's own parameters.

    Args:
        target: The log densities of rows.
        guide: The guide, changed in place.
        objective: The bound.
        settings: Settings of the minibatches.
        rows: Indices of the training rows.
        validation: Rows that are not trained on.
        seed: Seed of all random numbers.
        session: Clock, checkpointer and callback of the fit.
        record: Record of decisions.
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
        session: Session,
        record: Record,
    ) -> None:
        self.target, self.guide, self.objective = target, guide, objective
        self.settings, self.rows, self.validation = settings, rows, validation
        self.seed, self.session, self.record = seed, session, record
        self.gradient = RowGradient(target, guide, objective, settings, session.clock)
        self.trainer = Trainer(self.gradient, session, record, target.name)
        self.progress = EpochState()
        self.interrupted = False
        self.skipped = 0
        self._batches: Iterator[Batch] = iter(())
        self._beta = 1.0

        if settings.drops and validation is None:
            raise ValueError(
                "Training to a plateau watches the bound of rows that are held out: pass "
                "validation=, rows or a share such as 0.1."
            )

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return math.ceil(len(self.rows) / self.settings.batch_size)

    @property
    def total(self) -> int:
        """Number of steps of all epochs."""
        return self.settings.epochs * self.steps

    def run(self) -> EpochState:
        """Train until the last epoch or early stopping; an interrupt keeps the best epoch."""
        checkpointer = self.session.checkpointer
        checkpointer.begin("epochs")
        state = self.trainer.begin()
        self.gradient.measure()
        saved = checkpointer.latest_state()
        if saved is not None:
            state.load_state_dict(saved["training"])
            self.progress.load_state_dict(saved["epochs"], state.start)
            state.ended = bool(self.progress.stopped)
            if state.step % self.steps:
                self._batches = self._order(state.step)
        self.record.stages.append("epochs")

        def whole() -> dict[str, Any]:
            return {"training": state.state_dict(), "epochs": self.progress.state_dict()}

        phase = Phase(
            self.total,
            self._rate,
            self._gradient,
            lambda taken: self._finish_step(taken, state, whole),
            # While the weight of the prior rises, a falling bound is no failure.
            levels=not self.settings.warmup_epochs,
            state=whole,
            # Processes share one file, and each has fresh noise from the next epoch on.
            sparse=distributed.size() > 1,
        )
        try:
            self.trainer.take(phase, state)
        except (Interrupted, KeyboardInterrupt):
            self.interrupted = True
        if self.progress.best is not None:
            self.gradient.set(self.progress.best)
        self.gradient.release()
        self.skipped = state.guard.skipped
        if not self.progress.stopped:
            limit = f"the limit of {self.settings.epochs} epochs"
            self.progress.stopped = "an interrupt" if self.interrupted else limit
        return self.progress

    @contextmanager
    def at_best(self) -> Iterator[None]:
        """Use the parameters of the best epoch within the context, if epochs are validated."""
        now = self.gradient.vector()
        if self.progress.best is not None:
            self.gradient.set(self.progress.best)
        try:
            yield
        finally:
            self.gradient.set(now)

    def bound_of(self, batch: Batch) -> float:
        """Mean bound of rows on fresh draws, with the same noise at every call."""
        with isolated_rng(derive_seed(self.seed, EVALUATE)), torch.no_grad():
            total = 0.0
            for part in split_batch(batch, self.settings.batch_size):
                found = row_step(self.target, self.guide, self.objective, part)
                total += float(found.bound) * len(part.places)
        return total / len(batch.places)

    def _rate(self, step: int) -> float:
        """Step size of a step; near the end of the budget it falls with the remaining time."""
        clock = self.session.clock
        late = 0.0 if clock.budget is None else clock.seconds / clock.budget
        planned = self.settings.rate(
            max(step, min(int(late * self.total), self.total - 1)), self.total
        )
        return planned * DROP**self.progress.drops

    def _gradient(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, self.steps)
        if i == 0:
            self._batches = self._order(step)
            # Processes visit the same rows in the same order, each with noise of its own.
            torch.manual_seed(derive_seed(self.seed, TRAIN, epoch, distributed.rank()))
        self._beta = self.settings.beta(epoch + i / self.steps)
        batch = self.settings.transformed(next(self._batches))
        return self.gradient(batch, self._beta)

    def _finish_step(self, taken: Taken, state: TrainState, whole: Callable[[], Any]) -> bool:
        """Add a step; at the end of an epoch, validate, save and call the callback."""
        progress, clock = self.progress, self.session.clock
        progress.bounds.append(taken.bound)
        progress.divergences.append(self.gradient.divergence)
        late = clock.budget_spent()
        if (taken.number + 1) % self.steps and not late:
            return False
        epoch = self._epoch(taken, state)
        progress.epochs.append(epoch)
        progress.bounds, progress.divergences = [], []
        progress.skipped = state.guard.skipped
        self._validate(epoch)
        self.skipped = state.guard.skipped
        if self._out_of_patience():
            self._drop_or_stop(taken.rate)
        self.session.checkpointer.save(whole)
        if self.session.checkpointer.shelf is not None and not distributed.rank():
            with warn_if_unwritable(self.session.checkpointer.shelf.folder):
                self.session.checkpointer.saved()
        stop = self.session.callback is not None and bool(self.session.callback(epoch))
        if bool(distributed.broadcast_number(stop)):
            progress.stopped = "the callback"
        elif late and not progress.stopped:
            progress.stopped = "the end of the time budget"
        return bool(progress.stopped)

    def _epoch(self, taken: Taken, state: TrainState) -> Epoch:
        progress = self.progress
        bounds = np.array(progress.bounds)
        seen = bounds[np.isfinite(bounds)]
        return Epoch(
            len(progress.epochs) + 1,
            float(seen.mean()) if len(seen) else math.nan,
            math.nan if self.validation is None else self.bound_of(self.validation),
            float(np.mean(progress.divergences)),
            taken.rate,
            self._beta,
            state.guard.skipped - progress.skipped,
            self.session.clock.seconds,
        )

    def _validate(self, epoch: Epoch) -> None:
        """Keep the parameters if the epoch has the best validation bound."""
        progress = self.progress
        if self.validation is None:
            return
        if epoch.validation > progress.best_bound:
            progress.best, progress.best_bound = self.gradient.vector(), epoch.validation
            progress.since = 0
        elif self.settings.beta(epoch.epoch) >= 1.0:
            progress.since += 1

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.since >= patience

    def _drop_or_stop(self, rate: float) -> None:
        """Go on from the best epoch with smaller steps, or end the training."""
        progress, patience = self.progress, self.settings.patience
        if progress.drops < self.settings.drops and progress.best is not None:
            progress.drops, progress.since = progress.drops + 1, 0
            self.gradient.set(progress.best)
            self.record.log.append(
                f"step size {rate * DROP:.2g} from epoch {len(progress.epochs) + 1} on: no rise "
                f"of the validation bound in {patience} epochs"
            )
            return
        progress.stopped = f"no rise of the validation bound in {patience} epochs"

    def _order(self, step: int) -> Iterator[Batch]:
        """Batches of the present epoch from a given step on."""
        epoch, done = divmod(step, self.steps)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        # Batches have nearly equal sizes: a small last batch would cost as much as a full step.
        parts = order.tensor_split(self.steps)[done:]
        arguments = self.target.arguments
        items = arguments.items()
        if items is None or not self.settings.workers:
            for places in parts:
                yield self.target.batch(places)
            return
        loader: DataLoader[Any] = DataLoader(
            _Numbered(items),
            generator=torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch, 1)),
            batch_sampler=[places.tolist() for places in parts],
            num_workers=self.settings.workers,
            collate_fn=_Collated(arguments.collated),
        )
        for batch in loader:
            yield batch.to(self.target.device)


class _Numbered(Dataset[Any]):
    """A data set whose items come with their indices."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.items[i]


class _Collated:
    """Collates indexed items to a batch."""

    def __init__(self, collate: Callable[[list[Any]], tuple[Tensor, ...]]) -> None:
        self.collate = collate

    def __call__(self, numbered: list[tuple[int, Any]]) -> Batch:
        index, items = zip(*numbered, strict=True)
        return Batch(torch.tensor(index), self.collate(list(items)))
