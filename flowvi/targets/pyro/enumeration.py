"""Discrete latents, summed out along axes of their own."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from flowvi.targets.pyro.checks import sites_with_density
from flowvi.targets.pyro.handlers import observes
from flowvi.targets.pyro.log_einsum import Ring
from flowvi.targets.recording.capture import agree
from flowvi.targets.schema import ModelError

Sites = Mapping[str, Any]
# A tensor with the symbols of its axes in `_pyro_dims`; axes of size one have no symbol.
Packed = Any


class Unsummable(ModelError):
    """The sum over some discrete sites does not factorise along axes of their own.

    Args:
        reason: Why, in words.
        sites: The discrete sites, if it is known which.
    """

    def __init__(self, reason: str, sites: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.sites = sites


@dataclass(frozen=True, eq=False)
class Factor:
    """The log density of one site, for all values of the discrete sites that it depends on.

    Args:
        site: Its record in the trace.
        log_p: Its log density without scale, with one axis for each plate and discrete site.
        plates: Symbols of the plates that it lies in.
        carried: Symbols of the discrete sites.
    """

    site: Sites
    log_p: Packed
    plates: frozenset[str]
    carried: frozenset[str]


def log_joint(trace: poutine.Trace, own: Mapping[str, Tensor] | None = None) -> Tensor:
    """Log density of an enumerated trace, summed over all values of its discrete sites.

    The scale of a plate or block multiplies the sum's logarithm: it does not
    commute with the sum. Sites that do not hang together may differ in scale.

    Args:
        trace: A scored run under `poutine.enum`.
        own: Added to the log probabilities of discrete sites, (K, *plates), without scales.

    Raises:
        Unsummable: The sum does not factorise.
        ModelError: Sites of one sum have different scales.
    """
    factors, owners = _factors(trace)
    free = [f.site["log_prob_sum"] for f in factors if not f.carried]
    total: Tensor = sum(free[1:], free[0]) if free else torch.zeros(())
    for component in _components([f for f in factors if f.carried]):
        total = total + _sum_of(component, owners, own)
    return total


def probabilities(trace: poutine.Trace) -> tuple[Tensor, dict[str, Tensor]]:
    """The log density, and the probabilities of each discrete site's values given all else.

    Adding e to the log probability of a value moves the log of the sum by e
    times the probability of that value given the data: the gradient at 0 is
    that probability.

    Returns:
        The log density without scales (), and for each site (..., *plates, K).
    """
    sites = {s["name"]: s for s in sites_with_density(trace) if _axis(s) is not None}
    own = {name: _own(site).requires_grad_() for name, site in sites.items()}
    with torch.enable_grad():
        total = log_joint(trace, own)
    if not own:
        return total, {}
    found = torch.autograd.grad(total, list(own.values()))
    each = zip(sites.items(), found, strict=True)
    return total.detach(), {name: g.movedim(_axis(site) or 0, -1) for (name, site), g in each}


def log_likelihood(trace: poutine.Trace, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Log likelihood of each row of each observed site of an enumerated trace.

    Each row is summed for itself over the discrete sites that it depends on.

    Args:
        trace: A scored run under `poutine.enum`.
        shapes: The rows of each observed site.
    """
    factors, owners = _factors(trace)
    own = {f.site["name"]: f for f in factors}
    out = {}
    for factor in factors:
        if observes(factor.site):
            terms, symbols = [factor], set(factor.carried)
            for symbol in (todo := sorted(symbols)):  # grows by what the sites depend on
                terms.append(own[owners[symbol]["name"]])
                todo += sorted(terms[-1].carried - symbols)
                symbols |= terms[-1].carried
            with shared_intermediates() as cache:
                log_p = Ring(cache).sumproduct(_of_one_type(f.log_p for f in terms), symbols)
            name = factor.site["name"]
            out[name] = packed.unpack(log_p, trace.symbol_to_dim).expand(shapes[name])
    return out


