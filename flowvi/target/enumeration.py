"""Discrete latents, summed out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from flowvi.target.checks import is_enumerated, scored
from flowvi.target.facts import ModelError
from flowvi.target.handlers import observes


def log_joint(trace: poutine.Trace) -> Tensor:
    """Log density of an enumerated trace, summed over all values of its discrete sites.

    The scale N / B of a subsampled plate multiplies the sum's logarithm: it
    does not commute with the sum.
    """
    trace.pack_tensors()
    discrete = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    total: Tensor | float = 0.0
    scales: dict[str, Any] = {}
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in scored(trace):
        log_p, mask = site["packed"]["unscaled_log_prob"], site["packed"]["mask"]
        if not discrete & set(log_p._pyro_dims):
            total = total + site["log_prob_sum"]
            continue
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        plates = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        factors.setdefault(plates, []).append(packed.scale_and_mask(log_p, mask=mask))
        scales[site["name"]] = site["scale"]
    with shared_intermediates() as cache:
        marginal = contract_to_tensor(factors, discrete, cache=cache)
    return total + _common(scales) * marginal


def _common(scales: Mapping[str, Any]) -> float:
    (first, scale), *others = scales.items()
    for name, other in others:
        if isinstance(other, Tensor) or isinstance(scale, Tensor) or other != scale:
            raise ModelError(
                f"Sites '{first}' and '{name}' depend on a discrete site that is summed out, and "
                "have different scales: the sum has no unbiased estimate from a part of the rows. "
                "Use the full plate, or move the discrete site into the subsampled one."
            )
    return float(scale)


def log_likelihood(trace: poutine.Trace, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Log likelihood of each row of each observed site of an enumerated trace.

    Args:
        trace: A scored run under `poutine.enum`.
        shapes: The rows of each observed site.
    """
    discrete = [_unscaled(site) for site in scored(trace) if is_enumerated(site)]
    out = {}
    for site in scored(trace):
        if not observes(site):
            continue
        log_p, rows = _unscaled(site), shapes[site["name"]]
        if log_p.shape != rows:
            terms = torch.broadcast_tensors(log_p, *discrete)
            # Discrete values have axes of their own, left of all plates.
            values = terms[0].shape[: terms[0].dim() - len(rows)]
            log_p = torch.logsumexp(sum(terms[1:], terms[0]), tuple(range(len(values))))
        out[site["name"]] = log_p.reshape(rows)
    return out


def rows_are_exact(trace: poutine.Trace, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether the sum over discrete sites is one for each row of the data.

    It is where they lie in the same plates as the one observed site that
    depends on them, as in a mixture; not where rows share them.
    """
    try:
        rows = log_likelihood(trace, shapes)
    except RuntimeError:  # rows and discrete values have no common shape
        return False
    scales = {site["name"]: site["scale"] for site in scored(trace)}
    rest = [s["log_prob_sum"] for s in scored(trace) if not (observes(s) or is_enumerated(s))]
    total = sum((scales[name] * value).sum() for name, value in rows.items()) + sum(rest)
    return bool(torch.isclose(torch.as_tensor(total), log_joint(trace), rtol=1e-5, atol=1e-5))


def unaffected(trace: poutine.Trace, first: poutine.Trace, names: Collection[str]) -> list[str]:
    """Which of some derived values do not depend on a discrete site.

    Args:
        trace: A run under `poutine.enum`, where those that do have more axes.
        first: A run in which discrete sites were drawn.
        names: The derived values.
    """
    return [n for n in names if trace.nodes[n]["value"].shape == first.nodes[n]["value"].shape]


def _unscaled(site: Mapping[str, Any]) -> Tensor:
    log_p: Tensor = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
    return log_p
