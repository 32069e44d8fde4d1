"""Progress of long work: a bar in a terminal or a notebook, lines where output is redirected."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import numpy as np

from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock

# Seconds between two pictures of a bar, and between two lines.
BAR_EVERY, LINE_EVERY = 0.25, 10.0
# Number of bounds in the mean that is shown.
SHOWN = 50
# Parts of a bar, which shows shares of the whole.
WHOLE = 1000
# Columns of a terminal that does not tell how many it has, and of the bar with its frame.
WIDTH, BESIDE = 120, 22
LOGGER = "flowvi.progress"


class Progress:
    """What long work is doing at the moment, for those who wait.

    Args:
        name: Name of the work, such as that of the model.
        clock: Time since the beginning, and the budget.
        unit: What is counted.
    """

    def __init__(self, name: str = "", clock: Clock | None = None, unit: str = "step") -> None:
        self.name, self.clock, self.unit = name, clock or Clock(), unit
        self.part = self.words = ""
        self.ending: Callable[[], bool] = lambda: False
        self.total: int | None = None
        self.taken = 0
        self._bounds: list[float] = []
        self._began = self.clock.local_seconds
        self._first = 0

    def phase(self, words: str, total: int | None = None, taken: int = 0) -> None:
        """Begin a phase of the work.

        Args:
            words: What is done in it.
            total: Largest number of its steps, if it has steps.
            taken: Number of steps taken already.
        """
        self.words, self.total, self.taken, self._first = words, total, taken, taken
        self._began = self.clock.local_seconds
        self._bounds = []

    def step(self, bound: float = math.nan) -> None:
        """Count a step of the phase.

        Args:
            bound: Estimate of the bound at this step.
        """
        self.taken += 1
        if math.isfinite(bound):
            self._bounds.append(bound)
            del self._bounds[:-SHOWN]

    @property
    def share(self) -> float:
        """Share of the budget that is spent; without one, of the steps of the phase."""
        budget = self.clock.budget
        if budget:
            return min(self.clock.local_seconds / budget, 1.0)
        return min(self.taken / self.total, 1.0) if self.total else 0.0

    @property
    def title(self) -> str:
        """Name of the work and of its phase."""
        ending = "interrupted, ends after: " if self.ending() else ""
        doing = ", ".join(word for word in (self.part, self.words) if word)
        return f"{self.name}: {ending}{doing}" if doing else self.name

    @property
    def numbers(self) -> str:
        """Steps, bound and times."""
        parts = []
        if self.total:
            parts.append(f"{self.unit} {self.taken:,} of ≤ {self.total:,}")
        bounds = self._bounds[:]
        if len(bounds) > 1:
            error = np.std(bounds, ddof=1) / math.sqrt(len(bounds))
            parts.append(f"bound {np.mean(bounds):.3f} ± {error:.2g}")
        seconds = self.clock.local_seconds
        if self.clock.budget:
            left = max(self.clock.budget - seconds, 0.0)
            parts.append(f"{_time(seconds)} of {_time(self.clock.budget)}, {_time(left)} left")
            return ", ".join(parts)
        parts.append(_time(seconds))
        made = self.taken - self._first
        if self.total and made:
            each = (seconds - self._began) / made
            parts.append(f"≤ {_time(each * (self.total - self.taken))} left of this")
        return ", ".join(parts)


# The progress of the running work; without one, steps are counted for nobody.
_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current() -> Progress:
    """The progress of the running work."""
    return _CURRENT.get() or Progress()


def phase(words: str, total: int | None = None, taken: int = 0) -> None:
    """Begin a phase of the running work; see `Progress.phase`."""
    current().phase(words, total, taken)


@contextmanager
def showing(
    name: str, shown: bool, clock: Clock | None = None, unit: str = "step"
) -> Iterator[Progress]:
    """Show the progress of the work in the block.

    In a terminal and in a notebook it is one bar; where the error stream is redirected, a line
    every 10 seconds. With several processes the first one shows it. The logger
    ``flowvi.progress`` takes the lines, if a program has set up logging; setting it, or
    ``flowvi``, to the level WARNING silences bars and lines.

    Args:
        name: Name of the work.
        shown: Whether to show anything.
        clock: Time and budget of the work.
        unit: What is counted.
    """
    progress = Progress(name, clock, unit)
    token = _CURRENT.set(progress)
    view = _view(progress) if shown and not distributed.rank() and not silent() else None
    try:
        if view is None:
            yield progress
        else:
            with view:
                yield progress
    finally:
        _CURRENT.reset(token)


def silent() -> bool:
    """Whether the program has silenced flowvi's messages by the level of a logger."""
    levels = (logging.getLogger(name).level for name in (LOGGER, LOGGER.partition(".")[0]))
    return next((level for level in levels if level), logging.INFO) > logging.INFO


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _view(progress: Progress) -> _Bar | _Lines | None:
    if in_notebook():
        return _Bar(progress)
    if sys.stderr is None or sys.stderr.closed:
        return None
    return _Bar(progress) if sys.stderr.isatty() else _Lines(progress)


