"""The bound of a step and its gradient: of one process or many, compiled or not, in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import distributed
from flowvi.runtime.memory import ANY
from flowvi.runtime.rng import random_state, set_random_state
from flowvi.targets import Target
from flowvi.training.compiling import Accelerator, Compile
from flowvi.training.evaluation import estimate
from flowvi.training.flat import Finest, Flat
from flowvi.training.nonfinite import blamed
from flowvi.training.settings import Settings


class Gradients:
    """Bounds on fresh draws, and the gradient of minus the bound.

    Args:
        target: The log density.
        guide: The guide.
        settings: What the user asked for.
        say: Takes a sentence about what is compiled.

    Attributes:
        log_density: What the guide is fitted to; a density of another temperature can take the
            target's place.
        fast: The compiled gradient, once there is one.
        trained: Parameters of the guide and the target's own, in the order of the gradient and
            in the finest precision among them; see `follow`.
        answer: What the callback of this process said to the last step, for the others to hear.
        stopped: Whether that of the first process has said to stop, as the last step told.
    """

    def __init__(
        self, target: Target, guide: Guide, settings: Settings, say: Callable[[str], None]
    ) -> None:
        self.target, self.guide, self.settings = target, guide, settings
        self.log_density: LogDensity = target.log_prob
        self._finest = Finest(_trained(guide, target))
        self.trained = self._finest.tensors
        self.say = say
        # Every step is taken in it; bounds that are reported are of the guide itself.
        single = guide.in_single()
        alike = single and len(_trained(single, target)) == len(self.trained)
        self._worker = single if single and alike else guide
        self.fast = self._accelerator(_compiled(settings))
        self._before = random_state()
        self.answer = self.stopped = False

    def _accelerator(self, compile: Compile) -> Accelerator:
        modules = [self._worker, self.target]
        return Accelerator(modules, self.trained, self._bound, self._unit, compile, self.say)

    def follow(self) -> None:
        """Give parameters of a coarser precision the values of `trained`, which stand for them."""
        self._finest.follow()

    def in_double(self) -> None:
        """Do everything in the precision of the guide from now on."""
        if self._worker is self.guide:
            return
        self.say("from here in double precision")
        self._worker, before = self.guide, self.fast
        before.stop()
        self.fast = self._accelerator(compile=False)
        self.fast.whole = before.whole

    def __call__(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Bound and the gradient of minus it; of the draws of all processes, where they are many.

        Each skips the random numbers of the others.
        """
        self._before = random_state()
        objective = self.settings.objective
        for process in range(distributed.size()):
            rows = self._rows()
            if process == distributed.rank():
                bound, flat = self._whole(repeats, rows)
            elif isinstance(objective, Renyi):
                for part in self.parts(repeats):
                    self._worker.skip((objective.particles, part))
        single = None if self._worker is self.guide else torch.float32
        told = *self.settings.clock.told(), self.answer
        bound, flat, heard = distributed.averaged(bound, flat, told, single)
        if distributed.size() > 1:
            self.settings.clock.hear(*heard[:2])
            self.stopped = bool(heard[2])
        return bound, flat

    def _whole(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound and gradient of all draws, in one part if it fits memory."""
        plain = self.log_density == self.target.log_prob
        parts, total = self.parts(repeats), None
        for part in parts:
            compiled = plain and self.fast.takes(part)
            found = (self.fast.gradient if compiled else self.fast.eager)(part, rows)
            total = found if total is None else (total[0] + found[0], total[1] + found[1])
        assert total is not None
        return total if len(parts) == 1 else (total[0] / len(parts), total[1] / len(parts))

    def parts(self, repeats: int) -> list[int]:
        """How many estimates to take after each other, of equal numbers."""
        return [repeats] if repeats <= self._fits else [self._unit] * (repeats // self._unit)

    @cached_property
    def _fits(self) -> int:
        """Estimates whose draws fit memory; other objectives bring draws of their own."""
        if not isinstance(self.settings.objective, Renyi):
            return ANY
        return max(1, self.target.at_once() // self.settings.objective.particles)

    @cached_property
    def _unit(self) -> int:
        """The largest number of estimates that fits and divides those of every stage."""
        all_of_them = self.settings.repeats
        return max(n for n in range(1, all_of_them + 1) if all_of_them % n == 0 and n <= self._fits)

    def _bound(self, repeats: int, rows: Sequence[Tensor]) -> Tensor:
        batch = dict(zip(self.target.subsampled, rows, strict=True))

        def log_p(z: Tensor) -> Tensor:
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        return estimate(self.settings.objective, log_p, self._worker, repeats).bound.mean()

    def _rows(self) -> list[Tensor]:
        """Random rows of every subsampled plate."""
        return [
            torch.randperm(size, device=self.target.device)[:batch]
            for size, batch in self.target.subsampled.values()
        ]

    def in_parts(self, z: Tensor) -> Tensor:
        """The log density of many points, in parts that fit memory. (*S, D) -> (*S)."""
        parts = z.reshape(-1, z.shape[-1]).split(self.target.chunk())
        return torch.cat([self.log_density(part) for part in parts]).reshape(z.shape[:-1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all parameters in one vector meanwhile, which takes one call of the optimiser."""
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
        """Compile the gradient if steps of so many seconds are ahead."""
        # Rows that take no random numbers.
        rows = [
            torch.arange(batch, device=self.target.device)
            for _, batch in self.target.subsampled.values()
        ]
        self.fast.consider(seconds, rows, self.settings.clock.asked_alone)

    def blamed(self, repeats: int) -> str:
        """What was not finite in the step before, which is evaluated again."""
        after, seen = random_state(), []
        set_random_state(self._before)
        batch = dict(zip(self.target.subsampled, self._rows(), strict=True)) or None

        def log_p(z: Tensor) -> Tensor:
            seen.append(z)
            return self.target.log_prob(z, batch) if batch else self.log_density(z)

        for part in self.parts(repeats):
            bound = estimate(self.settings.objective, log_p, self.guide, part).bound.mean()
            if not bound.isfinite():
                break
        words = blamed(self.target, self.guide, bound, seen[-1], batch)
        set_random_state(after)
        return words


def _trained(*modules: nn.Module) -> list[Tensor]:
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def _compiled(settings: Settings) -> Compile:
    """Several processes would compile the same on processors that they need."""
    if not isinstance(settings.objective, Renyi):
        return False
    return False if distributed.size() > 1 and settings.compile == "auto" else settings.compile
