"""The check of a fit: the verdict on fresh draws of its guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowvi.diagnostics import Diagnosis
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import draw
from flowvi.draws.structured import structured_draws, theta_draws
from flowvi.fitting.result import draw_nested
from flowvi.guides.guide import Guide
from flowvi.objectives.nested import NestedTarget
from flowvi.targets import Target
from flowvi.targets.structure import MarginalTarget
from flowvi.training.schedule import Schedule


def diagnose_fresh_draws(
    target: Target,
    guides: Sequence[Guide],
    seed: int,
    over: Callable[[], bool],
    schedule: Schedule,
    keep: Callable[[Draws], object] = lambda draws: None,
) -> Diagnosis:
    """Diagnose fresh draws of guides; take more draws if the first result is uncertain.

    Args:
        target: The log density.
        guides: Independent fits to it.
        seed: Seed of the draws.
        over: Function that returns whether to keep the first result.
        schedule: The schedule with the numbers of draws.
        keep: Function that takes the first draws.
    """

    def drawn(n: int) -> Draws:
        if isinstance(target, NestedTarget):
            return draw_nested(target, guides[0], n, None, seed, {})
        if isinstance(target, MarginalTarget) and not target.dim:
            # Without shared latents, the moments of the local ones are all there is to judge.
            return structured_draws(target, guides, n, seed)
        if isinstance(target, MarginalTarget):
            return theta_draws(target, guides, n, seed)
        return draw(target, guides, n, seed)

    first = drawn(schedule.check_draws)
    keep(first)
    found = diagnose(first)
    # The same number of draws would be the same draws.
    if not found.near or schedule.again == 1 or over():
        return found
    return diagnose(drawn(schedule.again * schedule.check_draws))
