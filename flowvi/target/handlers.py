"""Effect handlers that run a Pyro model on given values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

from flowvi.target.bijections import bijection_of, site_bijection
from flowvi.target.facts import ModelError
from flowvi.target.parameters import Parameters


class Owned(Messenger):
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
        elif self._is_imputed(msg):
            # Rows that were observed are auxiliary here: give them the density that makes
            # them integrate to one, so that they neither count nor wander off.
            msg["mask"] = None
        elif observes(msg):
            self.data[name] = _as_data(name, msg["value"])
            msg["value"] = _scorable(self.data[name], msg)

    def _is_imputed(self, site: Mapping[str, Any]) -> bool:
        """Whether a site holds the missing rows of an observation with `obs_mask`."""
        base = site["name"].removesuffix("_unobserved")
        return (
            not site["is_observed"]
            and isinstance(site["mask"], Tensor)
            and base != site["name"]
            and f"{base}_observed" in self.data
        )


class Prior(Messenger):
    """Let sites with an improper prior start somewhere: near the image of zero.

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
    ) -> None:
        super().__init__()
        self.z, self.slices, self.shapes, self.dtypes = z, slices, shapes, dtypes
        self.ladj: Tensor = z.new_zeros(())
        self.ladjs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.slices:
            return
        transform = bijection_of(msg["fn"])
        u = self.z[self.slices[name]].reshape(tuple(self.shapes[name])).to(self.dtypes[name])
        value = transform(u)
        self.ladjs[name] = transform.log_abs_det_jacobian(u, value)
        self.ladj = self.ladj + self.ladjs[name].sum()
        msg["value"], msg["done"] = value, True


class ToVector(Messenger):
    """Collect the unconstrained vector of given latent values.

    Args:
        values: Value of every latent site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.pieces: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            msg["value"], msg["done"] = self.values[name], True
            self.pieces[name] = bijection_of(msg["fn"]).inv(self.values[name]).reshape(-1)


class Unseen(Messenger):
    """Forget the data, so that they are drawn; values derived from others stay what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if (
            msg["is_observed"]
            and not is_deterministic(msg)
            and not isinstance(msg["fn"], dist.Unit)
        ):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def is_improper(fn: Any) -> bool:
    """Whether a distribution, or what it wraps, has no integral."""
    while not isinstance(fn, dist.ImproperUniform) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site was made by `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


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
def quiet() -> Iterator[None]:
    """Run a model without validation and without Pyro's parameter store, then put both back."""
    theirs = projected_normal.safe_normalize
    projected_normal.safe_normalize = _normalised
    try:
        with store_aside(), pyro.validation_enabled(False):
            yield
    finally:
        projected_normal.safe_normalize = theirs


@contextmanager
def store_aside() -> Iterator[None]:
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


def as_tensor(value: Any) -> Any:
    """An array of numbers, or a column of a table, as a tensor; all else as it is."""
    array = value.to_numpy() if _is_column(value) else value
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufc":
        # Torch warns of an array that cannot be written to, and takes no negative strides.
        return torch.as_tensor(np.require(array, requirements=["C", "W"]))
    return value


def _is_column(value: Any) -> bool:
    """Whether a value is a column of a pandas or polars table."""
    kind = type(value)
    return kind.__name__ == "Series" and kind.__module__.split(".")[0] in ("pandas", "polars")


def _as_data(name: str, given: Any) -> Tensor:
    value = as_tensor(given)
    if isinstance(value, np.generic | Number | list | tuple) and not isinstance(value, str):
        with suppress(TypeError, ValueError):
            value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else "a "
        what += "" if isinstance(value, np.ndarray) else type(given).__name__
        raise ModelError(
            f"Site '{name}' observes {what}; pass numbers, as a tensor (torch.as_tensor)."
        )
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
    keep = (mask | good).reshape(*good.shape, *(1,) * fn.event_dim)
    shape = torch.Size((*fn.batch_shape, *fn.event_shape))
    if fn.support.is_discrete:
        return torch.where(keep, value, torch.zeros_like(value))
    transform = bijection_of(fn)
    inside = transform(value.new_zeros(transform.inverse_shape(shape)))
    return torch.where(keep, value, inside)
