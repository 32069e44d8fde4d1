"""Samplers that are wrong in the libraries, put right."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Beta, LKJCholesky, Wishart


class FixedSamplers(Messenger):
    """Draw latent and simulated values by samplers that agree with their densities."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and not msg["done"]:
            inner = _inside(msg["fn"])
            if isinstance(inner, LKJCholesky):
                msg["value"], msg["done"] = sample_lkj(msg["fn"], inner), True
            elif isinstance(inner, Wishart):
                msg["value"], msg["done"] = sample_wishart(msg["fn"], inner), True


def sample_lkj(fn: Any, lkj: LKJCholesky) -> Tensor:
    r"""Draw from a distribution with an LKJ inside.

    Row i > 0 of the factor, with i numbers left of the diagonal, is a point on the sphere
    times the root of

    .. math:: y_i \sim \mathrm{Beta}\left(\tfrac{i}{2},\; \eta + \tfrac{d - 1 - i}{2}\right).

    Torch takes i - 1/2 for the first of these numbers, which is right for i = 1 alone.

    Args:
        fn: What is drawn from, such as correlation matrices of LKJ factors.
        lkj: The distribution of factors in it; left as it was.

    References:
        Lewandowski, Kurowicka and Joe (2009), doi:10.1016/j.jmva.2009.04.008, section 3.2.
    """
    before = lkj._beta
    above = torch.arange(lkj.dim).to(before.concentration0).sub(1).clamp_min(0)
    lkj._beta = Beta(0.5 * above + 0.5, before.concentration0, validate_args=False)
    try:
        drawn: Tensor = fn.sample()
    finally:
        lkj._beta = before
    return drawn


def sample_wishart(fn: Any, wishart: Wishart) -> Tensor:
    """Draw from a distribution with a Wishart inside, by Bartlett's decomposition.

    Torch warns of singular matrices, and draws again, where a matrix is not singular.

    Args:
        fn: What is drawn from.
        wishart: The distribution of matrices in it; left as it was.
    """
    vars(wishart)["rsample"] = wishart._bartlett_sampling
    try:
        drawn: Tensor = fn.sample()
    finally:
        del vars(wishart)["rsample"]
    return drawn


def _inside(fn: Any) -> LKJCholesky | Wishart | None:
    """The distribution of matrices that a distribution is made of."""
    while not isinstance(fn, LKJCholesky | Wishart):
        if "base_dist" not in vars(fn):
            return None
        fn = fn.base_dist
    return fn
