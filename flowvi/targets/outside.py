"""Why the density is zero, or not a number, at some draws: the site and the parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowvi.targets import Target

# Largest numbers of sites with values in a message, and of draws that are tested.
SHOWN, TRIED = 3, 5


def explain_zero_density(target: Target, z: Tensor, good: Tensor) -> str:
    """Sentence on the first draws of zero density whose cause is found; empty without any.

    Args:
        target: The log density.
        z: Draws of density zero, (N, D).
        good: Draws of positive density, (M, D).
    """
    with torch.no_grad():
        for point in z[:TRIED]:
            site, words = target.violation(point)
            words = words or _unlikely(target, point)
            latents = repairing_sites(target, point, good[:1])
            if not words and not latents:
                continue
            cause = f"At {values(target, point)}, {words or 'the density is zero'}."
            if not latents:
                return cause
            names = " or ".join(f"'{name}'" for name in latents)
            if not site:
                return f"{cause} Of the latents, moving {names} alone makes it positive."
            return (
                f"{cause} That is because of {names}: give it a prior on values that suit, such as "
                "a LogNormal, or transform it in the model, by exp, softplus or sigmoid."
            )
    return ""


def _unlikely(target: Target, z: Tensor) -> str:
    name = observed(target, z)
    return f"the likelihood of site '{name}' is zero or not a number" if name else ""


def observed(target: Target, z: Tensor) -> str:
    """The first observed site whose log likelihood is not finite at a point (D); empty without."""
    found = target.log_likelihood(z)
    return next((name for name, value in found.items() if not value.isfinite().all()), "")


def repairing_sites(
    target: Target, z: Tensor, good: Tensor, batch: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Latent sites each of which, moved alone, makes the density at a point positive.

    Args:
        target: The log density.
        z: The point, (D).
        good: Where to move it, (1, D); zero where there is none, (0, D).
        batch: Rows of subsampled plates.
    """
    found = []
    for name, columns in target.slices.items():
        moved = z.clone()[None]
        moved[:, columns] = good[:, columns] if len(good) else 0.0
        if target.log_prob(moved, batch).isfinite().all():
            found.append(name)
    return found


def values(target: Target, z: Tensor) -> str:
    """The values of the first sites at a point (D), in words."""
    with torch.no_grad():
        found = target.constrain(z.detach())
    shown = [f"{name} = {_short(found[name])}" for name in list(target.sites)[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(target.sites) > SHOWN else "")


def _short(value: Tensor) -> str:
    flat = [f"{v:.3g}" for v in value.flatten()[:SHOWN].tolist()]
    more = ", ..." if value.numel() > SHOWN else ""
    return flat[0] if value.dim() == 0 else f"[{', '.join(flat)}{more}]"