def compare(trace: poutine.Trace, single: poutine.Trace, places: Mapping[str, Tensor]) -> None:
    """Refuse factors that are not those of a run in which each discrete site has one value.

    Args:
        trace: A scored run under `poutine.enum`.
        single: A scored run at the same point and some values of the discrete sites.
        places: Those values, by their places among all values of each site.

    Raises:
        Unsummable: A factor lies outside the plates of a discrete site that it depends on, or
            differs where the values have axes of their own.
    """
    factors, owners = _factors(trace)
    for factor in factors:
        _check_plates(factor, owners)
        name = factor.site["name"]
        expected = _unscaled(single.nodes[name])
        log_p = factor.log_p
        for symbol in sorted(factor.carried):
            log_p = packed.gather(log_p, _packed_places(owners[symbol], places), symbol)
        found = packed.unpack(log_p, trace.symbol_to_dim)
        if not _same(found, expected):
            raise Unsummable(
                f"The log density of site '{name}' is another one where discrete sites have an "
                "axis for their values, left of the plates, than where they have one value: the "
                "model does not broadcast."
            )


def _factors(trace: poutine.Trace) -> tuple[list[Factor], dict[str, Sites]]:
    """All factors of a trace, and the discrete site behind each symbol."""
    trace.symbolize_dims()
    sites = sites_with_density(trace)
    owners: dict[str, Sites] = {
        s["infer"]["_enumerate_symbol"]: s for s in sites if _axis(s) is not None
    }
    factors = []
    for site in sites:
        log_p = _packed(site, _unscaled(site))
        plates = frozenset(trace.plate_to_symbol[f.name] for f in _frames(site))
        factors.append(Factor(site, log_p, plates, frozenset(owners) & set(log_p._pyro_dims)))
    return factors, owners


def _packed(site: Sites, value: Tensor) -> Packed:
    try:
        return packed.pack(value, site["infer"]["_dim_to_symbol"])
    except ValueError as error:
        raise Unsummable(
            f"The log density of site '{site['name']}' has shape {tuple(value.shape)} where "
            "discrete sites have an axis for their values, left of the plates; it depends on "
            "several of their elements at once, or has rows that no plate declares."
        ) from error


def _check_plates(factor: Factor, owners: Mapping[str, Sites]) -> None:
    """Refuse what depends on several elements of a discrete site."""
    inside = {f.name for f in _frames(factor.site)}
    for symbol in sorted(factor.carried):
        owner = owners[symbol]
        outside = [f.name for f in _frames(owner) if f.name not in inside]
        if outside:
            where = _in_plates(sorted(inside))
            raise Unsummable(
                f"Site '{factor.site['name']}' {where} depends on the discrete site "
                f"'{owner['name']}' {_in_plates(outside)}, on all of its elements together.",
                [owner["name"]],
            )


def _same(a: Tensor, b: Tensor) -> bool:
    try:
        x, y = torch.broadcast_tensors(a, b)
    except RuntimeError:  # no common shape
        return False
    return agree((x,), (y,))


def _components(factors: list[Factor]) -> list[list[Factor]]:
    """Factors that hang together by the discrete sites that they depend on."""
    groups: list[tuple[set[str], list[Factor]]] = []
    for factor in factors:
        symbols, members = set(factor.carried), [factor]
        rest = []
        for other, old in groups:
            if other & symbols:
                symbols, members = symbols | other, old + members
            else:
                rest.append((other, old))
        groups = [*rest, (symbols, members)]
    return [members for _, members in groups]


