"""Effect handlers that run a Pyro model on given values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Number
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import projected_normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from flowvi.targets.imputed import OBSERVED, Missing, imputed
from flowvi.targets.pyro.bijections import bijection_of, site_bijection
from flowvi.targets.pyro.parameters import Parameters
from flowvi.targets.schema import ModelError
from flowvi.targets.tabular import as_tensor, kind_of, remedy


class ServeInputs(Messenger):
    """Serve `pyro.param` statements from a target's own parameters, plates their rows, and data.

    Args:
        parameters: Where the parameters live.
        rows: Indices for plates that would draw them; others keep what the model gives them.
        dtype: Precision in which the model sees parameters; their own without.

    Attributes:
        drawn: Plates that draw their rows: size and batch size.
        data: Observed site -> its data as they were given, as a tensor.
    """

    def __init__(
        self,
        parameters: Parameters,
        rows: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.rows = rows or {}
        self.dtype = dtype
        self.drawn: dict[str, tuple[int, int]] = {}
        self.data: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        msg["value"] = self.parameters.value(msg, self.dtype)
        msg["done"] = True

    def _pyro_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if isinstance(fn, _Subsample):
            batch = fn.subsample_size
            if msg["value"] is None and batch is not None and batch < fn.size:
                self.drawn[name] = (fn.size, batch)
                if name in self.rows:
                    msg["value"], msg["done"] = self.rows[name], True
        elif observes(msg):
            self.data[name] = _as_data(name, msg["value"])
            msg["value"] = _scorable(self.data[name], msg)


class StartImproperPriors(Messenger):
    """Give sites with an improper prior a first value: random, near the image of zero.

    Args:
        dtype: Precision of their values.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: Any) -> None:
        if is_improper(msg["fn"]) and not msg["is_observed"] and msg["value"] is None:
            fn = msg["fn"]
            transform = site_bijection(msg["name"], fn)
            shape = transform.inverse_shape(torch.Size((*fn.batch_shape, *fn.event_shape)))
            msg["value"] = transform(0.5 * torch.randn(shape, dtype=self.dtype))
            msg["done"] = True


class FromVector(Messenger):
    """Give every latent site its stretch of one unconstrained vector.

    The support is that of the *current* values: where it depends on other
    latents, so does the transform.

    Args:
        z: The vector, (D,).
        slices: Columns of each site.
        shapes: Unconstrained shape of each site.
        missing: Sites of which only some elements are latent.
        dtypes: Type of each site's value.

    Attributes:
        ladjs: Log Jacobian of each site, by its batch shape.
        ladj: Their sum.
    """

    def __init__(
        self,
        z: Tensor,
        slices: Mapping[str, slice],
        shapes: Mapping[str, Sequence[int]],
        dtypes: Mapping[str, torch.dtype],
        missing: Mapping[str, Missing] | None = None,
    ) -> None:
        super().__init__()
        self.z, self.slices, self.shapes, self.dtypes = z, slices, shapes, dtypes
        self.missing = missing or {}
        self.ladj: Tensor = z.new_zeros(())
        self.ladjs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.slices:
            return
        transform = bijection_of(msg["fn"])
        u = self.z[self.slices[name]].reshape(tuple(self.shapes[name])).to(self.dtypes[name])
        part = self.missing.get(name)
        u = part.spread(u) if part else u
        value = transform(u)
        ladj = transform.log_abs_det_jacobian(u, value)
        self.ladjs[name] = part.only(ladj) if part else ladj
        self.ladj = self.ladj + self.ladjs[name].sum()
        msg["value"], msg["done"] = value, True


class ToVector(Messenger):
    """Collect the unconstrained vector of given latent values.

    Args:
        values: Value of every latent site.
        missing: Sites of which only some elements are latent.
    """

    def __init__(
        self, values: Mapping[str, Tensor], missing: Mapping[str, Missing] | None = None
    ) -> None:
        super().__init__()
        self.values = values
        self.missing = missing or {}
        self.pieces: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        part = self.missing.get(name)
        # A site without latent elements is not among the values.
        value = part.like if part and name not in self.values else self.values.get(name)
        if value is not None:
            msg["value"], msg["done"] = value, True
            u = bijection_of(msg["fn"]).inv(value)
            self.pieces[name] = (part.pick(u) if part else u).reshape(-1)


class Substitute(Messenger):
    """Condition sites on values; deterministic sites are unchanged.

    Args:
        values: Value of each site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not is_deterministic(msg):
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True


class Uncondition(Messenger):
    """Make observed sites latent, so that data are drawn; deterministic sites are unchanged."""

    def _pyro_sample(self, msg: Any) -> None:
        if (
            msg["is_observed"]
            and not is_deterministic(msg)
            and not isinstance(msg["fn"], dist.Unit)
        ):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def is_imputed(site: Mapping[str, Any], data: Collection[str]) -> bool:
    """Whether a site holds the missing rows of an observation with `obs_mask`."""
    name = imputed(site)
    return name is not None and f"{name}{OBSERVED}" in data


def is_improper(fn: Any) -> bool:
    """Whether a distribution, or what it wraps, has no integral."""
    while not isinstance(fn, dist.ImproperUniform) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def innermost(fn: Any) -> Any:
    """The distribution in wrappers of it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site's value is computed from others: by `pyro.deterministic` or a `reparam`."""
    return bool(site["infer"].get("_deterministic")) or is_reparametrised(site)


