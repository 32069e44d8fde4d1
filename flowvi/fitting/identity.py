"""What a fit is of, in words and numbers that another process can compare."""

from __future__ import annotations

from typing import Any

import torch

from flowvi.guides.guide import Guide
from flowvi.targets import LocalTarget, Target

PROBES = 3


def latents(target: Target | LocalTarget) -> dict[str, Any]:
    """Name, shape, support and columns of each latent site, as JSON has them."""
    return {
        name: {
            "shape": list(site.shape),
            "support": repr(site.support),
            "columns": [target.slices[name].start, target.slices[name].stop],
        }
        for name, site in target.sites.items()
    }


def log_density(target: Target) -> list[float]:
    """The log density at a few fixed points, which another model or other data would change.

    Empty where the target has parameters of its own, which may start anywhere.
    """
    if list(target.parameters()):
        return []
    grid = torch.arange(PROBES * target.dim, dtype=target.dtype, device=target.device)
    points = 0.5 * torch.sin(grid.reshape(PROBES, target.dim) + 1)
    with torch.no_grad():
        found: list[float] = target.log_prob(points).double().tolist()
    return found


def guide_words(guide: str | Guide) -> Any:
    """The name of a guide, or the class and the shapes of one of the user's own."""
    if isinstance(guide, str):
        return guide
    shapes = {name: list(value.shape) for name, value in guide.state_dict().items()}
    return {"class": type(guide).__name__, "tensors": shapes}
