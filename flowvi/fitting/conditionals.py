"""Fit the conditionals of units where a guide of the shared latents has its draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowvi.draws.structured import check_units
from flowvi.guides.guide import Guide
from flowvi.runtime.rng import isolated_rng
from flowvi.targets.structure import MarginalTarget
from flowvi.targets.structure.faults import faults
from flowvi.training.records import ADAPT

if TYPE_CHECKING:
    from flowvi.fitting.restart import Restart

# Values of the shared latents at which the conditionals of units are fitted and checked.
POINTS = 64


def adapt_conditionals(restart: Restart, target: MarginalTarget, guide: Guide) -> str:
    """Fit and check the conditionals of units.

    Args:
        restart: The restart, which saves the result in its checkpoint.
        target: The density of the shared latents; its conditionals are changed in place.
        guide: The guide of the shared latents.

    Returns:
        Sentences on the units that are not to be trusted; empty if there are none.
    """

    def work() -> str:
        with torch.no_grad(), isolated_rng(restart.seed(ADAPT)):
            theta, _ = guide.sample((POINTS,))
        target.adapt(theta, restart.seed(ADAPT), restart.record.log.append)
        units = check_units(target, theta, restart.seed(ADAPT))
        found = faults(target, theta, units.names)
        return " ".join(filter(None, [*found, units.reason]))

    def restored(state: Sequence[Any]) -> str:
        target.set_own_state(dict(state[1]))
        return str(state[0])

    return restart.session.checkpointer.run_once(
        "units",
        restart.record,
        work,
        lambda reason: [reason, [*target.own_state().items()]],
        restored,
    )
