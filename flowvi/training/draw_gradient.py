"""Bound and gradient over draws of a guide, for one process or several, compiled or eager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock
from flowvi.runtime.memory import ANY
from flowvi.runtime.rng import derive_seed, get_rng_state, isolated_rng, set_rng_state
from flowvi.targets import Target
from flowvi.training.compiling import Accelerator, Compile
from flowvi.training.evaluation import estimate
from flowvi.training.flat import Flat
from flowvi.training.gradient import Gradient, Say, trained
from flowvi.training.nonfinite import explain_nonfinite
from flowvi.training.settings import Settings


class DrawGradient(Gradient):
    """Estimates the bound from draws of the guide, and the gradient of minus the bound.

    Its argument is the number of independent estimates of the objective.

    Args:
        target: The log density.
        guide: The guide.
        settings: The user's settings.
        clock: Clock of the fit.
        say: Function that takes a line of the log.

    Attributes:
        log_density: The density that the guide is fitted to: the target or a tempered density.
        fast: The compiled gradient, once it is ready.
    """

    guide: Guide

    def __init__(
        self, target: Target, guide: Guide, settings: Settings, clock: Clock, say: Say
    ) -> None:
        super().__init__(target, guide, clock)
        self.settings = settings
        self.log_density: LogDensity = target.log_prob
        self.say = say
        # Steps use this copy; reported bounds are those of the guide itself.
        single = guide.mixed_precision_copy()
        alike = single and len(trained(single, target)) == len(self.trained)
        self._worker = single if single and alike else guide
        self.fast = self._accelerator(_compiled(settings, target))
        self._before = get_rng_state()
        self._repeats = 1

    @property
    def whole(self) -> Tensor | None:
        return self.fast.whole

    def _accelerator(self, compile: Compile) -> Accelerator:
        modules = [self._worker, self.target]
        return Accelerator(modules, self.trained, self._bound, self._unit, compile, self.say)

    def in_double(self) -> None:
        if self._worker is self.guide:
            return
        self.say("the next steps are in double precision")
        self._worker, before = self.guide, self.fast
        before.stop()
        self.fast = self._accelerator(compile=False)
        self.fast.whole = before.whole

    def __call__(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Bound and the gradient of minus the bound, over the draws of all processes."""
        self._before, self._repeats = get_rng_state(), repeats
        if self.target.stochastic and distributed.size() > 1:
            bound, flat = self._with_own_noise(repeats)
        else:
            bound, flat = self._with_one_noise(repeats)
        return self.averaged(bound, flat, None if self._worker is self.guide else torch.float32)

    def _with_one_noise(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Each process takes its part of one random stream, and skips the other parts."""
        objective = self.settings.objective
        for process in range(distributed.size()):
            rows = self._rows()
            if process == distributed.rank():
                bound, flat = self._whole(repeats, rows)
            elif isinstance(objective, Renyi):
                for part in self.parts(repeats):
                    self._worker.advance_rng((objective.particles, part))
        return bound, flat

    def _with_own_noise(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Each process has a stream of its own, for a density that draws random numbers too."""
        seed = int(torch.randint(2**62, ()))
        with isolated_rng(derive_seed(seed, distributed.rank())):
            return self._whole(repeats, self._rows())

    def _whole(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound and gradient over all draws, in one part if they fit in memory."""
        plain = self.log_density == self.target.log_prob
        parts, total = self.parts(repeats), None
        for part in parts:
            compiled = plain and self.fast.takes(part)
            found = (self.fast.gradient if compiled else self.fast.eager)(part, rows)
            total = found if total is None else (total[0] + found[0], total[1] + found[1])
        assert total is not None
        return total if len(parts) == 1 else (total[0] / len(parts), total[1] / len(parts))

    def parts(self, repeats: int) -> list[int]:
        """Split the estimates into parts of equal size that fit in memory."""
        return [repeats] if repeats <= self._fits else [self._unit] * (repeats // self._unit)

    @cached_property
    def _fits(self) -> int:
        """Number of estimates that fit in memory; unlimited for objectives other than `Renyi`."""
        if not isinstance(self.settings.objective, Renyi):
            return ANY
        return max(1, self.target.at_once() // self.settings.objective.particles)

    @cached_property
    def _unit(self) -> int:
        """Largest number of estimates that fits and divides those of every stage."""
        all_of_them = self.settings.repeats
        return max(n for n in range(1, all_of_them + 1) if all_of_them % n == 0 and n <= self._fits)

    def _bound(self, repeats: int, rows: Sequence[Tensor]) -> Tensor:
        batch = dict(zip(self.target.subsampled, rows, strict=True))

        def log_p(z: Tensor) -> Tensor:
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        return estimate(self.settings.objective, log_p, self._worker, repeats).bound.mean()

    def _rows(self) -> list[Tensor]:
        """Sample rows of every subsampled plate."""
        return [
            torch.randperm(size, device=self.target.device)[:batch]
            for size, batch in self.target.subsampled.values()
        ]

    def in_parts(self, z: Tensor) -> Tensor:
        """The log density for comparisons of guides, in parts that fit in memory."""
        plain = self.log_density == self.target.log_prob
        density = self.target.compared if plain else self.log_density
        parts = z.reshape(-1, z.shape[-1]).split(self.target.chunk())
        return torch.cat([density(part) for part in parts]).reshape(z.shape[:-1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold all parameters in one vector within the context, for one optimiser call a step."""
        try:
            flat = Flat(self.trained, gradients=False)
        except ValueError:  # several devices
            yield
            return
        self.fast.whole = flat.vector.detach()
        try:
            yield
        finally:
            self.fast.whole = None
            flat.release()

    def consider(self, seconds: float) -> None:
        """Compile the gradient if enough seconds of training remain."""
        # Example rows, taken without random numbers.
        rows = [
            torch.arange(batch, device=self.target.device)
            for _, batch in self.target.subsampled.values()
        ]
        self.fast.consider(seconds, rows, self.clock.interrupted_here)

    def explain_nonfinite(self) -> str:
        """Evaluate the last step again, and describe which value was not finite."""
        after, seen = get_rng_state(), []
        set_rng_state(self._before)
        batch = dict(zip(self.target.subsampled, self._rows(), strict=True)) or None

        def log_p(z: Tensor) -> Tensor:
            seen.append(z)
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        for part in self.parts(self._repeats):
            bound = estimate(self.settings.objective, log_p, self.guide, part).bound.mean()
            if not bound.isfinite():
                break
        words = explain_nonfinite(self.target, self.guide, bound, seen[-1], batch)
        set_rng_state(after)
        return words


def _compiled(settings: Settings, target: Target) -> Compile:
    """Resolve "auto" to False for several processes, which would all compile the same graph."""
    if not isinstance(settings.objective, Renyi) or target.stochastic:
        return False
    return False if distributed.size() > 1 and settings.compile == "auto" else settings.compile
