"""Records of a training: its stages, steps, evaluations and log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# The random operations of a restart; each has a stream of its own.
BUILD, TRIAL, TRAIN, EVALUATE, COVER, CHECK, ANNEAL, CHAINS, LOOK, WIDE, MODES = range(11)
ADAPT, REWEIGHT, OPINION = 11, 12, 13
# Takes the decisions of a fit, with their reasons, at the level INFO.
LOGGER = logging.getLogger("flowvi.fit")


class Step(NamedTuple):
    """Argument of the callback after every step.

    Attributes:
        step: Number of the step, from 1.
        steps: Total number of steps, or its upper limit.
        bound: Estimate of the bound at this step.
        grad_norm: Norm of the gradient.
        lr: Step size.
        skipped: Number of steps skipped so far.
        restart: Number of the restart, from 0.
    """

    step: int
    steps: int
    bound: float
    grad_norm: float
    lr: float
    skipped: int
    restart: int


class Row(NamedTuple):
    """One step in the history of a fit of shared latents."""

    bound: float
    grad_norm: float
    lr: float
    skipped: bool
    draws: int
    stage: int


class Evaluation(NamedTuple):
    """Evaluation of a guide on fresh draws.

    Attributes:
        bound: The bound.
        se: Standard error of the bound.
        gap: Distance of the bound below the log evidence; NaN if unknown.
        khat: Pareto shape of the importance weights; NaN if unknown.
    """

    bound: float
    se: float = math.inf
    gap: float = math.nan
    khat: float = math.nan


class Trial(NamedTuple):
    """The best of the step sizes that were tried.

    Attributes:
        lr: The step size.
        bound: Bound after a few steps; minus infinity if every step size failed.
    """

    lr: float
    bound: float


@dataclass(frozen=True)
class Stage:
    """A part of a training: steps of constant size, then steps of falling size.

    Args:
        name: Name in the log.
        steady: Largest number of steps of constant size; a plateau ends them sooner.
        decay: Steps of falling size; by default half the number of constant ones taken.
        repeats: Estimates of the objective in a step.
        lr: Largest step size.
        share: Share of the time budget at which the stage has to end.
    """

    name: str
    steady: int
    decay: int | None
    repeats: int
    lr: float
    share: float = 1.0


class Log(list[str]):
    """Lines of a log; each one that is added goes to the logger ``flowvi.fit`` too."""

    def append(self, line: str) -> None:
        super().append(line)
        LOGGER.info(line)

    def extend(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.append(line)


@dataclass
class Record:
    """History, log and failures of a restart.

    Attributes:
        rows: One row for each step.
        log: Decisions and their reasons.
        stages: Names of the stages.
        failures: Messages of stages that ended early because steps failed.
        stopped: Whether the callback stopped the fit.
    """

    rows: list[Row] = field(default_factory=list)
    log: list[str] = field(default_factory=Log)
    stages: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopped: bool = False

    def marks(self) -> tuple[int, int, int, int]:
        """Present lengths of the record's lists."""
        return len(self.rows), len(self.log), len(self.stages), len(self.failures)

    def since(self, marks: Sequence[int]) -> dict[str, Any]:
        """Return the entries after a mark, in the form that `write_state` takes."""
        rows, log, stages, failures = marks
        table = torch.tensor(self.rows[rows:], dtype=torch.float64)
        return {
            "rows": table.reshape(-1, len(Row._fields)),
            "log": self.log[log:],
            "stages": self.stages[stages:],
            "failures": self.failures[failures:],
            "stopped": self.stopped,
        }

    def extend(self, added: Mapping[str, Any]) -> None:
        """Append entries that `since` returned."""
        for bound, norm, lr, skipped, draws, stage in added["rows"].tolist():
            self.rows.append(Row(bound, norm, lr, bool(skipped), int(draws), int(stage)))
        self.log.extend(added["log"])
        self.stages += added["stages"]
        self.failures += added["failures"]
        self.stopped = added["stopped"]
