"""Count what a fit evaluates: steps, and points at which the density and the guide were asked.

Counts do not depend on the machine or on what else runs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from flowvi.guides.guide import Guide
from flowvi.targets.global_target import GlobalTarget
from flowvi.training.trainer import Trainer

# Methods of guides that evaluate them, and where the points are: a shape, or a tensor.
SAMPLES, SCORES = ("sample", "sample_with_score", "stratified_sample"), ("log_prob",)


@dataclass
class Counts:
    """What a fit has evaluated.

    Attributes:
        steps: Steps of Adam, those of trials included.
        calls: Calls of the log density, each for many points.
        points: Points at which the log density was evaluated.
        flow_calls: Calls that sample or score a guide.
        flow_points: Points that these sampled or scored.
    """

    steps: int = 0
    calls: int = 0
    points: int = 0
    flow_calls: int = 0
    flow_points: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count inside the block, for fits in this process with compile=False."""
    counts, within = Counts(), [0]

    def density(original: Callable[..., Any]) -> Callable[..., Any]:
        def log_prob(self: GlobalTarget, z: Tensor, *rest: Any, **named: Any) -> Any:
            counts.calls += 1
            counts.points += z.numel() // max(1, z.shape[-1])
            return original(self, z, *rest, **named)

        return log_prob

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def _step(self: Trainer, *rest: Any) -> Any:
            counts.steps += 1
            return original(self, *rest)

        return _step

    def guide(original: Callable[..., Any], shaped: bool) -> Callable[..., Any]:
        def method(self: Guide, first: Any, *rest: Any, **named: Any) -> Any:
            if not within[0]:  # a guide may ask those that it is made of
                size = math.prod(first) if shaped else first.numel() // max(1, first.shape[-1])
                counts.flow_calls += 1
                counts.flow_points += size
            within[0] += 1
            try:
                return original(self, first, *rest, **named)
            finally:
                within[0] -= 1

        return method

    with ExitStack() as stack:

        def put(owner: type, name: str, new: Callable[..., Any]) -> None:
            stack.enter_context(patch.object(owner, name, new))

        put(GlobalTarget, "log_prob", density(GlobalTarget.log_prob))
        put(Trainer, "_step", step(Trainer._step))
        for owner in _kinds(Guide):
            for name in (*SAMPLES, *SCORES):
                if name in vars(owner):
                    put(owner, name, guide(vars(owner)[name], name in SAMPLES))
        yield counts


def _kinds(owner: type) -> list[type]:
    """A class and all classes made from it."""
    found, subclasses = [owner], list[type](owner.__subclasses__())
    for below in subclasses:
        found += [kind for kind in _kinds(below) if kind not in found]
    return found
