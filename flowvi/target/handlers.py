"""Effect handlers that run a Pyro model on given values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from flowvi.target.bijections import bijection, support_of


@dataclass
class Parameters:
    """The model's own parameters (`pyro.param`, `pyro.module`), owned by the target.

    Pyro's parameter store is left alone: two fits never share parameters.
    """

    leaves: dict[str, nn.Parameter] = field(default_factory=dict)

    def value(self, name: str, init: Any, constraint: Any) -> Tensor:
        """The constrained value of a parameter, created at first sight."""
        if name not in self.leaves:
            self.leaves[name] = self._create(name, init, constraint)
        leaf = self.leaves[name]
        constrained: Tensor = transform_to(constraint)(leaf)
        # Pyro's modules reach for the leaf through this attribute.
        if constrained is not leaf:
            constrained.unconstrained = lambda: leaf  # type: ignore[attr-defined]
        return constrained

    def _create(self, name: str, init: Any, constraint: Any) -> nn.Parameter:
        store = pyro.get_param_store()
        if init is None and name in store:
            held = store._params[name]
            return held if isinstance(held, nn.Parameter) else nn.Parameter(held.detach())
        value = init() if callable(init) and not isinstance(init, Tensor) else init
        if isinstance(value, nn.Parameter) and constraint is constraints.real:
            return value
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        return nn.Parameter(transform_to(constraint).inv(value.detach()).clone())


class Owned(Messenger):
    """Serve `pyro.param` statements from a target's own parameters, and plates their rows.

    Args:
        parameters: Where the parameters live.
        rows: Indices for plates; others keep what the model gives them.
    """

    def __init__(self, parameters: Parameters, rows: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.parameters = parameters
        self.rows = rows or {}

    def _pyro_param(self, msg: Any) -> None:
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        constraint = msg["kwargs"].get("constraint", constraints.real)
        msg["value"] = self.parameters.value(msg["name"], init, constraint)
        msg["done"] = True

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            if msg["value"] is None and msg["name"] in self.rows:
                msg["value"] = self.rows[msg["name"]]
                msg["done"] = True
            return
        if is_imputed(msg):
            # Rows that were observed are auxiliary here: give them the density that makes
            # them integrate to one, so that they neither count nor wander off.
            msg["mask"] = None
        if msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = _observation(msg)


class Prior(Messenger):
    """Let sites with an improper prior start somewhere: near the image of zero.

    Args:
        dtype: Precision of their values.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: Any) -> None:
        improper = improper_base(msg["fn"])
        if improper is None or msg["is_observed"] or msg["value"] is not None:
            return
        fn = msg["fn"]
        transform = bijection(support_of(fn))
        shape = transform.inverse_shape(torch.Size((*fn.batch_shape, *fn.event_shape)))
        msg["value"] = transform(0.5 * torch.randn(shape, dtype=self.dtype))
        msg["done"] = True


class FromVector(Messenger):
    """Give every latent site its stretch of one unconstrained vector.

    The support is that of the *current* values: where it depends on other
    latents, so does the transform. The log Jacobian is summed in `ladj`.

    Args:
        z: The vector, (D,).
        slices: Columns of each site.
        shapes: Unconstrained shape of each site.
    """

    def __init__(
        self, z: Tensor, slices: Mapping[str, slice], shapes: Mapping[str, torch.Size]
    ) -> None:
        super().__init__()
        self.z, self.slices, self.shapes = z, slices, shapes
        self.ladj: Tensor = z.new_zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.slices:
            return
        transform = bijection(support_of(msg["fn"]))
        u = self.z[self.slices[name]].reshape(self.shapes[name])
        value = transform(u)
        self.ladj = self.ladj + transform.log_abs_det_jacobian(u, value).sum()
        msg["value"] = value
        msg["done"] = True


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
            msg["value"] = self.values[name]
            msg["done"] = True
            transform = bijection(support_of(msg["fn"]))
            self.pieces[name] = transform.inv(self.values[name]).reshape(-1)


def improper_base(fn: Any) -> dist.ImproperUniform | None:
    """The improper distribution inside wrappers, if there is one."""
    while not isinstance(fn, dist.ImproperUniform) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.ImproperUniform) else None


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site was made by `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


def is_imputed(site: Mapping[str, Any]) -> bool:
    """Whether a site holds the missing rows of an observation with `obs_mask`."""
    mask = site["mask"]
    return (
        site["name"].endswith("_unobserved")
        and not site["is_observed"]
        and isinstance(mask, Tensor)
    )


def _mask_of(site: Mapping[str, Any]) -> Tensor | bool | None:
    fn, mask = site["fn"], site["mask"]
    inner = getattr(fn, "_mask", None) if isinstance(fn, dist.MaskedDistribution) else None
    if inner is None or mask is None:
        return inner if mask is None else mask
    return inner & mask


def _observation(site: Mapping[str, Any]) -> Tensor:
    """Observed data as the density can take it.

    Booleans become numbers. Masked values that are not finite are replaced by
    one that is: zero times their infinite derivative would be NaN.
    """
    value: Tensor = site["value"]
    if value.dtype == torch.bool:
        value = value.to(torch.get_default_dtype())
    mask = _mask_of(site)
    if not isinstance(mask, Tensor) or not value.is_floating_point():
        return value
    fn = site["fn"]
    lead = value.shape[: value.dim() - fn.event_dim]
    keep = mask.expand(torch.broadcast_shapes(mask.shape, lead))
    if keep.shape != lead or value.isfinite().all():
        return value
    keep = keep.reshape(*lead, *(1,) * fn.event_dim)
    good = value[keep.expand_as(value) & value.isfinite()]
    fill = good[0] if len(good) else value.new_zeros(())
    return torch.where(keep | value.isfinite(), value, fill)


@contextmanager
def quiet() -> Iterator[None]:
    """Run a model without validation and without Pyro's parameter store, then put both back."""
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


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
