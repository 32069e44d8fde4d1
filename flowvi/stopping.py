"""When to stop: a plateau that noise cannot feign, and a limit of time."""

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

import numpy as np

from flowvi import parallel

BLOCK, TRIM = 10, 2
LEAST = 400
EVERY = 50
# Share of a trace that is looked at, its later part.
WINDOW = 0.5
# A gain of so many sds of a single step's noise, over half a window, is worth going on for.
WORTH = 0.3
# One-sided bounds of the gain: 99 % that the trace rises no faster.
ERRORS = 2.33


T = TypeVar("T")

HEARD = (
    "Interrupted: the fit ends with the best so far, and says what it does meanwhile. Interrupt it "
    "again to stop at once."
)
_CURRENT: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Interrupted(Exception):
    """The fit was asked to stop; of the guide that was trained, the best so far is kept."""

    def __init__(self, judged: Any = None) -> None:
        super().__init__("interrupted")
        self.judged = judged


@dataclass
class Clock:
    """Time since a fit began, and whether it has to come to its end.

    Args:
        budget: Seconds; no limit without.
    """

    budget: float | None = None
    began: float = field(default_factory=time.perf_counter)
    _asked: bool = False
    _droppable: bool = False
    _heard: tuple[bool, float] | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the fit was asked to stop; the first process, where there are several."""
        return bool(parallel.agreed(self._asked)) if self._heard is None else self._heard[0]

    def interrupt(self) -> None:
        """Ask the fit to stop after its present step; the second time, it stops at once.

        Raises:
            Interrupted: What is being done is `droppable`.
            KeyboardInterrupt: It was asked before.
        """
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._droppable:
            raise Interrupted

    def asked_alone(self) -> bool:
        """Whether the fit was asked to stop, without a word to other processes; no, with them."""
        return self._asked and parallel.size() == 1

    def set(self, seconds: float) -> None:
        """Go on from a number of seconds."""
        self.began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds since the beginning; those of the first process, where there are several."""
        return parallel.agreed(self.own_seconds) if self._heard is None else self._heard[1]

    def told(self) -> tuple[bool, float]:
        """Whether this process was asked to stop, and its seconds, for `hear`."""
        return self._asked, self.own_seconds

    def hear(self, asked: float, seconds: float) -> None:
        """Take for the state of things what the first process told in a step."""
        self._heard = bool(asked), seconds

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ask nobody between steps in which the first process says how things are."""
        try:
            yield
        finally:
            self._heard = None

    @property
    def own_seconds(self) -> float:
        """Seconds since the beginning, of this process."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        """Seconds until the end of the budget."""
        return math.inf if self.budget is None else self.budget - self.seconds

    def spent(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent."""
        return self.budget is not None and self.seconds >= share * self.budget

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent, or the fit was interrupted."""
        return self.spent(share) or self.interrupted


@contextmanager
def droppable(drop: bool = True) -> Iterator[None]:
    """Work of which no part is needed: it ends at once where its fit is asked to stop.

    Of several processes none stops alone; there it is done to its end.

    Args:
        drop: False for a part of it that is done to its end.

    Raises:
        Interrupted: The fit was asked to stop, before or inside.
    """
    clock = _CURRENT.get()
    if clock is None or parallel.size() > 1:
        yield
        return
    before, clock._droppable = clock._droppable, drop
    try:
        if drop and clock.asked_alone():
            raise Interrupted
        yield
    finally:
        clock._droppable = before


def up_to_now(items: Iterator[T]) -> Iterator[T]:
    """Items until their fit is asked to stop: the first in any case, and no unfinished ones."""
    yield next(items)
    while True:
        try:
            with droppable():
                item = next(items)
        except (Interrupted, StopIteration):
            return
        yield item


@dataclass
class Plateau:
    r"""Whether a noisy bound still rises by enough to go on.

    The later half of the trace, W steps, is cut into blocks of ten steps, whose
    trimmed means no single wild step can move. The slope of a line through
    them says what the next W / 2 steps would bring: a gain g, with standard
    error s. The trace has reached a plateau when

    .. math:: |g| + 2.33 s \le \max(\tau, 0.3 \sigma), \qquad g \ge -s,

    at two checks in a row, so that neither rising nor falling is called one.
    :math:`\sigma` is the noise of a single step, below which a step of constant
    size cannot see its way: a smaller one, or more draws, then bring more.

    Args:
        tolerance: Gain in nats that is never worth going on for, :math:`\tau`.

    References:
        Welandawe, Andersen, Vehtari and Huggins (2024), "A framework for
        improving the reliability of black-box variational inference",
        JMLR 25(219): stopping by the gain that more work would bring.
    """

    tolerance: float = 1e-3
    values: list[float] = field(default_factory=list)
    in_a_row: int = 0

    def add(self, bound: float) -> bool:
        """Take the bound of one more step; tell whether two checks in a row saw a plateau."""
        self.values.append(bound)
        if len(self.values) >= LEAST // 2 and len(self.values) % EVERY == 0:
            self.in_a_row = self.in_a_row + 1 if self.reached() else 0
        return self.in_a_row == 2

    def reached(self) -> bool:
        """Whether the trace so far ends in a plateau."""
        gain, error, noise = self.trend()
        # A short trace knows its own noise too badly.
        enough = max(self.tolerance, WORTH * noise if len(self.values) >= LEAST else 0.0)
        return gain >= -error and abs(gain) + ERRORS * error <= enough

    def trend(self) -> tuple[float, float, float]:
        """Gain over half the window, its standard error, and the noise of single steps."""
        trace = np.asarray(self.values)
        blocks = int(WINDOW * len(trace)) // BLOCK
        trace = trace[len(trace) - blocks * BLOCK :]
        if not np.isfinite(trace).all():
            trace = np.where(np.isfinite(trace), trace, np.median(trace[np.isfinite(trace)]))
        middle = np.sort(trace.reshape(-1, BLOCK), axis=1)[:, TRIM:-TRIM].mean(1)
        # Differences are free of the trend; a normal's median absolute value is 0.6745 sd.
        noise = float(np.median(np.abs(np.diff(trace)))) / (0.6745 * math.sqrt(2))
        slope, error = _slope(middle)
        return slope * blocks / 2, error * blocks / 2, noise


@contextmanager
def interruptible(clock: Clock) -> Iterator[None]:
    """Have Ctrl-C end a fit after its present step, and the second one at once.

    Another handler than Python's own is left in its place; it may call `clock.interrupt`.
    """
    token = _CURRENT.set(clock)
    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def pressed(number: int, frame: FrameType | None) -> None:
        if not clock._asked:
            _say(HEARD)
        clock.interrupt()

    if own:
        signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _CURRENT.reset(token)


def _say(words: str) -> None:
    """Say something in the middle of whatever is done, on a line of its own."""
    try:
        sys.stderr.write(f"\n{words}\n")
        sys.stderr.flush()
    except (OSError, RuntimeError, ValueError):
        # The stream is closed, or was being written to.
        pass


def _slope(y: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of y against 0, 1, ..., and its standard error, for uneven noise."""
    x = np.arange(len(y)) - (len(y) - 1) / 2
    weight = x / (x @ x)
    slope = float(weight @ y)
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt((weight**2) @ rest**2 * len(y) / (len(y) - 2)))
