"""The start of a network: the linear regression of the latents on what its encoder reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.amortized.encoders import Encoder, Residual
from flowvi.amortized.problem import Simulated
from flowvi.flows.nets import ContextParameter

# Rounds of the regressions, and their penalty.
ROUNDS, RIDGE = 3, 1e-3
# Minus the mean of log |x| for a standard normal x.
LOG_NORMAL = 0.635
# Standard deviations beyond which latents are clipped, and limits of log scales.
FAR, LOG_SCALES = 8.0, (-6.0, 2.0)


@torch.no_grad()
def start_at_regression(network: Any, encoder: Encoder, pairs: Simulated) -> bool:
    r"""Let a network begin at a normal whose mean and log scale are linear in what is read.

    With r what the encoder reads and does not learn,

    .. math:: q(z \mid y) = N\!\left(A r + a, \operatorname{diag} e^{2 (B r + b)}\right),

    A by weighted ridge regression of the latents, B by that of the logarithms of its absolute
    residuals, in turn. The first 2 D numbers of the context are these predictions, and the affine
    layer of the guide takes them as they are. It is left out where it is no better.

    Args:
        network: The network; a fresh one, changed in place.
        encoder: Its encoder.
        pairs: Simulated latents and data.

    Returns:
        Whether the network begins there.
    """
    d, net = network.guide.dim, getattr(encoder, "net", None)
    params = getattr(getattr(network.guide, "affine", None), "params", None)
    if not isinstance(net, Residual) or not isinstance(params, ContextParameter):
        return False
    weight = params.weight
    if weight is None or encoder.size < 2 * d or weight.shape[0] != 2 * d:
        return False
    groups = _groups(encoder, pairs)
    before = network.log_prob(*groups).double().mean()
    read = [encoder.parts(group.data) for group in groups]
    x = torch.cat([torch.cat([part for part, _ in parts], -1) for parts in read]).double()
    known = torch.cat([torch.full((part.shape[-1],), not learnt) for part, learnt in read[0]])
    known = known.to(x.device)
    z = torch.cat([network.unit(group.z) for group in groups]).double().clamp(-FAR, FAR)
    slopes, levels = _regressions(x[:, known], z)
    held = net.line.weight[: 2 * d].clone()
    net.line.weight[: 2 * d] = 0.0
    net.line.weight[: 2 * d, known] = slopes.T.to(held)
    net.last.bias[: 2 * d] = levels.to(held)
    weight[: 2 * d, : 2 * d] = torch.eye(2 * d).to(weight)
    if bool(network.log_prob(*groups).double().mean() > before):
        return True
    net.line.weight[: 2 * d], net.last.bias[: 2 * d] = held, 0.0
    weight.zero_()
    return False


def _groups(encoder: Encoder, pairs: Simulated) -> list[Simulated]:
    """Data sets of several numbers of rows, where the encoder reads rows."""
    if not encoder.by_row:
        return [pairs]
    most = pairs.data[encoder.by_row[0]].shape[1]
    sizes = [max(1, most * k // 4) for k in (1, 2, 3, 4)]
    return [
        pairs.part(slice(i, None, len(sizes)), rows, encoder.by_row) for i, rows in enumerate(sizes)
    ]


def _regressions(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes (R, 2 D) and levels (2 D) of means and log scales."""
    log_scale = torch.zeros_like(z)
    even = torch.ones_like(z)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS):
        slope, level = _ridge(x, z, (-2 * log_scale).exp())
        size = (z - x @ slope - level).abs().clamp(min=1e-4).log() + LOG_NORMAL
        log_slope, log_level = _ridge(x, size, even)
        log_scale = (x @ log_slope + log_level).clamp(*LOG_SCALES)
        found = [(slope, level), (log_slope, log_level)]
    return torch.cat([s for s, _ in found], 1), torch.cat([level for _, level in found])


def _ridge(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression of each column of y: slopes (R, D) and levels (D)."""
    scale, center = x.std(0).clamp(min=1e-6), x.mean(0)
    u = torch.cat([(x - center) / scale, torch.ones_like(x[:, :1])], -1)
    penalty = RIDGE * torch.eye(u.shape[1]).to(u)
    penalty[-1, -1] = 0.0
    found = []
    for w, column in zip(weights.T, y.T, strict=True):
        weighted = u * (w / w.mean())[:, None]
        gram = weighted.T @ u / len(u)
        found.append(torch.linalg.solve(gram + penalty, weighted.T @ column / len(u)))
    both = torch.stack(found, -1)
    slope = both[:-1] / scale[:, None]
    return slope, both[-1] - center @ slope
