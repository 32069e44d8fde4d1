"""Whether a data set lies where the simulated ones do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Smallest eigenvalue that counts, as a share of the largest.
LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Unlike:
    """How far a data set is from the simulated ones.

    Attributes:
        distance: Its Mahalanobis distance.
        p: Share of simulated data sets that are as far, with the data set itself among them.
        simulated: Number of simulated data sets.
        largest: Largest distance among them.
    """

    distance: float
    p: float
    simulated: int
    largest: float

    @property
    def beyond(self) -> bool:
        """Whether it is farther than all simulated data sets."""
        return not self.distance <= self.largest

    @property
    def reason(self) -> str:
        """The sentence of the verdict; empty unless it is farther than all."""
        if not self.beyond:
            return ""
        return (
            f"This data set is unlike all {self.simulated} simulated ones: its distance from their "
            f"centre is {self.distance:.3g}, and the largest of theirs {self.largest:.3g}. The "
            "guide was not trained for it: fit the model to it (guide.fit(data)), and ask whether "
            "the prior allows such data."
        )


class Novelty(nn.Module):
    r"""Mahalanobis distance of what an encoder reads, calibrated on held-out simulations.

    .. math:: d(r)^2 = (r - \bar r)^\top \Sigma^{-1} (r - \bar r)

    in the space of principal components. Mean and covariance are those of one half of the
    simulated data sets; distances of the other half say how large d is for the model.

    Args:
        width: Number of numbers that are compared.
        simulated: Number of distances.

    References:
        Schmitt, Buerkner, Koethe and Radev (2023), arXiv:2112.08866: summaries of data sets tell
        whether a model was misspecified for the amortised posterior.
    """

    mean: Tensor
    whiten: Tensor
    distances: Tensor

    def __init__(self, width: int, simulated: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("whiten", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("distances", torch.zeros(simulated, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, reference: Tensor, held_out: Tensor) -> Novelty:
        """Take mean and covariance of some data sets (n, R), and distances of others (m, R)."""
        r = reference.double()
        self.mean.copy_(r.mean(0))
        covariance = torch.atleast_2d(torch.cov(r.T))
        values, vectors = torch.linalg.eigh(covariance)
        keep = values > LEAST_SHARE * values[-1].clamp(min=1e-300)
        self.whiten.zero_()
        self.whiten[:, keep] = vectors[:, keep] * values[keep].rsqrt()
        # Off the directions of simulated data sets, any step is a large one.
        floor = (LEAST_SHARE * values[-1].clamp(min=1e-300)).sqrt()
        self.whiten[:, ~keep] = vectors[:, ~keep] / floor
        self.distances.copy_(self.distance(held_out).sort().values)
        return self

    @torch.no_grad()
    def distance(self, read: Tensor) -> Tensor:
        """Distances of data sets, (n, R) -> (n)."""
        return ((read.double() - self.mean) @ self.whiten).norm(dim=-1)

    def judge(self, read: Tensor) -> Unlike:
        """How far one data set is, (R)."""
        d = float(self.distance(read))
        farther = int((self.distances >= d).sum()) if d == d else 0
        count = len(self.distances)
        return Unlike(d, (1 + farther) / (1 + count), count, float(self.distances[-1]))
