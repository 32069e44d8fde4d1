"""When a guide is good enough to end its training, or to need none."""

from __future__ import annotations

from collections.abc import Callable

from flowvi.guides.gaussian import FullRank, MeanField
from flowvi.guides.guide import Guide
from flowvi.training.records import Evaluation
from flowvi.training.schedule import Schedule


def is_enough(schedule: Schedule, found: Evaluation) -> bool:
    """Whether the gap is so small that more training brings nothing that a user would see.

    The heavier the tail of the weights, the less is known of the gap, and the smaller it has
    to be.
    """
    if found.khat < schedule.light:
        return found.gap <= schedule.enough
    heavy = not found.khat < schedule.heavy
    return found.gap <= (schedule.enough_beyond if heavy else schedule.enough_heavy)


def is_trained(guide: Guide) -> bool:
    """Whether a guide is the best of its kind where the search for a start has put it.

    The search maximises the ELBO of a Gaussian, of full rank or without correlations.
    """
    return isinstance(guide, FullRank | MeanField)


def needs_no_flow(schedule: Schedule, found: Evaluation, trusted: Callable[[], bool]) -> bool:
    """Whether plain draws of the initial Gaussian can be the result.

    Either its gap is negligible, or it is small, the weights have a light tail, and the verdict
    on fresh draws trusts them as they are.

    Args:
        schedule: The thresholds.
        found: Evaluation of the Gaussian.
        trusted: Whether the check trusts fresh draws.
    """
    if found.gap < schedule.nothing_left:
        return True
    return found.gap < schedule.spare and found.khat < schedule.light and trusted()
