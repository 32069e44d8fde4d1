"""How far the components of a mixture have collapsed onto each other."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from flowvi.guides.mixtures import MixtureGuide

# Components with a larger overlap count as one; a component with less weight counts as unused.
SAME = 0.9
UNUSED = 0.01


@dataclass(frozen=True, eq=False)
class Overlap:
    """Weights of the components of a mixture, and their overlap.

    Attributes:
        weights: Weight of each component, (M), averaged over the rows of the context.
        coefficient: Bhattacharyya coefficient of each pair, (M, M): 0 for
            components that nowhere meet, 1 for equal ones.
        error: Standard errors of the coefficients, (M, M).
    """

    weights: np.ndarray
    coefficient: np.ndarray
    error: np.ndarray

    @property
    def collapsed(self) -> list[tuple[int, int]]:
        """Pairs of components that are nearly the same."""
        pairs = combinations(range(len(self.weights)), 2)
        return [(i, j) for i, j in pairs if self.coefficient[i, j] > SAME]

    @property
    def unused(self) -> list[int]:
        """Components with almost no weight."""
        return [int(m) for m in np.flatnonzero(self.weights < UNUSED)]

    def __str__(self) -> str:
        lines = ["component  weight  overlap with the others"]
        for m, weight in enumerate(self.weights):
            others = (f"{n}: {c:.2f}" for n, c in enumerate(self.coefficient[m]) if n != m)
            lines.append(f"{m:9d}  {weight:6.3f}  {', '.join(others)}".rstrip())
        return "\n".join([*lines, *self.complaints])

    @property
    def complaints(self) -> list[str]:
        """A sentence for each pair that has collapsed, and each component without weight."""
        same = [
            f"Components {i} and {j} have collapsed onto each other: use one fewer, or "
            "start them at different modes."
            for i, j in self.collapsed
        ]
        return same + [f"Component {m} has almost no weight: use one fewer." for m in self.unused]


@torch.no_grad()
def overlap(guide: MixtureGuide, n: int = 1000, context: Tensor | None = None) -> Overlap:
    r"""Compare the components of a mixture, pair by pair.

    The Bhattacharyya coefficient is estimated from draws of both components,
    half and half, by

    .. math:: \int \sqrt{q_i q_j} = E_{(q_i + q_j) / 2}\,
        \Big[ \frac{1}{\cosh(\frac{1}{2} \log(q_i / q_j))} \Big].

    Args:
        guide: The mixture.
        n: Number of draws from each component.
        context: What the guide is conditioned on, (*B, C); averaged over rows.
    """
    # Log densities (M, M, n * rows) of component i at the draws of component m.
    scores = guide.log_component_densities(guide.stratified_sample((n,), context).z, context)
    parts = len(scores)
    scores = scores.reshape(parts, parts, -1)
    coefficient, error = np.eye(parts), np.zeros((parts, parts))
    for i, j in combinations(range(parts), 2):
        # One value for each pair of draws, one draw from each component.
        shared = 1 / torch.cosh((scores[i, [i, j]] - scores[j, [i, j]]) / 2)
        pairs = shared.mean(0)
        coefficient[i, j] = coefficient[j, i] = pairs.mean()
        error[i, j] = error[j, i] = pairs.std() / pairs.numel() ** 0.5
    weights = guide.log_weights(context).exp().reshape(-1, parts).mean(0)
    return Overlap(weights.cpu().double().numpy(), coefficient, error)
