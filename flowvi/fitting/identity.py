"""The identity of a fit, as strings and numbers that another process can compare."""

from __future__ import annotations

from typing import Any

import torch

from flowvi.guides.guide import Guide
from flowvi.targets import LocalTarget, Target

PROBES = 3


def latents(target: Target | LocalTarget) -> dict[str, Any]:
    """Name, shape, support and columns of each latent site, in the form of JSON."""
    return {
        name: {
            "shape": list(site.shape),
            "support": repr(site.support),
            "columns": [target.slices[name].start, target.slices[name].stop],
        }
        for name, site in target.sites.items()
    }


def log_density(target: Target) -> list[float]:
    """The log density at a few fixed points, which depends on the model and the data.

    Empty for a target with parameters of its own, whose initial values may differ.
    """
    if list(target.parameters()):
        return []
    grid = torch.arange(PROBES * target.dim, dtype=target.dtype, device=target.device)
    points = 0.5 * torch.sin(grid.reshape(PROBES, target.dim) + 1)
    with torch.no_grad():
        found: list[float] = target.log_prob(points).double().tolist()
    return found


def guide_words(guide: str | Guide) -> Any:
    """The name of a guide, or the class and the parameter shapes of a user's guide."""
    if isinstance(guide, str):
        return guide
    shapes = {name: list(value.shape) for name, value in guide.state_dict().items()}
    return {"class": type(guide).__name__, "tensors": shapes}
