"""The pieces of a fit: done once, and read when the fit goes on after it was cut off."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from flowvi.runtime import distributed
from flowvi.runtime.checkpoint_folder import Shelf, said
from flowvi.runtime.clock import Clock, droppable
from flowvi.runtime.rng import random_state, set_random_state
from flowvi.targets.recording.program import Density

if TYPE_CHECKING:
    from flowvi.training.records import Record

# Seconds between two states, at least, and how many times longer than it takes to write one.
EVERY, SPARED = 10.0, 100.0

T = TypeVar("T")


class Journal:
    """Pieces of a fit, each of which depends on the seed and on those before it alone.

    What came of a piece is kept on a shelf. When the same fit begins again, it is
    read instead of done. A piece that takes long keeps states on its way and
    goes on from the newest that is whole. Without a shelf nothing is kept.

    Args:
        clock: Of the fit; it goes on from where it was.
        density: What is evaluated; likewise.
        shelf: Where states are kept.
        kept: Called whenever a piece was kept.
    """

    def __init__(
        self,
        clock: Clock,
        density: Density | None = None,
        shelf: Shelf | None = None,
        kept: Callable[[], object] = lambda: None,
    ) -> None:
        self.clock, self.density, self.shelf, self.kept = clock, density, shelf, kept
        self._place, self._what = 0, ""
        self._last, self._pause = time.perf_counter(), EVERY

    def once(
        self,
        what: str,
        record: Record,
        work: Callable[[], T],
        pack: Callable[[T], Any],
        unpack: Callable[[Any], T],
    ) -> T:
        """Do a piece of the fit, or read what came of it.

        Args:
            what: A name for it.
            record: To which it adds.
            work: Does it.
            pack: Its result, as `write_state` takes it.
            unpack: The result again, with all that `work` changed beside it.
        """
        self._place, self._what = self._place + 1, what
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
            with droppable(False):
                self.shelf.put_piece(what, self._place, state)
                with said(self.shelf.folder):
                    self.kept()
        return result

    def parameters(self, of: nn.Module, record: Record) -> None:
        """Have parameters that are not made here begin as they did."""

        def begin(values: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for p, value in zip(of.parameters(), values, strict=True):
                    p.copy_(value)

        if list(of.parameters()):
            self.once("own", record, lambda: None, lambda _: [*of.parameters()], begin)

    def standing(self) -> Any:
        """The newest whole state of the present piece; None if it has to begin."""
        for entry in list(self.shelf.states) if self.shelf else []:
            state = self.shelf.read(entry) if self.shelf and entry.place == self._place else None
            if state is not None:
                self._go_on(state)
                return state["state"]
        return None

    def offer(self, make: Callable[[], Any]) -> None:
        """Keep a state of the present piece, unless the last one is recent."""
        if self.shelf is not None and time.perf_counter() - self._last >= self._pause:
            self.keep(make)

    def keep(self, make: Callable[[], Any]) -> None:
        """Keep a state of the present piece."""
        if self.shelf is None or distributed.rank():
            return
        began = time.perf_counter()
        state = {"state": make(), **self._here()}
        self.shelf.put_state(self._what, self._place, state)
        self._last = time.perf_counter()
        self._pause = max(EVERY, SPARED * (self._last - began))

    def _here(self) -> dict[str, Any]:
        """Where everything is that pieces share."""
        return {
            "random": random_state(),
            "seconds": self.clock.own_seconds,
            "uses": [] if self.density is None else self.density.uses(),
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        set_random_state(state["random"])
        self.clock.set(state["seconds"])
        if self.density is not None:
            self.density.begin(state["uses"])

    def _found(self) -> Any:
        shelf, place = self.shelf, self._place
        if shelf is None or place > len(shelf.pieces):
            return None
        entry = shelf.pieces[place - 1]
        found = shelf.read(entry) if entry.what == self._what else None
        if entry.what != self._what:
            warnings.warn(
                f"{shelf.folder}: the fit had gone on with '{entry.what}', and does with "
                f"'{self._what}' now; what came after is done again.",
                stacklevel=4,
            )
        if found is None:
            shelf.drop(place)
        return found
