"""The training loop of all fits: guarded steps of Adam with rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowvi.runtime import distributed
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.runtime.progress import current
from flowvi.training.adam import Adam
from flowvi.training.gradient import Gradient
from flowvi.training.records import Record
from flowvi.training.settings import Session
from flowvi.training.state import MOST_HALVINGS, TrainState


@dataclass(frozen=True)
class Taken:
    """Result of one step.

    Attributes:
        number: Index of the step in its phase, from 0.
        bound: Estimate of the bound.
        norm: Norm of the gradient.
        rate: Step size.
        skipped: Whether the guard skipped the step.
    """

    number: int
    bound: float
    norm: float
    rate: float
    skipped: bool


@dataclass(frozen=True)
class Phase:
    """Instructions for one run of the loop.

    Args:
        steps: Largest number of steps, including those counted in the state.
        rate: Function from the index of a step to its step size.
        gradient: Function from the index of a step to (bound, gradient of minus the bound (P)).
        after: Function called after each step; true ends the phase.
        tell: Function called after each step with a complete state: for callbacks.
        name: Name in the progress.
        levels: Whether a collapse of the bound is a failure.
        state: Function that returns the checkpoint state; the training state by default.
        sparse: Whether only `after` saves states.
    """

    steps: int
    rate: Callable[[int], float]
    gradient: Callable[[int], tuple[Tensor, Tensor]]
    after: Callable[[Taken], bool]
    tell: Callable[[Taken], None] = lambda taken: None
    name: str = ""
    levels: bool = True
    state: Callable[[], Any] | None = None
    sparse: bool = False


class Trainer:
    """Takes steps along a gradient, with guard, rollback, checkpoints and interrupts.

    Args:
        gradient: The gradient of the bound.
        session: Clock, checkpointer and callback of the fit.
        record: Record of decisions.
        name: Name of the model.
    """

    def __init__(self, gradient: Gradient, session: Session, record: Record, name: str) -> None:
        self.gradient, self.session, self.record, self.name = gradient, session, record, name

    def begin(self) -> TrainState:
        """Return the state of a training that begins at the present parameters."""
        gradient = self.gradient
        optimiser = Adam(gradient.trained)
        return TrainState(
            gradient.guide,
            gradient.trained,
            gradient.set,
            optimiser,
            gradient.vector(),
            self.record,
        )

    def take(self, phase: Phase, state: TrainState) -> None:
        """Take steps until the limit, a true answer of `after` or the callback, or a failure.

        Raises:
            Interrupted: An interrupt was requested; the present step was completed and saved.
        """
        checkpointer, clock = self.session.checkpointer, self.session.clock
        whole_state = phase.state or state.state_dict
        progress = current()
        progress.phase(phase.name or "training", phase.steps, state.step)
        with self._stepping():
            while state.step < phase.steps and not (state.ended or self.record.stopped):
                taken = self._step(phase, state)
                if phase.levels:
                    state.level.add(taken.bound)
                progress.step(taken.bound)
                state.ended = phase.after(taken) or self._failing(state, phase.levels)
                phase.tell(taken)
                if not phase.sparse:
                    checkpointer.save_if_due(whole_state)
                if clock.interrupted:
                    if not phase.sparse:
                        checkpointer.save(whole_state)
                    raise Interrupted
        if distributed.size() > 1:
            # The answer to the very last step arrives after it.
            self.record.stopped |= bool(distributed.broadcast_number(self.gradient.answer))
        if state.guard.skipped:
            self.record.log.append(
                f"{state.guard.skipped} of {state.step} steps skipped by the gradient guard"
            )

    def try_out(self, phase: Phase, state: TrainState) -> None:
        """Take steps that change only the parameters; a failure ends them.

        Raises:
            Interrupted: An interrupt was requested.
        """
        current().phase("trying step sizes")
        with self._stepping():
            while state.step < phase.steps and not state.ended:
                state.ended = phase.after(self._step(phase, state)) or state.guard.failed
                if self.session.clock.interrupted:
                    raise Interrupted

    def callback(self, told: object) -> None:
        """Call the callback; all processes follow the first one's answer, one step later."""
        if self.session.callback is None:
            return
        try:
            self.gradient.answer = bool(self.session.callback(told))
        except KeyboardInterrupt:
            self.session.clock.interrupt()

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Protect each step from interrupts, with all parameters in one vector."""
        with self.gradient.together(), self.session.clock.synchronized(), abort_on_interrupt(False):
            yield

    def _step(self, phase: Phase, state: TrainState) -> Taken:
        number = state.step
        state.rate = phase.rate(number) * 0.5**state.halvings
        bound, flat = phase.gradient(number)
        value = bound.item()
        admitted, norm = state.guard.admits(value, flat)
        if admitted:
            state.optimiser.step(flat, state.rate, self.gradient.whole)
            self.gradient.follow()
        state.step += 1
        return Taken(number, value, norm, state.rate, not admitted)

    def _failing(self, state: TrainState, levels: bool) -> bool:
        """Roll back if too many steps failed; return whether no further rollback is possible."""
        state.snapshot()
        collapsed = levels and state.level.collapsed
        if not (state.guard.failed or collapsed):
            return False
        words = f"{state.guard.skipped} of {state.step} steps had no finite gradient"
        if not state.guard.failed:
            words = f"the bound fell from {state.level.best:.4g} to {state.level.median:.4g}"
        why = self.gradient.explain_nonfinite() if state.halvings == MOST_HALVINGS else ""
        self.gradient.in_double()
        state.rollback()
        if not state.exhausted:
            self.record.log.append(
                f"{words}: restored the last good state, halved the learning rate"
            )
            return False
        self.record.failures.append(
            f"Training of {self.name} ended early: {words}, also after the learning rate was "
            f"halved {MOST_HALVINGS} times. {why} The best state before was kept."
        )
        self.record.log.append(self.record.failures[-1])
        return True
