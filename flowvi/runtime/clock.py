"""Time limits and interruption of a fit."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from flowvi.runtime import distributed

T = TypeVar("T")

INTERRUPT_NOTICE = (
    "Interrupted: the fit ends with the best result so far. Interrupt it again to stop at once."
)
_CURRENT: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Interrupted(Exception):
    """The user interrupted the fit; `evaluation` holds the best guide so far, if there is one."""

    def __init__(self, judged: Any = None) -> None:
        super().__init__("interrupted")
        self.evaluation = judged


@dataclass
class Clock:
    """Time since a fit began, and whether the fit has to end.

    Args:
        budget: Seconds; no limit without.

    Attributes:
        reserved: Seconds of the budget that what follows the training will take.
    """

    budget: float | None = None
    began: float = field(default_factory=lambda: time.perf_counter())
    _asked: bool = False
    _droppable: bool = False
    _deadline: float = math.inf
    reserved: float = 0.0
    _received: tuple[bool, float] | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the first process was asked to stop the fit."""
        return (
            bool(distributed.broadcast_number(self._asked))
            if self._received is None
            else self._received[0]
        )

    def interrupt(self) -> None:
        """Ask the fit to stop after its present step; the second call stops it at once.

        Raises:
            Interrupted: The present work is `abort_on_interrupt`.
            KeyboardInterrupt: This is the second call.
        """
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._droppable:
            raise Interrupted

    def interrupted_here(self) -> bool:
        """Whether a fit of a single process was asked to stop; false with several processes."""
        return self._asked and distributed.size() == 1

    def go_on_from(self, seconds: float) -> None:
        """Continue from a number of elapsed seconds."""
        self.began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, by the clock of the first process."""
        return (
            distributed.broadcast_number(self.local_seconds)
            if self._received is None
            else self._received[1]
        )

    def status(self) -> tuple[bool, float]:
        """Whether this process was asked to stop, and its seconds, for `receive`."""
        return self._asked, self.local_seconds

    def receive(self, asked: float, seconds: float) -> None:
        """Use the values that the first process sent with a step."""
        self._received = bool(asked), seconds

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """Inside the block, use the values of `receive` instead of a broadcast at each question."""
        try:
            yield
        finally:
            self._received = None

    @property
    def local_seconds(self) -> float:
        """Seconds since the beginning, by the clock of this process."""
        return time.perf_counter() - self.began

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of the budget."""
        return math.inf if self.budget is None else self.budget - self.seconds

    def budget_spent(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent, less what is reserved."""
        return self.budget is not None and self.seconds >= share * (self.budget - self.reserved)

    def out_of_time(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent, or the fit was interrupted."""
        return self.budget_spent(share) or self.interrupted

    @contextmanager
    def deadline(self, share: float) -> Iterator[None]:
        """Inside the block, work that may be dropped ends at a share of the budget."""
        before = self._deadline
        self._deadline = min(before, math.inf if self.budget is None else share * self.budget)
        try:
            yield
        finally:
            self._deadline = before


def drop_if_late() -> None:
    """Call this before work that takes long: if a deadline has passed, droppable work ends.

    Raises:
        Interrupted: The present work is `abort_on_interrupt`, and a `Clock.deadline` has passed.
    """
    clock = _CURRENT.get()
    if clock is not None and clock._droppable and clock.local_seconds >= clock._deadline:
        raise Interrupted


@contextmanager
def abort_on_interrupt(drop: bool = True) -> Iterator[None]:
    """Work that the result does not need: an interrupt of the fit ends the block at once.

    With several processes the block runs to its end, since no process may stop alone.

    Args:
        drop: False for an inner block that runs to its end.

    Raises:
        Interrupted: The fit was asked to stop, before the block or inside.
    """
    clock = _CURRENT.get()
    if clock is None or distributed.size() > 1:
        yield
        return
    before, clock._droppable = clock._droppable, drop
    try:
        if drop and clock.interrupted_here():
            raise Interrupted
        yield
    finally:
        clock._droppable = before


def until_interrupted(items: Iterator[T]) -> Iterator[T]:
    """Yield items until the fit is asked to stop; the first item comes in any case."""
    yield next(items)
    while True:
        try:
            with abort_on_interrupt():
                item = next(items)
        except (Interrupted, StopIteration):
            return
        yield item


@contextmanager
def interruptible(clock: Clock) -> Iterator[None]:
    """Inside the block, Ctrl-C ends the fit after its present step; a second Ctrl-C, at once.

    A handler that the program has set itself stays in place; it may call `clock.interrupt`.
    """
    token = _CURRENT.set(clock)
    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def pressed(number: int, frame: FrameType | None) -> None:
        if not clock._asked:
            _write_notice(INTERRUPT_NOTICE)
        clock.interrupt()

    if own:
        signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _CURRENT.reset(token)


def _write_notice(words: str) -> None:
    """Write a line to the error stream, also from a signal handler."""
    try:
        sys.stderr.write(f"\n{words}\n")
        sys.stderr.flush()
    except (OSError, RuntimeError, ValueError):
        # The stream is closed, or was being written to.
        pass
