"""Save and restore tables of draws that cannot be drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowvi.draws.draws import Draws
from flowvi.draws.sampling import tabulate
from flowvi.targets import Target


def to_state(draws: Draws) -> dict[str, Any]:
    """The columns from which the table can be evaluated again, as `write_state` takes them."""
    arrays = {"z": draws.z, "log_q": draws.log_q, **draws.stats}
    return {
        "arrays": {name: torch.as_tensor(array) for name, array in arrays.items()},
        "meta": draws.meta,
    }


def from_state(target: Target, state: Mapping[str, Any]) -> Draws:
    """Restore a table: evaluate the target at the saved draws."""
    arrays = dict(state["arrays"])
    z, log_q = arrays.pop("z"), arrays.pop("log_q")
    pieces = [[(a.to(target.device), b.to(target.device))] for a, b in zip(z, log_q, strict=True)]
    stats = {name: value.numpy() for name, value in arrays.items()}
    with torch.no_grad():
        return tabulate(target, z.shape[1], pieces, state["meta"], stats)
