"""The arguments of a fit, checked and with defaults filled in."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowvi.fitting.first_guide import AUTO
from flowvi.fitting.given_start import given_normal
from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import Guide
from flowvi.guides.prefixes import PrefixGuide
from flowvi.guides.recipes import Blocks, Multiplicative, Prefixes
from flowvi.guides.registry import guide_names
from flowvi.guides.structured import STRUCTURED_GUIDES, StructuredGuide
from flowvi.initialization.preflight import check_size
from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.nested import NestedTarget, check_outer
from flowvi.objectives.registry import OBJECTIVES, Objective, describe, weighs
from flowvi.objectives.renyi_bound import Renyi, elbo
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime import memory
from flowvi.runtime.arguments import (
    check_choice,
    check_integer,
    check_path,
    check_positive,
    check_type,
    optional,
)
from flowvi.targets import LocalTarget, Target
from flowvi.targets.structure import MarginalTarget
from flowvi.training import schedule as schedules
from flowvi.training.compiling import Compile, asked
from flowvi.training.evaluation import particles_of
from flowvi.training.minibatch import Minibatch
from flowvi.training.schedule import Schedule
from flowvi.training.settings import Settings

PARTICLES = 64
# The name that asks for a guide of shared latents, with conditionals of the local ones.
STRUCTURED = StructuredGuide.kind
# Guides that depend on the shapes of sites.
RECIPES: dict[str, Callable[[], Multiplicative]] = {"multiplicative": Multiplicative}
# Arguments that apply to rows only; None if they were not given.
FOR_ROWS = ("epochs", "batch_size", "validation", "minibatch")
NOT_FOR_ROWS = ("steps", "particles", "restarts", "executor", "schedule")


@dataclass
class Request:
    """The checked arguments of `flowvi.fit`.

    Attributes:
        fresh: Whether a given guide is initialised at the start that is found.
    """

    target: Target
    guide: str | Guide | Blocks | Multiplicative | Prefixes
    objective: Objective | WakeSleep | str | None
    steps: int | None
    lr: float | None
    particles: int | None
    restarts: int
    seed: int
    budget: float | None
    escalate: bool
    compile: Compile
    progress: bool
    callback: Callable[[Any], object] | None
    epochs: int | None
    batch_size: int | None
    validation: Any
    minibatch: Minibatch | None
    schedule: Schedule | None
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    executor: Executor | None
    max_memory: memory.MaxMemory
    start: Any = None
    fresh: bool = True

    def __post_init__(self) -> None:
        check_type("target", self.target, Target, "what from_pyro or from_density returned")
        kinds = (str, Guide, Blocks, Multiplicative, Prefixes)
        check_type("guide", self.guide, kinds, "a name, a guide such as MeanField(D), or Blocks")
        for name in ("steps", "particles", "epochs", "batch_size"):
            setattr(self, name, optional(check_integer, name, getattr(self, name)))
        self.restarts, self.seed = (
            check_integer("restarts", self.restarts),
            check_integer("seed", self.seed, 0),
        )
        self.lr = optional(check_positive, "lr", self.lr)
        self.budget = optional(check_positive, "budget", self.budget, "number of seconds")
        optional(check_type, "executor", self.executor, Executor, "a ProcessPoolExecutor")
        optional(check_type, "schedule", self.schedule, Schedule, "such as Schedule(most_stages=1)")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be a function of a step; got {self.callback!r}.")
        if self.resume and self.checkpoint is None:
            raise ValueError("resume=True goes on with a checkpoint: name its folder, checkpoint=.")
        self._refuse_the_other_kind()
        self._build_recipe()

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder."""
        return optional(check_path, "checkpoint", self.checkpoint)

    @property
    def rows(self) -> Minibatch:
        """Settings of the minibatches, with the separate arguments merged."""
        beside: dict[str, Any] = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
        }
        if self.minibatch is not None:
            check_type("minibatch", self.minibatch, Minibatch, "such as Minibatch(epochs=40)")
        return replace(
            self.minibatch or Minibatch(), **{k: v for k, v in beside.items() if v is not None}
        )

    def settings(self) -> Settings:
        """Settings of the restarts, for shared latents.

        Raises:
            ValueError: The objective is no bound for this target, or the guide does not suit it.
        """
        target, objective = self.target, _objective(self.objective, self.particles)
        _check(target, objective, self.restarts)
        if isinstance(self.guide, str):
            named = sorted({*guide_names(), *STRUCTURED_GUIDES, *RECIPES})
            check_choice("guide", self.guide, [AUTO, *named])
            check_size(target.dim, self.guide)
        if isinstance(self.guide, Guide) and self.guide.dim != target.dim:
            whose = f" but {target.name} has"
            if isinstance(target, NestedTarget):
                whose = f", but the latents that all rows of {target.name} share have"
            raise ValueError(f"The guide has D = {self.guide.dim}{whose} D = {target.dim}.")
        check_prefixes(self.guide, objective)
        return Settings(
            objective,
            self.steps,
            self.lr,
            max(1, (self.particles or PARTICLES) // particles_of(objective)),
            self.seed,
            # A given number of steps is a limit. The model's own parameters are trained together
            # with one guide.
            self.escalate
            and self.guide == AUTO
            and self.steps is None
            and not list(target.parameters()),
            # The search for modes inside the density cannot be compiled.
            asked(False if isinstance(target, MarginalTarget) else self.compile),
            memory.limit() if self.max_memory is None else memory.parse_size(self.max_memory),
            self.schedule or _schedule(target, objective),
            given_normal(target, self.start),
        )

    def _refuse_the_other_kind(self) -> None:
        rows = isinstance(self.target, LocalTarget)
        why = "has latents for each row" if rows else "has no latents for each row (local=)"
        if isinstance(self.target, NestedTarget):
            why = "is a NestedTarget, which has a batch_size of its own"
        for name in NOT_FOR_ROWS if rows else FOR_ROWS:
            value = getattr(self, name)
            if value is not None and not (name == "restarts" and value == 1):
                came = value if isinstance(value, int | float | str) else type(value).__name__
                raise ValueError(f"The target {why}: {name} has no meaning for it; got {came}.")

    def _build_recipe(self) -> None:
        if isinstance(self.guide, str) and self.guide in RECIPES:
            self.guide = RECIPES[self.guide]()
        if isinstance(self.guide, Blocks | Multiplicative | Prefixes):
            if isinstance(self.target, LocalTarget):
                raise ValueError(
                    f"{type(self.guide).__name__} is for latents that all rows share; give rows a "
                    "name or guide."
                )
            self.guide = self.guide.build(self.target)
        elif isinstance(self.guide, Guide):
            # The guide of rows was trained together with a guide of theta.
            self.fresh = not isinstance(self.target, NestedTarget)


def check_prefixes(guide: Any, objective: Any) -> None:
    """Raise a ValueError for an objective that a guide of prefixes is not trained by."""
    inner = guide.guide if isinstance(guide, Amortised) else guide
    made = isinstance(inner, PrefixGuide) or guide == PrefixGuide.kind
    if made and not (isinstance(objective, Renyi) and objective.alpha == 1.0):
        raise ValueError(
            "A guide of prefixes is trained on the mean of their ELBOs: use elbo(), or fit another "
            "guide by this objective."
        )


def _objective(objective: Objective | WakeSleep | str | None, particles: int | None) -> Objective:
    """Resolve the objective from a name or an object."""
    if objective is None:
        return elbo(PARTICLES if particles is None else particles)
    if isinstance(objective, str):
        check_choice("objective", objective, OBJECTIVES)
        if objective == "forward_kl":
            raise ValueError(
                "forward_kl needs draws to fit to: pass objective=OBJECTIVES['forward_kl'](z)."
            )
        objective = OBJECTIVES[objective]()
    if isinstance(objective, WakeSleep):
        raise ValueError(
            "wake_sleep is for latents of rows (local=); for others use elbo() or iwelbo(16)."
        )
    return objective


def _schedule(target: Target, objective: Objective) -> Schedule:
    """The default schedule for a target and an objective."""
    if isinstance(target, MarginalTarget):
        return schedules.structured(target.whole.dim, target.dim, target.structure.units == 1)
    if not isinstance(target, NestedTarget):
        rows = target.sum_of_rows
        return schedules.DEFAULT if rows is None else schedules.of_rows(rows.count)
    return replace(
        schedules.NESTED,
        evaluation_draws=target.evaluation_draws(particles_of(objective)),
        check_draws=target.check_draws(),
    )


def _check(target: Target, objective: Objective, restarts: int) -> None:
    """Raise a ValueError for a fit that is not possible for shared latents."""
    if restarts > 1 and list(target.parameters()):
        raise ValueError(
            f"{target.name} has parameters of its own, which every restart would train anew: "
            f"restarts must be 1, got {restarts}. Capture the model once for each fit instead."
        )
    if not isinstance(objective, Renyi | ForwardKL):
        raise ValueError(
            f"objective must be one such as elbo() or iwelbo(16); got {type(objective).__name__}."
        )
    if isinstance(target, NestedTarget):
        if isinstance(objective, ForwardKL):
            raise ValueError(
                f"forward_kl does not train the guide of the rows of {target.name}: over a "
                "NestedTarget use objective=elbo() or iwelbo(16)."
            )
        check_outer(target, particles_of(objective) if weighs(objective) else 1)
    if target.subsampled and weighs(objective):
        plate = next(iter(target.subsampled))
        raise ValueError(
            f"{describe(objective)} over global latents needs every row in each weight, but plate "
            f"'{plate}' is subsampled: it would not be a bound. Use the ELBO, or the full plate."
        )
