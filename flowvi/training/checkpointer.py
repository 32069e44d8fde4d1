"""Save the state of a fit during training, and restore it after an interruption."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flowvi.runtime import distributed
from flowvi.runtime.checkpoint_folder import CheckpointFolder, warn_if_unwritable
from flowvi.runtime.clock import Clock, abort_on_interrupt
from flowvi.runtime.rng import get_rng_state, set_rng_state
from flowvi.targets import Target

if TYPE_CHECKING:
    from flowvi.training.records import Record

# Least time between two states in seconds, and as a multiple of the time to write one.
EVERY, SPARED = 10.0, 100.0

T = TypeVar("T")


class Checkpointer:
    """Saves the state of a fit, and restores it when the fit is resumed.

    A fit is a sequence of parts. Each part depends only on the seed and on earlier parts. The
    result of a part is saved in a checkpoint folder, and a resumed fit reads it instead of
    computing it again. A long part also saves intermediate states, and resumes from the newest
    valid one. Without a folder nothing is saved.

    Args:
        clock: Clock of the fit; a resumed fit restores its time.
        target: The density; a resumed fit restores its count of evaluations.

    Attributes:
        shelf: The checkpoint folder, if there is one.
        saved: Function called after a result is saved.
    """

    def __init__(self, clock: Clock, target: Target | None = None) -> None:
        self.clock, self.target = clock, target
        self.shelf: CheckpointFolder | None = None
        self.saved: Callable[[], object] = lambda: None
        self._place, self._what = 0, ""
        self._last, self._pause = time.perf_counter(), EVERY

    def run_once(
        self,
        what: str,
        record: Record,
        work: Callable[[], T],
        pack: Callable[[T], Any],
        unpack: Callable[[Any], T],
    ) -> T:
        """Compute a part of the fit, or read its saved result.

        Args:
            what: Name of the part.
            record: The record that the part appends to.
            work: Function that computes the part.
            pack: Function from the result to a state, in the form that `write_state` takes.
            unpack: Function from a state to the result; it restores side effects of `work`.
        """
        self.begin(what)
        found = self._found()
        if found is not None:
            record.extend(found["record"])
            self._go_on(found)
            return unpack(found["result"])
        before = record.marks()
        result = work()
        if self.shelf is not None and not self.clock.interrupted and not distributed.rank():
            state = {
                "result": pack(result),
                "record": record.since(before),
                **self._here(),
            }
            with abort_on_interrupt(False):
                self.shelf.save_result(what, self._place, state)
                with warn_if_unwritable(self.shelf.folder):
                    self.saved()
        return result

    def begin(self, what: str) -> None:
        """Begin the next part, which saves intermediate states only."""
        self._place, self._what = self._place + 1, what

    def own_state(self, target: Target, record: Record) -> None:
        """Save, or restore, the initial values of the target's own parameters."""

        def begin(values: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for held, value in zip(target.own_state().values(), values, strict=True):
                    held.copy_(value)

        if target.own_state():
            self.run_once(
                "own", record, lambda: None, lambda _: [*target.own_state().values()], begin
            )

    def latest_state(self) -> Any:
        """Return the newest valid state of the present part; None if there is none."""
        for entry in list(self.shelf.states) if self.shelf else []:
            state = self.shelf.read(entry) if self.shelf and entry.place == self._place else None
            if isinstance(state, dict) and "state" in state:
                self._go_on(state)
                return state["state"]
        return None

    def save_if_due(self, make: Callable[[], Any]) -> None:
        """Save a state of the present part, unless the last one is recent."""
        if self.shelf is not None and time.perf_counter() - self._last >= self._pause:
            self.save(make)

    def save(self, make: Callable[[], Any]) -> None:
        """Save a state of the present part."""
        if self.shelf is None or distributed.rank():
            return
        began = time.perf_counter()
        state = {"state": make(), **self._here()}
        self.shelf.save_state(self._what, self._place, state)
        self._last = time.perf_counter()
        self._pause = max(EVERY, SPARED * (self._last - began))

    def _here(self) -> dict[str, Any]:
        """State that all parts share."""
        return {
            "random": get_rng_state(),
            "seconds": self.clock.local_seconds,
            "uses": [] if self.target is None else self.target.uses(),
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        set_rng_state(state["random"])
        self.clock.go_on_from(state["seconds"])
        if self.target is not None:
            self.target.begin(state["uses"])

    def _found(self) -> Any:
        shelf, place = self.shelf, self._place
        if shelf is None or place > len(shelf.pieces):
            return None
        entry = shelf.pieces[place - 1]
        found = shelf.read(entry) if entry.what == self._what else None
        if entry.what != self._what:
            warnings.warn(
                f"{shelf.folder}: the step after this one was '{entry.what}' and is "
                f"'{self._what}' now; the fit repeats all steps from here.",
                stacklevel=4,
            )
        if found is None:
            shelf.discard_from(place)
        return found
