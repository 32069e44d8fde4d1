"""What is asked of a training, and what it leaves behind for its reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# What is random in a restart; each has a stream of its own.
BUILD, TRIAL, TRAIN, EVALUATE, COVER, CHECK, ANNEAL, CHAINS, LOOK, WIDE, MODES = range(11)


class Step(NamedTuple):
    """What a callback is told after every step.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps in all, or the most that there can be.
        bound: Estimate of the bound at this step.
        grad_norm: Norm of its gradient.
        lr: Step size.
        skipped: Steps skipped so far.
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
    """One step in the history of a fit of latents that all rows share."""

    bound: float
    grad_norm: float
    lr: float
    skipped: bool
    draws: int
    stage: int


class Evaluation(NamedTuple):
    """A guide on fresh draws.

    Attributes:
        bound: Its bound.
        se: Standard error of the bound.
        gap: How far the bound is below the log evidence; NaN where that is not known.
        khat: Pareto shape of the weights; likewise.
    """

    bound: float
    se: float = math.inf
    gap: float = math.nan
    khat: float = math.nan


class Trial(NamedTuple):
    """The best of the step sizes that were tried.

    Attributes:
        lr: The step size.
        bound: What a few steps of it led to; minus infinity if no step size was any good.
    """

    lr: float
    bound: float


@dataclass(frozen=True)
class Stage:
    """A stretch of training: steps of constant size, then of falling size.

    Args:
        name: What to call it.
        steady: Most steps of constant size; a plateau ends them sooner.
        decay: Steps of falling size; half as many as the steady ones took, without.
        repeats: Estimates of the objective a step.
        lr: Largest step size.
        share: Share of the time budget at which it has to end.
    """

    name: str
    steady: int
    decay: int | None
    repeats: int
    lr: float
    share: float = 1.0


@dataclass
class Record:
    """What a restart leaves behind for its reader.

    Attributes:
        rows: One for each step.
        log: What was decided, and why.
        stages: Their names.
        failures: Why stages ended before their time, where steps could not be taken.
        stopped: Whether the callback stopped the fit.
    """

    rows: list[Row] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopped: bool = False

    def marks(self) -> tuple[int, int, int, int]:
        """How much there is by now."""
        return len(self.rows), len(self.log), len(self.stages), len(self.failures)

    def since(self, marks: Sequence[int]) -> dict[str, Any]:
        """What was added after a mark, as `write_state` takes it."""
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
        """Add what `since` returned."""
        for bound, norm, lr, skipped, draws, stage in added["rows"].tolist():
            self.rows.append(Row(bound, norm, lr, bool(skipped), int(draws), int(stage)))
        self.log += added["log"]
        self.stages += added["stages"]
        self.failures += added["failures"]
        self.stopped = added["stopped"]