class _View(ABC):
    """Shows a progress from a thread of its own, so that it moves also while a step takes long."""

    every: float

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowvi progress", daemon=True)

    @abstractmethod
    def show(self) -> None:
        """Show the present state."""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            # The stream may have been closed meanwhile.
            with suppress(OSError, ValueError):
                self.show()


class _Bar(_View):
    """One bar of tqdm for the whole work."""

    every = BAR_EVERY

    def __enter__(self) -> None:
        with warnings.catch_warnings():
            # Without ipywidgets a notebook has a bar of text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
        size: dict[str, Any] = (
            {"dynamic_ncols": True} if _width() else {"ncols": WIDTH, "nrows": 24}
        )
        self._bar: Any = tqdm(
            total=WHOLE,
            desc=self.progress.title,
            # The unit is the only free text of tqdm without a comma before it.
            bar_format="{desc} |{bar}| {unit}" if in_notebook() else "{desc} |{bar:16}| {unit}",
            unit="",
            **size,
        )
        super().__enter__()

    def show(self) -> None:
        self._bar.n = round(WHOLE * self.progress.share)
        # A notebook has room for everything.
        room = None if in_notebook() else (_width() or WIDTH) - BESIDE
        title, numbers = fitting(self.progress.title, self.progress.numbers, room)
        self._bar.set_description_str(title, refresh=False)
        self._bar.unit = numbers
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        with suppress(OSError, ValueError):
            self.progress.phase("done")
            self._bar.n = WHOLE
            self._bar.set_description_str(self.progress.title, refresh=False)
            self._bar.unit = _time(self.progress.clock.local_seconds)
            self._bar.close()


class _Lines(_View):
    """A line every 10 seconds."""

    every = LINE_EVERY

    def show(self) -> None:
        line = f"{self.progress.title}, {self.progress.numbers}"
        logger = logging.getLogger(LOGGER)
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info(line)
        else:
            print(line, file=sys.stderr, flush=True)


def fitting(title: str, numbers: str, room: int | None) -> tuple[str, str]:
    """A title and numbers as short as the room for both asks; the times are kept to the last.

    Args:
        title: Name of the work and of its phase.
        numbers: Steps, bound and times, with commas between them.
        room: Columns for both; None for any number.
    """
    parts = numbers.split(", ")

    def long() -> bool:
        return room is not None and len(title) + len(", ".join(parts)) > room

    if long():
        title = title.partition(": ")[2] or title
    for name in ("step ", "bound "):
        found = [part for part in parts if part.startswith(name)]
        if long() and found and len(parts) > 1:
            parts.remove(found[0])
    if long():
        title = title.split(", ")[0]
    return title, ", ".join(parts)


def _width() -> int:
    """Columns of the terminal; 0 if they are not known."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 0


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


@contextmanager
def within(name: str, shown: bool, unit: str = "step") -> Iterator[Progress]:
    """The progress of the work that this is a part of; one of its own, if it is no part.

    Args:
        name: Name of the work.
        shown: Whether to show a progress of its own.
        unit: What is counted.
    """
    running = _CURRENT.get()
    if running is not None:
        yield running
        return
    with showing(name, shown, unit=unit) as progress:
        yield progress