def is_reported(site: Mapping[str, Any]) -> bool:
    """Whether a site's value is computed from others, and of interest in every draw of a fit."""
    return is_deterministic(site) and bool(site["infer"].get("reported", True))


def is_reparametrised(site: Mapping[str, Any]) -> bool:
    """Whether `poutine.reparam` put other sites in the place of a site.

    Pyro then makes it an observed Delta whose point is the value itself.
    """
    if not site["is_observed"] or site["infer"].get("_deterministic"):
        return False
    fn = innermost(site["fn"])
    return isinstance(fn, dist.Delta) and _is_view(fn.v, site["value"])


def has_density(site: Mapping[str, Any]) -> bool:
    """Whether a reparametrisation left a part of the density with the original site."""
    return bool((innermost(site["fn"]).log_density != 0).any())


def _is_view(a: Tensor, b: Any) -> bool:
    """Whether a is b, or was expanded from it, as a plate does with what is sampled in it."""
    aliases: Any = vars(torch._C)["_is_alias_of"]  # not in torch's stubs
    return a is b or (isinstance(b, Tensor) and bool(aliases(a, b)))


def observes(site: Mapping[str, Any]) -> bool:
    """Whether a site observes data: neither a factor, a plate nor a deterministic value."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not is_deterministic(site)
        and not isinstance(site["fn"], _Subsample | dist.Unit)
    )


def mask_of(site: Mapping[str, Any]) -> Tensor | bool | None:
    """The mask of a site: its own, and that of the blocks around it."""
    fn, mask = site["fn"], site["mask"]
    inner = fn._mask if isinstance(fn, dist.MaskedDistribution) else None
    if inner is None or mask is None:
        return inner if mask is None else mask
    return inner & mask


@contextmanager
def without_validation() -> Iterator[None]:
    """Run a model without validation and without Pyro's parameter store, then put both back."""
    theirs = projected_normal.safe_normalize
    projected_normal.safe_normalize = _normalised
    try:
        with isolated_param_store(), pyro.validation_enabled(False):
            yield
    finally:
        projected_normal.safe_normalize = theirs


@contextmanager
def isolated_param_store() -> Iterator[None]:
    """Put an empty parameter store in the place of Pyro's, whose parameters stay in use."""
    store = pyro.get_param_store()
    # The store's own scope takes from parameters what a training in progress asks them for.
    used = [
        (p, vars(p)["unconstrained"])
        for _, p in store.named_parameters()
        if "unconstrained" in vars(p)
    ]
    try:
        with store.scope():
            yield
    finally:
        for p, reference in used:
            p.unconstrained = reference


def _normalised(x: Tensor, *, p: float = 2) -> Tensor:
    """Pyro's `safe_normalize`, which reads a mask into Python where the vector is a single one."""
    unit = x / torch.linalg.norm(x, dim=-1, ord=p, keepdim=True).clamp(
        min=torch.finfo(x.dtype).tiny
    )
    pole = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)[0]
    return torch.where((unit == 0).all(-1, keepdim=True), pole, unit)


def run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *handlers: Messenger,
) -> poutine.Trace:
    """Trace a model under handlers, the first outermost."""
    for handler in reversed(handlers):
        model = handler(model)
    return poutine.trace(model).get_trace(*args, **kwargs)


def _as_data(name: str, given: Any) -> Tensor:
    value = as_tensor(given)
    if isinstance(value, np.generic | Number | list | tuple) and not isinstance(value, str):
        with suppress(TypeError, ValueError):
            value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        kind = kind_of(given)
        of = f" of {kind}" if kind and kind != "table" else ""
        what = f"a {type(given).__name__}{of}"
        if isinstance(value, np.ndarray):
            what = f"an array of {value.dtype}"
        what += (
            f"; pass {remedy(kind)}." if kind else "; pass numbers, as a tensor (torch.as_tensor)."
        )
        raise ModelError(f"Site '{name}' observes {what}")
    if value.is_complex():
        raise ModelError(
            f"Site '{name}' observes complex numbers; observe their real and imaginary parts."
        )
    return value


def _scorable(value: Tensor, site: Mapping[str, Any]) -> Tensor:
    """Observed data as the density can take it.

    Booleans become numbers, and integers where the support is continuous.
    Masked values that the density is not defined at are replaced by one that
    it is: zero times their infinite derivative would be NaN.
    """
    fn, mask = site["fn"], mask_of(site)
    if value.dtype == torch.bool or not (value.is_floating_point() or fn.support.is_discrete):
        value = value.to(torch.get_default_dtype())
    if not isinstance(mask, Tensor):
        return value
    lead = value.shape[: value.dim() - fn.event_dim]
    good = value.isfinite().reshape(*lead, -1).all(-1) & fn.support.check(value)
    keep = (mask | good).reshape((*good.shape, *(1,) * fn.event_dim))
    shape = torch.Size((*fn.batch_shape, *fn.event_shape))
    if fn.support.is_discrete:
        return torch.where(keep, value, torch.zeros_like(value))
    transform = bijection_of(fn)
    inside = transform(value.new_zeros(transform.inverse_shape(shape)))
    return torch.where(keep, value, inside)
