"""The log density of a model by Pyro itself: trace, `biject_to`, autograd."""

import dataclasses
import functools
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_map
from zoo import Case

from flowvi.targets import Target
from flowvi.targets.precision import cast, default_dtype
from flowvi.targets.pyro.bijections import bijection_of
from flowvi.targets.tabular import as_tensor

# For these torch has no bijection; the Jacobian of ours is then taken by autograd.
OURS = {
    type(support)
    for support in (
        constraints.positive_definite,
        constraints.lower_cholesky,
        constraints.softplus_lower_cholesky,
        constraints.unit_lower_cholesky,
    )
}


def in_double(function: Any) -> Any:
    """Run a case in double precision, or in the default one if it holds tensors of that."""

    @functools.wraps(function)
    def call(case: Case, target: Target, z: Tensor, *rest: Any) -> Any:
        dtype = torch.get_default_dtype() if case.holds else torch.float64
        args, kwargs = tree_map(lambda a: cast(as_tensor(a), dtype), (case.args, case.kwargs))
        case = dataclasses.replace(case, args=args, kwargs=kwargs)
        with default_dtype(dtype):
            return function(case, target, z.to(dtype), *rest)

    return call


@in_double
def log_joint(
    case: Case, target: Target, z: Tensor, rows: dict[str, Tensor] | None = None
) -> Tensor:
    """Trace log_prob_sum plus log Jacobians at one point, (D,) -> ()."""
    model = case.twin or case.model
    if case.enumerated:
        return -_potential(case, target, z)
    handler = _Substitute(target, z, rows or {})
    trace = poutine.trace(handler(model)).get_trace(*case.args, **case.kwargs)
    return trace.log_prob_sum() + handler.ladj


@in_double
def log_likelihood(case: Case, target: Target, z: Tensor) -> Tensor:
    """What the data add to the log joint at one point, without scales."""
    if case.enumerated:
        prior = dataclasses.replace(case, model=_Unseen()(case.model))
        return log_joint(case, target, z) - log_joint(prior, target, z)
    model = _Substitute(target, z, {})(case.twin or case.model)
    trace = poutine.trace(model).get_trace(*case.args, **case.kwargs)
    trace.compute_log_prob()
    data = [site for name, site in trace.nodes.items() if name in target.observed]
    rows = (scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"]) for site in data)
    return sum((row.sum() for row in rows), z.new_zeros(()))


@in_double
def values_of(case: Case, target: Target, z: Tensor) -> dict[str, Tensor]:
    """Values of all sites at one point."""
    handler = _Substitute(target, z, {})
    model = handler(case.twin or case.model)
    nodes = poutine.trace(model).get_trace(*case.args, **case.kwargs).nodes
    return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}


def with_gradient(function: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar function and its gradient at a point."""
    z = z.detach().clone().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


class _Unseen(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


class _Substitute(Messenger):
    def __init__(self, target: Target, z: Tensor, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.target, self.z, self.rows = target, z, rows
        self.ladj = z.new_zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample) and name in self.rows:
            msg["value"], msg["done"] = self.rows[name], True
        if name in self.target.slices:
            u = self.z[self.target.slices[name]]
            shape = torch.Size((*fn.batch_shape, *fn.event_shape))
            msg["value"], ladj = _mapped(fn, u, shape)
            msg["done"] = True
            self.ladj = self.ladj + ladj


def _support(fn: Any) -> constraints.Constraint:
    inner = fn
    while hasattr(inner, "base_dist") and not isinstance(inner, dist.VonMises):
        inner = inner.base_dist
    if isinstance(inner, dist.VonMises):
        return constraints.independent(constraints.interval(-math.pi, math.pi), fn.event_dim)
    if isinstance(inner, dist.MixtureSameFamily):
        return inner.component_distribution.support
    return fn.support


def _mapped(fn: Any, u: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    support = _support(fn)
    # torch calls any affine transform's range the real line, whatever it transforms.
    if type(support) in OURS or type(fn) is dist.TransformedDistribution:
        transform = bijection_of(fn)
        u = u.reshape(transform.inverse_shape(shape))
        return transform(u), _ladj_by_autograd(transform, u)
    transform = biject_to(support)
    u = u.reshape(transform.inverse_shape(shape))
    value = transform(u)
    return value, transform.log_abs_det_jacobian(u, value).sum()


def _ladj_by_autograd(transform: Any, u: Tensor) -> Tensor:
    """Log determinant of the free entries: those on and below the diagonal of a matrix."""

    def free(x: Tensor) -> Tensor:
        y = transform(x.reshape(u.shape))
        if transform.codomain.event_dim < 2:
            return y.reshape(-1)
        n = y.shape[-1]
        unit = len(x) < y[..., 0].numel() * (n + 1) / 2
        return y[(..., *torch.tril_indices(n, n, -1 if unit else 0))].reshape(-1)

    jacobian = torch.autograd.functional.jacobian(free, u.reshape(-1), create_graph=True)
    return torch.linalg.slogdet(jacobian).logabsdet


def _potential(case: Case, target: Target, z: Tensor) -> Tensor:
    """What Pyro's HMC makes of the model."""
    _, potential, transforms, _ = initialize_model(case.model, case.args, case.kwargs)
    values = {}
    for name, site in target.sites.items():
        shape = torch.Size(site.shape)
        if name in transforms:
            shape = transforms[name].inv.inverse_shape(shape)
        values[name] = z[target.slices[name]].reshape(shape)
    value: Tensor = potential(values)
    return value
