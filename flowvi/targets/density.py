"""A log density written by hand, as a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributions import Transform

from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.local.density import PlainRows
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.precision import cast, default_dtype, explain_mixed_precision, succeeds
from flowvi.targets.pyro.bijections import bijection
from flowvi.targets.recording.capture import Trial, capture
from flowvi.targets.recording.program import CompiledDensity
from flowvi.targets.schema import Facts, Functions, ModelError, Site
from flowvi.targets.vectors import TRIES, finite_points, nearby, split


@overload
def from_density(
    log_prob: Callable[..., Tensor],
    sites: Mapping[str, Site],
    data: None = None,
    local: None = None,
) -> GlobalTarget: ...


@overload
def from_density(
    log_prob: Callable[..., Tensor], sites: Mapping[str, Site], data: Any, local: str
) -> LocalTarget: ...


def from_density(
    log_prob: Callable[..., Tensor],
    sites: Mapping[str, Site],
    data: Any = None,
    local: str | None = None,
) -> GlobalTarget | LocalTarget:
    """Make a target of a differentiable log density on named, constrained values.

    Args:
        log_prob: Takes a dict of one value a site, each of its site's shape, and returns
            the log density there, (), up to a constant. Jacobians are added by flowvi.
        sites: Name -> `Site(shape, support)`.
        data: For latents that each row of the data has of its own, the rows: a tensor, a tuple
            of tensors, a `Dataset` or a `DataLoader`. The log density then takes the values of
            one row and, behind them, its data; an `nn.Module` has its parameters trained.
        local: What to call the rows.

    Returns:
        The target; with `local` a `LocalTarget`.

    Raises:
        ModelError: The density cannot be evaluated or captured.
    """
    plain = _Plain(log_prob, sites)
    if local is None and data is None:
        target = plain.target()
        target.made = partial(from_density, log_prob, sites)
        return target
    if local is None or data is None:
        raise ModelError(
            "data and local belong together: data=x, local='row' gives each row of x a latent "
            f"vector; got local={local!r}{' and no data' if data is None else ''}."
        )
    rows = PlainRows(plain, data, local).target()
    rows.made = partial(from_density, log_prob, sites, data, local)
    return rows


class _Plain:
    """One density on its way to a target."""

    def __init__(self, log_prob: Callable[..., Tensor], sites: Mapping[str, Site]) -> None:
        for site in sites.values() if isinstance(sites, Mapping) else [None]:
            if not isinstance(site, Site):
                sites = {}
        if not sites:
            raise ModelError(
                "from_density needs a dictionary of at least one site, such as "
                "{'mu': flowvi.Site()}."
            )
        if not callable(log_prob):
            raise ModelError(
                "from_density needs a function of the values of sites; got a "
                f"{type(log_prob).__name__}."
            )
        self.log_prob, self.sites = log_prob, dict(sites)
        self.name = getattr(log_prob, "__name__", type(log_prob).__name__)
        self.slices: dict[str, slice] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.transforms: dict[str, Transform] = {}
        start = 0
        for name, site in sites.items():
            self.transforms[name], shape = _checked(name, site)
            self.shapes[name] = shape
            self.slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        self.dim = start
        if not start:
            raise ModelError("The sites have no elements: there is nothing to fit.")
        self.precision: torch.dtype | None = None

    def in_precision(self, dtype: torch.dtype, *row: Tensor) -> None:
        """Evaluate in a precision, also for new tensors, if the density runs in it.

        A density that holds tensors of another precision, such as a network, may not run.
        """
        self.precision = dtype
        points = nearby(torch.zeros(self.dim, dtype=dtype))
        with torch.no_grad():
            if not any(succeeds(partial(self.density, z, *row)) for z in points):
                self.precision = None

    def target(self) -> GlobalTarget:
        if torch.get_default_dtype() != torch.float64:
            self.in_precision(torch.float64)
        trial = Trial(self._points())
        batched = capture(self.density, trial, self.name, reads=True)
        facts = Facts(self.name, self.sites, self.slices, dims=self.dims())
        functions = Functions(self.values, self.inverse)
        return GlobalTarget(facts, CompiledDensity(batched, frozen=True), functions, trial)

    def density(self, z: Tensor, *row: Tensor) -> Tensor:
        """Log density at a point, Jacobian included; row is the data of one row, if any."""
        values, ladj = {}, z.new_zeros(())
        for name, transform in self.transforms.items():
            u = z[self.slices[name]].reshape(self.shapes[name])
            values[name] = transform(u)
            ladj = ladj + transform.log_abs_det_jacobian(u, values[name]).sum()
        with default_dtype(self.precision):
            try:
                log_p = self.log_prob(values, *(cast(t, self.precision) for t in row))
            except RuntimeError as error:
                words = explain_mixed_precision(
                    error, {f"site '{name}'": v.dtype for name, v in values.items()}
                )
                if not words:
                    raise
                raise ModelError(f"{self.name} fails. {words} {error}") from error
        if not isinstance(log_p, Tensor) or log_p.shape != ():
            came = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            raise ModelError(
                f"{self.name} must return the log density of one point, a tensor of shape (); "
                f"got {came}. Add .sum() if it returned one value a row of the data."
            )
        return log_p + ladj

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the sites at a point (D)."""
        return {
            name: self.transforms[name](z[self.slices[name]].reshape(self.shapes[name]))
            for name in self.sites
        }

    def inverse(self, flat: Tensor) -> Tensor:
        """The point of flattened values."""
        values = split(flat, self.sites)
        return torch.cat([t.inv(values[name]).reshape(-1) for name, t in self.transforms.items()])

    def dims(self) -> dict[str, tuple[str, ...]]:
        """A name for each axis of each site."""
        return {
            name: site.dims or tuple(f"{name}_dim_{i}" for i in range(len(site.shape)))
            for name, site in self.sites.items()
        }

    def _points(self) -> Tensor:
        like = torch.zeros(self.dim, dtype=self.precision)
        points = finite_points(nearby(like), lambda z: bool(self.density(z).isfinite()))
        if points is None:
            raise ModelError(
                f"{self.name} is not finite at any of {TRIES} points near the centre of the "
                "supports; check the supports of the sites and the scale of the data."
            )
        return points


def _checked(name: str, site: Site) -> tuple[Transform, torch.Size]:
    """The bijection of a site, and the shape of what it maps to the site."""
    try:
        transform = bijection(site.support)
    except NotImplementedError:
        raise ModelError(
            f"Site '{name}' has support {site.support!r}, which no smooth bijection maps to R^n; "
            "parametrise it by unconstrained values."
        ) from None
    if site.dims and len(site.dims) != len(site.shape):
        raise ModelError(
            f"Site '{name}' has {len(site.shape)} axes; got {len(site.dims)} dims: {site.dims}."
        )
    shape = torch.Size(site.shape)
    try:
        inverse = transform.inverse_shape(shape)
        fits = transform.forward_shape(inverse) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ModelError(
            f"Site '{name}' has shape {tuple(shape)}, which its support {site.support!r} does not "
            "allow."
        )
    return transform, inverse
