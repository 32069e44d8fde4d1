"""Ascents to modes: L-BFGS from several points, whose densities are evaluated together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue

import numpy as np
from torch import Tensor

from flowvi.initialization.gaussian import LogDensityProtocol, scores_in_chunks
from flowvi.runtime.clock import Interrupted, abort_on_interrupt

LBFGS_STEPS = 300
# Minus the log density where it is not finite.
NOT_FINITE = 1e30

Answer = tuple[float, np.ndarray]


class _Stopped(Exception):
    """The ascents were interrupted."""


class _Ascent(threading.Thread):
    """One ascent, which asks for values of the density and waits for them.

    Args:
        number: Its number.
        start: Where it starts, (D).
        asked: Takes the number with a point, (D), or with None at the end.
    """

    def __init__(
        self, number: int, start: Tensor, asked: SimpleQueue[tuple[int, np.ndarray | None]]
    ) -> None:
        super().__init__(daemon=True)
        self.number, self.start_point, self.asked = number, start, asked
        self.answers: SimpleQueue[Answer | None] = SimpleQueue()
        self.path: list[np.ndarray] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        from scipy.optimize import minimize  # slow to import

        try:
            minimize(
                self._objective,
                self.start_point.cpu().numpy().astype(np.float64),
                jac=True,
                method="L-BFGS-B",
                callback=lambda x: self.path.append(x.copy()),
                options={"maxiter": LBFGS_STEPS, "maxcor": 20},
            )
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.asked.put((self.number, None))

    def _objective(self, x: np.ndarray) -> Answer:
        self.asked.put((self.number, x.copy()))
        answer = self.answers.get()
        if answer is None:
            raise _Stopped
        return answer


def ascend_together(target: LogDensityProtocol, starts: Sequence[Tensor]) -> list[list[Tensor]]:
    """Points of L-BFGS ascents of the log density (SciPy), the last of each the highest.

    The ascents do not know of each other. Their next points are evaluated in one call, which for
    a density of a few operations takes hardly longer than that for one point. An interrupt, or the
    end of the time, keeps the points so far.

    Args:
        target: The log density.
        starts: Points to start from, (D) each.

    Returns:
        The points of each ascent; the start itself where there are none.
    """
    asked: SimpleQueue[tuple[int, np.ndarray | None]] = SimpleQueue()
    ascents = [_Ascent(i, start, asked) for i, start in enumerate(starts)]
    for ascent in ascents:
        ascent.start()
    try:
        with suppress(Interrupted), abort_on_interrupt():
            _answer_all(target, ascents, asked)
    finally:
        for ascent in ascents:
            ascent.answers.put(None)
        for ascent in ascents:
            ascent.join()
    for ascent in ascents:
        if ascent.error is not None:
            raise ascent.error
    return [[a.start_point.new_tensor(x) for x in a.path] or [a.start_point] for a in ascents]


def ascend(target: LogDensityProtocol, start: Tensor) -> list[Tensor]:
    """Points of one ascent, the last the highest; see `ascend_together`."""
    return ascend_together(target, [start])[0]


def _answer_all(
    target: LogDensityProtocol,
    ascents: Sequence[_Ascent],
    asked: SimpleQueue[tuple[int, np.ndarray | None]],
) -> None:
    """Evaluate what the ascents ask for, once all that have not ended are waiting."""
    running = len(ascents)
    while running:
        waiting: dict[int, np.ndarray] = {}
        while len(waiting) < running:
            number, point = asked.get()
            if point is None:
                running -= 1
            else:
                waiting[number] = point
        if not waiting:
            return
        # In a fixed order, so that the same seed gives the same bits.
        numbers = sorted(waiting)
        points = np.stack([waiting[i] for i in numbers])
        values, gradients = scores_in_chunks(target, ascents[0].start_point.new_tensor(points))
        good = values.isfinite() & gradients.isfinite().all(-1)
        heights = values.cpu().numpy().astype(np.float64)
        slopes = gradients.cpu().numpy().astype(np.float64)
        for k, i in enumerate(numbers):
            answer = (-heights[k], -slopes[k]) if good[k] else (NOT_FINITE, 0 * points[k])
            ascents[i].answers.put(answer)
