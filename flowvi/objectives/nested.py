"""A bound over global latents that contains bounds of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowvi.guides.amortized import Amortised, SharedAmortised
from flowvi.objectives.renyi_bound import Renyi
from flowvi.targets import Batch, LocalTarget


class Nested(nn.Module):
    r"""A log density over theta whose likelihood is itself a bound over the latents of rows.

    .. math::
        \log p(\theta) + \frac{N}{B} \sum_{n \in B} L_K(x_n \mid \theta), \qquad
        L_K = \log \frac{1}{K} \sum_k \frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n, \theta)}

    Each L_K is below :math:`\log p(x_n \mid \theta)` in expectation, and the scale N / B stands
    outside of it: an ELBO over theta of this is a lower bound on the evidence, and unbiased
    under minibatches.

    Args:
        target: A model with local latents and latents that all rows share.
        inner: The guide of a row; its context is that of the row, then theta where
            `sees_theta`.
        sees_theta: Whether the inner guide is q(z | x, theta) or q(z | x).
    """

    def __init__(self, target: LocalTarget, inner: Amortised, sees_theta: bool) -> None:
        super().__init__()
        self.target, self.inner, self.sees_theta = target, inner, sees_theta

    def rows(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """Bounds on the log likelihood of rows. (T, G) -> (T, B).

        Args:
            theta: Unconstrained values of the shared latents.
            batch: The rows.
            bound: Over the latents of a row.
        """
        seen = self.inner.context(batch)
        context = seen.expand(len(theta), *seen.shape)
        if self.sees_theta and isinstance(self.inner, SharedAmortised):
            context = self.inner.given(seen, theta)
        elif self.sees_theta:
            shared = theta.to(seen.dtype).unsqueeze(1).expand(*context.shape[:-1], -1)
            context = torch.cat([context, shared], -1)

        def log_p(z: Tensor) -> Tensor:
            return self.target.log_prob(z, batch, theta)

        return bound(log_p, self.inner.guide, context).bound

    def log_prob(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """An estimate of the density from some rows. (T, G) -> (T)."""
        assert self.target.shared is not None
        # N / B multiplies the bounds, not the weights in them.
        scale = self.target.rows / len(batch.places)
        rows = self.rows(theta, batch, bound).to(theta.dtype).sum(-1)
        return self.target.shared.log_prob(theta) + scale * rows