def _sum_of(
    component: Sequence[Factor], owners: Mapping[str, Sites], own: Mapping[str, Tensor] | None
) -> Tensor:
    """Logarithm of the sum over the discrete sites of one component, times its scale."""
    scale: Packed = torch.ones(()) if own is not None else _scale_of(component)
    symbols = {symbol for f in component for symbol in f.carried}
    added = [owners[s] for s in sorted(symbols) if own and owners[s]["name"] in own]
    plates = [f.plates for f in component] + [_plates(site) for site in added]
    log_ps = [f.log_p for f in component]
    log_ps += [_packed(site, (own or {})[site["name"]]) for site in added]
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for key, term in zip(plates, _of_one_type(log_ps), strict=True):
        tree.setdefault(key, []).append(term)
    rows = frozenset(scale._pyro_dims if scale.dim() else "")
    try:
        with shared_intermediates() as cache:
            log_p = contract_to_tensor(tree, symbols, rows, ring=Ring(cache))
    except NotImplementedError as error:
        names = sorted(owners[s]["name"] for s in symbols)
        raise Unsummable(
            f"The discrete sites {_listed(names)} lie in plates that cross, and a site depends on "
            "several of them at once.",
            names,
        ) from error
    if not rows:
        return scale.to(log_p) * log_p
    log_p, scale = packed.broadcast_all(log_p, _cast(scale, log_p.dtype))
    weighted: Tensor = scale * log_p
    return weighted.sum()


def _scale_of(component: Sequence[Factor]) -> Packed:
    """The scale that all factors of a sum have: a number, or one for each row of their plates."""
    scales = [_packed(f.site, torch.as_tensor(f.site["scale"])) for f in component]
    for factor, scale in zip(component, scales, strict=True):
        if scale.shape != scales[0].shape or not torch.equal(scale, scales[0]):
            first, other = component[0].site["name"], factor.site["name"]
            raise ModelError(
                f"Sites '{first}' and '{other}' depend on a discrete site that is summed out, and "
                "have different scales: a scale multiplies the logarithm of the sum, which has no "
                "unbiased estimate from a part of the rows. Use the full plate, or move the "
                "discrete site into the plate or block that is scaled."
            )
        if scale.dim() and not set(scale._pyro_dims) <= factor.plates:
            raise ModelError(
                f"Site '{factor.site['name']}' depends on a discrete site that is summed out, and "
                "its scale has rows that are in none of its plates. Scale rows of a plate."
            )
    return scales[0]


def _of_one_type(terms: Iterable[Packed]) -> list[Packed]:
    """Packed tensors in the finest precision that one of them has."""
    terms = list(terms)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in terms))
    return [_cast(t, dtype) for t in terms]


def _cast(value: Packed, dtype: torch.dtype) -> Packed:
    """A packed tensor in another precision."""
    if value.dtype == dtype:
        return value
    new = value.to(dtype)
    new._pyro_dims = value._pyro_dims
    return new


def _unscaled(site: Sites) -> Tensor:
    log_p: Tensor = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
    return log_p


def _axis(site: Sites) -> int | None:
    """The axis that the values of a discrete site have, from the right."""
    axis: int | None = site["infer"].get("_enumerate_dim")
    return axis


def _own(site: Sites) -> Tensor:
    """Zeros, one for each value of a discrete site and each element of its plates."""
    axis, event = _axis(site), site["fn"].event_dim
    assert axis is not None
    shape = [1] * -axis
    shape[axis] = site["value"].shape[axis - event]
    for frame in _frames(site):
        shape[frame.dim] = frame.size
    log_p: Tensor = site["unscaled_log_prob"]
    return log_p.new_zeros(shape)


def _frames(site: Sites) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _plates(site: Sites) -> frozenset[str]:
    names = site["infer"]["_dim_to_symbol"]
    return frozenset(names[frame.dim] for frame in _frames(site))


def _packed_places(site: Sites, places: Mapping[str, Tensor]) -> Packed:
    return packed.pack(places[site["name"]], site["infer"]["_dim_to_symbol"])


def _in_plates(names: Sequence[str]) -> str:
    if not names:
        return "in no plate"
    return f"in plate{'s' if len(names) > 1 else ''} {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
