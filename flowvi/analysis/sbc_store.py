"""Results of the fits of a calibration, in memory and on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowvi.diagnostics.calibration import Calibration
from flowvi.runtime.files import atomic_replace, error_reason


class Outcome(NamedTuple):
    """Result of one fit, or the message of its failure."""

    number: int
    labels: tuple[str, ...]
    plain: np.ndarray
    resampled: np.ndarray
    probabilities: np.ndarray
    verdict: str
    failure: str


class Store:
    """Results by number of the fit, and the file that stores them.

    Args:
        file: The file; None stores nothing.
        key: Settings that all results of the file share.
    """

    def __init__(self, file: Path | None, key: Mapping[str, Any]) -> None:
        self.file, self.key = file, json.dumps(dict(key), sort_keys=True)
        self.done: dict[int, Outcome] = {}
        if file is not None and file.exists():
            self._read(file)

    def add(self, outcome: Outcome) -> None:
        """Add a result, and write the file."""
        self.done[outcome.number] = outcome
        if self.file is None:
            return
        rows = list(self.done.values())
        columns: dict[str, Any] = {
            name: np.array([getattr(row, name) for row in rows]) for name in Outcome._fields
        }
        columns["labels"] = np.array(outcome.labels)
        try:
            with atomic_replace(self.file) as part, part.open("wb") as opened:
                np.savez(opened, key=np.array(self.key), **columns)
        except OSError as error:
            warnings.warn(
                f"{self.file} could not be written ({error_reason(error)}). The calibration "
                "goes on; these "
                "fits are written with the next one.",
                stacklevel=3,
            )

    def calibration(self, levels: int) -> Calibration:
        """Combine all results, in the order of their numbers."""
        rows = [self.done[i] for i in sorted(self.done)]
        good = [row for row in rows if not row.failure]
        failures = tuple(row.failure for row in rows if row.failure)
        if len(good) < 2:
            raise ValueError(f"Nearly all fits failed, the first one thus: {failures[0]}")
        return Calibration(
            good[0].labels,
            levels,
            np.stack([row.plain for row in good]),
            np.stack([row.resampled for row in good]),
            np.stack([row.probabilities for row in good]),
            tuple(row.verdict for row in good),
            failures,
        )

    def _read(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as saved:
            if str(saved["key"]) != self.key:
                raise ValueError(
                    f"{file} holds the fits of another calibration, with {saved['key']}; "
                    f"this one has {self.key}. Name another file."
                )
            labels = tuple(map(str, saved["labels"]))
            columns = [saved[name] for name in Outcome._fields if name != "labels"]
        for number, plain, resampled, probabilities, verdict, failure in zip(*columns, strict=True):
            row = (labels, plain, resampled, probabilities, str(verdict), str(failure))
            self.done[int(number)] = Outcome(int(number), *row)
