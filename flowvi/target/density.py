"""A log density written by hand, as a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions import Transform

from flowvi.target.base import Target
from flowvi.target.bijections import bijection
from flowvi.target.capture import Trial, capture
from flowvi.target.facts import Facts, Functions, ModelError, Site
from flowvi.target.program import Density
from flowvi.target.vectors import TRIES, finite_points, nearby, split


def from_density(
    log_prob: Callable[[dict[str, Tensor]], Tensor], sites: Mapping[str, Site]
) -> Target:
    """Make a target of a differentiable log density on named, constrained values.

    Args:
        log_prob: Takes a dict of one value a site, each of its site's shape, and returns
            the log density there, (), up to a constant. Jacobians are added by flowvi.
        sites: Name -> `Site(shape, support)`.

    Raises:
        ModelError: The density cannot be evaluated or captured.
    """
    return _Plain(log_prob, dict(sites)).target()


class _Plain:
    """One density on its way to a target."""

    def __init__(
        self, log_prob: Callable[[dict[str, Tensor]], Tensor], sites: dict[str, Site]
    ) -> None:
        if not sites:
            raise ModelError("from_density needs at least one site, such as {'mu': flowvi.Site()}.")
        self.log_prob, self.sites = log_prob, sites
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

    def target(self) -> Target:
        trial = Trial(self._points())
        batched = capture(self._density, trial, self.name, reads=True)
        dims = {
            name: site.dims or tuple(f"{name}_dim_{i}" for i in range(len(site.shape)))
            for name, site in self.sites.items()
        }
        facts = Facts(self.name, self.sites, self.slices, dims=dims)
        functions = Functions(self._values, self._inverse)
        return Target(facts, Density(batched, frozen=True), functions, trial)

    def _values(self, z: Tensor) -> dict[str, Tensor]:
        return {
            name: self.transforms[name](z[self.slices[name]].reshape(self.shapes[name]))
            for name in self.sites
        }

    def _density(self, z: Tensor) -> Tensor:
        values, ladj = {}, z.new_zeros(())
        for name, transform in self.transforms.items():
            u = z[self.slices[name]].reshape(self.shapes[name])
            values[name] = transform(u)
            ladj = ladj + transform.log_abs_det_jacobian(u, values[name]).sum()
        log_p = self.log_prob(values)
        if not isinstance(log_p, Tensor) or log_p.shape != ():
            came = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            raise ModelError(
                f"{self.name} must return the log density of one point, a tensor of shape (); "
                f"got {came}. Add .sum() if it returned one value a row of the data."
            )
        return log_p + ladj

    def _inverse(self, flat: Tensor) -> Tensor:
        values = split(flat, self.sites)
        return torch.cat([t.inv(values[name]).reshape(-1) for name, t in self.transforms.items()])

    def _points(self) -> Tensor:
        like = torch.zeros(self.dim)
        points = finite_points(nearby(like), lambda z: bool(self._density(z).isfinite()))
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
