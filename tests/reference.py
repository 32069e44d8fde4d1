"""The log density of a model by Pyro itself: trace, `biject_to`, autograd."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from zoo import Case

from flowvi.target import Target
from flowvi.target.bijections import bijection

# For these torch has no bijection; the Jacobian of ours is then taken by autograd.
OURS = (
    constraints.positive_definite,
    constraints.lower_cholesky,
    constraints.softplus_lower_cholesky,
    constraints.unit_lower_cholesky,
)


def log_joint(
    case: Case, target: Target, z: Tensor, rows: dict[str, Tensor] | None = None
) -> Tensor:
    """Trace log_prob_sum plus log Jacobians at one point, (D,) -> ()."""
    model = case.twin or case.model
    if case.enumerated:
        return -_potential(case, target, z)
    handler = _Substitute(target, z, rows or {})
    trace = poutine.trace(handler(model)).get_trace(*_tensors(case.args), **case.kwargs)
    return trace.log_prob_sum() + handler.ladj


def values_of(case: Case, target: Target, z: Tensor) -> dict[str, Tensor]:
    """Values of all sites at one point."""
    handler = _Substitute(target, z, {})
    model = handler(case.twin or case.model)
    nodes = poutine.trace(model).get_trace(*_tensors(case.args), **case.kwargs).nodes
    return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}


def with_gradient(function: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar function and its gradient at a point."""
    z = z.detach().clone().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


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
            msg["value"], ladj = _mapped(_support(fn), u, shape)
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


def _mapped(
    support: constraints.Constraint, u: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    if any(type(support) is type(ours) for ours in OURS):
        transform = bijection(support)
        u = u.reshape(transform.inverse_shape(shape))
        return transform(u), _ladj_by_autograd(transform, u, diagonal=support is not OURS[3])
    transform = biject_to(support)
    u = u.reshape(transform.inverse_shape(shape))
    value = transform(u)
    return value, transform.log_abs_det_jacobian(u, value).sum()


def _ladj_by_autograd(transform: Any, u: Tensor, diagonal: bool) -> Tensor:
    n = transform(u).shape[-1]
    rows, columns = torch.tril_indices(n, n, 0 if diagonal else -1)

    def free(x: Tensor) -> Tensor:
        return transform(x)[..., rows, columns]

    total = u.new_zeros(())
    for row in u.reshape(-1, u.shape[-1]):
        jacobian = torch.autograd.functional.jacobian(free, row, create_graph=True)
        total = total + torch.linalg.slogdet(jacobian).logabsdet
    return total


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


def _tensors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(torch.as_tensor(a) if type(a).__module__ == "numpy" else a for a in args)
