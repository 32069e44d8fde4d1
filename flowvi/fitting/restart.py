"""One restart of a fit: a start, training in stages, a check, and what to do if it fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from flowvi.diagnostics import Diagnosis
from flowvi.draws.diagnose import diagnose
from flowvi.draws.sampling import draw
from flowvi.fitting.candidate import Kept
from flowvi.guides.guide import FULL_RANK_DIM, Guide
from flowvi.guides.mixture_overlap import overlap
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.registry import make_guide, starts_flat
from flowvi.guides.skewed import HELD_DIM
from flowvi.initialization.candidates import best_gaussian
from flowvi.initialization.gaussian import Gaussian, distinct
from flowvi.initialization.missed_modes import left_out
from flowvi.initialization.modes import further_modes
from flowvi.initialization.preflight import check_integrable, look
from flowvi.runtime.clock import Interrupted, droppable
from flowvi.runtime.rng import stream
from flowvi.runtime.tensors import fill, tensors_of
from flowvi.samplers.tempering import MOST_DIM, found_beyond, wide_gaussian
from flowvi.targets import Target
from flowvi.training.records import (
    ANNEAL,
    BUILD,
    CHECK,
    COVER,
    LOOK,
    MODES,
    WIDE,
    Record,
    Stage,
    Trial,
)
from flowvi.training.settings import Settings
from flowvi.training.trainer import RATES, TRIAL_STEPS, Trainer

# Below this KL(q || p) the start needs no flow.
NOTHING_LEFT = 0.003
# And below this, training no further stage: no mean is then off by 0.15 sds. If the weights
# have a heavy tail, it takes a smaller one.
ENOUGH, ENOUGH_HEAVY = 0.005, 0.003
# Where less than this is left to gain, the middle step size will do, and few steps.
LITTLE, FEW_STEPS = 0.03, 300
LIGHT = 0.5
# A stage that removed less than this share of the gap is the last one.
WORTH = 0.15
STEADY_STEPS = 1000
# A search takes 60 steps for each of three step sizes: not more than a fifth of those asked for.
FEWEST_TO_SEARCH = 5 * len(RATES) * TRIAL_STEPS
MOST_STAGES = 3
# Draws behind the check, as many as `Fit.draw` makes.
CHECK_DRAWS = 4000
# Where other draws could decide otherwise, times as many.
AGAIN = 4
# Share of a time budget for which the first guide is trained, if more could follow.
FIRST_SHARE = 0.7
# And for which a start is looked for.
START_SHARE = 0.2
# Step size for skews, of which each follows a gradient of its own.
SKEW_RATE = 1e-2
# Where the Gaussian leaves as much, couplings compete with couplings and skews: these have to be
# so many nats ahead after the trials of step sizes, and clearly so after as many steps more.
MUCH, AHEAD, FURTHER, RACE_STEPS = 0.3, 0.05, 0.2, 200
# With less time than this, it is better spent on training than on the search for a step size.
SEARCH_SECONDS = 30.0


class Run:
    """One restart."""

    def __init__(
        self, target: Target, settings: Settings, restart: int, name: str, guide: Guide | None
    ) -> None:
        self.target, self.settings, self.restart = target, settings, restart
        self.name, self.given = name, guide
        self.record = Record()
        self.interrupted = False
        self.best: Gaussian
        self.others: list[Gaussian] = []
        self._wide: Gaussian | None = None
        self.kept: Kept

    def go(self) -> None:
        """Start, train, check, and go on while the check fails; an interrupt keeps the best."""
        self.best, *self.others = self.settings.journal.once(
            "start",
            self.record,
            self._start,
            lambda found: [g.state() for g in found],
            lambda found: [self._gaussian(g) for g in found],
        )
        torch.manual_seed(self.seed(BUILD))
        self.kept = self._built()
        self.improve(self.kept, FIRST_SHARE if self.settings.escalate else 1.0)
        self.check(self.kept)

    def _start(self) -> list[Gaussian]:
        """The best Gaussian, and what became of other ways to one."""
        say, clock = self.record.log.append, self.settings.clock
        seen = look(self.target, self.seed(LOOK))
        say(str(seen))
        best, others, ends = best_gaussian(
            self.target,
            self.seed(BUILD),
            starts_flat(self.name) if self.given is None else self.given.flat,
            say,
            lambda: clock.over(START_SHARE),
            seen.median,
            seen.places,
        )
        seed, over = self.seed(MODES), lambda: clock.over(2 * START_SHARE)
        modes: list[Gaussian] = []
        with suppress(Interrupted), droppable():
            say(check_integrable(self.target, best))
            modes = further_modes(self.target, best, ends, seen.places, seed, say, over)
        return [best, *modes, *others]

    def _gaussian(self, state: Mapping[str, Any]) -> Gaussian:
        device = self.target.device
        loc, scale = state["loc"].to(device), state["scale_tril"].to(device)
        return Gaussian(**{**state, "loc": loc, "scale_tril": scale})

    def seed(self, place: int) -> int:
        """The seed of one of the places where this restart is random."""
        return stream(self.settings.seed, 1 + self.restart, place)

    def trainer(self, guide: Guide) -> Trainer:
        """What trains a guide on this restart's target."""
        return Trainer(self.target, guide, self.settings, self.restart, self.record)

    def placed(self, guide: Guide) -> Guide:
        """The guide in the precision and on the device of the target."""
        return guide.to(dtype=self.target.dtype, device=self.target.device)

    def improve(self, kept: Kept, share: float, name: str = "", draws: int = 1) -> None:
        """Train a guide for as many stages as pay, or for the number of steps asked for.

        Args:
            kept: The guide, changed in place.
            share: Share of the time budget at which training has to end.
            name: What to call the stages.
            draws: Times the usual number of draws of the first stage.
        """
        trainer = self.trainer(kept.guide)
        kept.judged = trainer.judge()
        self.interrupted = self.interrupted or self.settings.clock.interrupted
        if not trainer.trained or self.interrupted:
            return
        try:
            kept.lr = kept.lr or self.settings.lr or self._rate(trainer, kept)
            if self.settings.steps is None:
                self._stages(trainer, kept, share, name, draws)
            else:
                self._counted(trainer, kept)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                self.settings.clock.interrupt()
            elif interrupt.judged is not None:
                kept.judged = interrupt.judged
            self.interrupted = True
            self.record.log.append(f"interrupted after {len(self.record.rows)} steps")
        finally:
            trainer.gradients.fast.stop()
        if isinstance(kept.guide, MixtureGuide):
            self.record.log += overlap(kept.guide).complaints

    def check(self, kept: Kept) -> None:
        """Judge a guide by fresh draws, and by what the search for a start saw."""
        kept.missed = self._left_out(kept)
        try:
            with droppable():
                kept.diagnosis = self._diagnosed(kept)
        except Interrupted:
            self.record.log.append("check: interrupted")
            return
        except ValueError as error:
            self.record.log.append(f"check: {error}")
            return
        self.record.log.append(
            f"check: {kept.diagnosis.verdict}, k-hat {kept.diagnosis.khat:.2f}, "
            f"{kept.diagnosis.ess:.0f} of {kept.diagnosis.draws} draws effective"
            + (f"; {len(kept.missed)} modes left out" if kept.missed else "")
        )
        if self.settings.escalate and not kept.missed:
            kept.beyond = self._beyond(kept.guide, kept.diagnosis)
            self.record.log += [kept.beyond] if kept.beyond else []

    def _diagnosed(self, kept: Kept) -> Diagnosis:
        if kept.chains:
            return diagnose(kept.chains)
        return checked(
            self.target, [kept.guide], self.seed(CHECK), lambda: self.settings.clock.over(0.9)
        )

    def _left_out(self, kept: Kept) -> list[Gaussian]:
        modes = [g for g in self.others if math.isfinite(g.mass)]
        return left_out(self.target, kept.guide, kept.covered, modes, self.seed(COVER))

    def wide(self) -> Gaussian:
        """A normal for the target at a high temperature."""
        if self._wide is None:
            near = [self.best, *self.others]
            self._wide = wide_gaussian(self.target, near, self.seed(WIDE))
        return self._wide

    def _beyond(self, guide: Guide, diagnosis: Diagnosis) -> str:
        hopeless = self.target.subsampled or self.target.dim > MOST_DIM
        # Where there are several modes, one that is missed has to be known at any price.
        late = self.settings.clock.over(0.8) and not isinstance(guide, MixtureGuide)
        if hopeless or not math.isfinite(diagnosis.gap) or late:
            return ""
        try:
            with droppable():
                return found_beyond(self.target, diagnosis, self.wide(), self.seed(ANNEAL))
        except Interrupted:
            return ""
        except (ValueError, RuntimeError) as error:
            # It only looks for what may be missing.
            self.record.log.append(f"annealing from a wide start failed, {error}")
            return ""

    def _rate(self, trainer: Trainer, kept: Kept) -> float:
        if kept.name == "skewed" and not kept.sizes:
            return SKEW_RATE
        if not self._searches(kept.judged.gap):
            return RATES[1]
        lr = self._tried(trainer).lr
        kept.judged = trainer.judge()
        return lr

    def _searches(self, gap: float) -> bool:
        """Whether a step size is looked for; not where there is little to gain, or little time."""
        steps, clock = self.settings.steps, self.settings.clock
        few = steps is not None and steps < FEWEST_TO_SEARCH
        little = steps is None and gap < LITTLE
        return not few and not little and clock.left >= SEARCH_SECONDS

    def _counted(self, trainer: Trainer, kept: Kept) -> None:
        assert self.settings.steps is not None
        stage = Stage("training", 0, self.settings.steps, self.settings.repeats, kept.lr)
        kept.judged = trainer.run(stage)

    def _stages(self, trainer: Trainer, kept: Kept, share: float, name: str, draws: int) -> None:
        """Stages with ever more draws and smaller steps, as long as each removes enough."""
        for i in range(MOST_STAGES):
            if self.settings.clock.over(share) or self.record.stopped:
                return
            before, failures = kept.judged, len(self.record.failures)
            stage = Stage(
                f"{name} stage {i + 1}".strip(),
                FEW_STEPS if before.gap < LITTLE and i == 0 else STEADY_STEPS,
                None,
                self.settings.repeats * draws * 2**i,
                kept.lr / 2**i,
                share,
            )
            kept.judged = trainer.run(stage)
            gained = kept.judged.bound - before.bound
            left = kept.judged.gap if math.isfinite(kept.judged.gap) else math.inf
            enough = ENOUGH if kept.judged.khat < LIGHT else ENOUGH_HEAVY
            if len(self.record.failures) > failures:
                return
            if left <= enough or (i and gained < WORTH * (left + gained)):
                return
            if self.settings.escalate and self._left_out(kept):
                # No more steps bring the modes back that this guide leaves out.
                return

    def _built(self) -> Kept:
        """The guide, started at the best Gaussian, or at several if it has components."""
        guide = self.given
        if guide is not None:
            return self.settings.journal.once(
                "guide",
                self.record,
                lambda: self._started(_own(guide)),
                lambda kept: tensors_of(kept.guide),
                self._given,
            )
        if self.name != "auto":
            return self._started(Kept(make_guide(self.name, self.target.dim), self.name))
        name = "fullrank" if self.target.dim <= FULL_RANK_DIM else "lowrank"
        gaussian = self._started(Kept(make_guide(name, self.target.dim), name))
        gap = self.trainer(gaussian.guide).judge().gap
        self.record.log.append(f"the Gaussian leaves KL(q || p) of about {gap:.2g}")
        if gap < NOTHING_LEFT or self.settings.clock.interrupted:
            return gaussian
        if self.target.dim > HELD_DIM:
            return self.flow({}, "skewed")
        plain = self.flow({"depth": _depth(gap)})
        asked = self.settings.steps is not None or self.settings.lr is not None
        much = gap > MUCH and self._searches(gap)
        # Parameters of the model belong to the guide that they were trained with.
        alike = not self.target.subsampled and not list(self.target.parameters())
        return self._raced(plain) if much and alike and not asked else plain

    def _raced(self, plain: Kept) -> Kept:
        """Couplings, or couplings and skews, if those get clearly further in as many steps."""
        racers = (plain, self.flow(plain.sizes, "skewed"))
        try:
            trainers = [self.trainer(kept.guide) for kept in racers]
            found = [self._tried(trainer) for trainer in trainers]
            if found[1].bound > found[0].bound + AHEAD:
                pairs = zip(trainers, found, strict=True)
                found = [self._tried(trainer, trial.lr) for trainer, trial in pairs]
        except Interrupted:
            return plain
        best = found[1].bound > found[0].bound + FURTHER
        kept, trial = racers[best], found[best]
        kept.lr = trial.lr
        self.record.log.append(f"the guide is {kept.name}, by these trials")
        return kept

    def _tried(self, trainer: Trainer, lr: float | None = None) -> Trial:
        """The best of several step sizes, or where one of them leads from there."""

        def further(lr: float) -> Trial:
            bound = trainer.briefly(lr, RACE_STEPS)
            self.record.log.append(f"after {RACE_STEPS} more steps: {bound:.3f}")
            return Trial(lr, bound)

        return self.settings.journal.once(
            "rate",
            self.record,
            trainer.search if lr is None else lambda: further(lr),
            trainer.state,
            lambda state: Trial(*trainer.restore(state)),
        )

    def _given(self, tensors: Mapping[str, Tensor]) -> Kept:
        """The user's own guide, as it was when the fit began."""
        assert self.given is not None
        guide = self.placed(self.given)
        fill(guide, tensors, "The checkpoint")
        return _own(guide)

    def flow(self, sizes: dict[str, Any], name: str = "realnvp") -> Kept:
        """A fresh flow on top of the best Gaussian."""
        guide = make_guide(name, self.target.dim, **sizes)
        words = ", ".join(f"{key} {value}" for key, value in sizes.items())
        what = f"{name} ({words})" if words else name
        self.record.log.append(f"guide: {what} on top of the Gaussian")
        return self._started(Kept(guide, name, sizes))

    def _started(self, kept: Kept) -> Kept:
        kept.guide = guide = self.placed(kept.guide)
        guide.start(self.best.loc, self.best.scale_tril)
        if isinstance(guide, MixtureGuide):
            starts = distinct([self.best, *self.others], len(guide.components))
            whole = itertools.islice(itertools.cycle(starts), len(guide.components))
            guide.start_many([(g.loc, g.scale_tril) for g in whole])
            self.record.log.append(f"components started at {len(starts)} different places")
        return kept


def checked(
    target: Target, guides: Sequence[Guide], seed: int, over: Callable[[], bool]
) -> Diagnosis:
    """Judge guides by fresh draws, and by more of them where the first could be wrong.

    Args:
        target: The log density.
        guides: Independent fits to it.
        seed: Of the draws.
        over: Asked whether to make do with the first.
    """
    found = diagnose(draw(target, guides, CHECK_DRAWS, seed))
    if not found.near or over():
        return found
    return diagnose(draw(target, guides, AGAIN * CHECK_DRAWS, seed))


def _own(guide: Guide) -> Kept:
    """A guide of the user's own, with what it is built again from, where that is known."""
    if guide.spec is not None:
        return Kept(guide, guide.kind, guide.spec)
    return Kept(guide, type(guide).__name__)


def _depth(gap: float) -> int:
    """Couplings for what a Gaussian leaves over."""
    return 12 if gap > 1.0 else 8
